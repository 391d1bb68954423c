"""What is minimised.

endpoint_mse: a sample's error is the squared distance of its end point to the teacher's, divided
by the number of elements (pixels x channels): the MEAN SQUARE per element, so that RMSE is its
root in the units of the data. The score of a schedule is a statistic of its samples' errors, the
geometric mean unless the study says otherwise (`predictors.yardstick`). Noise and conditions are
shared by all schedules, so comparisons are paired, sample by sample.

frechet: the Frechet distance between features of the samples and of the teacher's end points. It
has no per-sample scores.

A problem whose samples are drawn (`samplers.problems`) brings its own measure and score, with no
teacher; samples that have no measure are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.predictors.yardstick import (
    Array,
    Comparison,
    Statistic,
    bootstrap_ratio,
    compare,
    frechet_distance,
    geometric_ratio,
    level,
    q90,
    ratio,
    score_interval,
)
from fewstep.samplers import MaskedProblem, ParticleProblem
from fewstep.space.errors import StudyError


class Objective:
    """Workers `measure` samples; the driver turns all measures of a schedule into a score.

    Attributes:
        name: of the score.
        per_sample: whether column 0 of the measures is an error of each sample.
        statistic: of these errors, the schedule's score.
        partial: whether a sample may have no measure, a row of NaN.
    """

    name: str
    per_sample: bool = True
    statistic: Statistic = "mean"
    partial: bool = False

    def measure(self, x: Tensor, reference: Tensor) -> Tensor:
        """Samples (M, B, *shape), the teacher's end points (B, *shape) -> (M, B, K)."""
        raise StudyError(f"objective {self.name} has no teacher to measure")

    def score(self, measures: Array, reference: Array) -> float:
        """Measures (N, K) of a schedule and of the teacher -> the number minimised."""
        raise NotImplementedError

    def facts(self, measures: Array) -> dict[str, float]:
        """Measures (N, K) -> further numbers to report."""
        return {}


class EndpointMSE(Objective):
    """A statistic over samples of the squared distance to the teacher, per element.

    Args:
        statistic: which; "backward" reads the teacher's squared gain from column 0 of the
            reference's measures.
    """

    name = "endpoint_mse"

    def __init__(self, statistic: Statistic = "geometric") -> None:
        self.statistic = statistic

    def measure(self, x: Tensor, reference: Tensor) -> Tensor:
        """Mean over elements of the squared difference, float64, K = 1."""
        difference = (x - reference).to(torch.float64)
        return difference.square().flatten(2).mean(-1, keepdim=True)

    def score(self, measures: Array, reference: Array) -> float:
        """The statistic of the first N samples; `reference` may hold more."""
        gain = reference[: len(measures), 0] if self.statistic == "backward" else None
        return level(measures[:, 0], self.statistic, gain)


class Frechet(Objective):
    """Frechet distance of features to those of the teacher's end points.

    Args:
        features: images (B, *shape) -> (B, F).
    """

    name = "frechet"
    per_sample = False

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        self.features = features

    def measure(self, x: Tensor, reference: Tensor) -> Tensor:
        """The features, K = F."""
        with torch.no_grad():
            out = self.features(x.flatten(0, 1))
        if out.ndim != 2 or len(out) != x.shape[0] * x.shape[1]:
            raise StudyError(
                f"objective.features returned {tuple(out.shape)} for {x.shape[0] * x.shape[1]} "
                "images: (B, F) is needed"
            )
        return out.to(torch.float64).reshape(*x.shape[:2], -1)

    def score(self, measures: Array, reference: Array) -> float:
        """The distance of two sets of features."""
        return frechet_distance(measures, reference)


class Measured(Objective):
    """A problem's own score; its blocks measure samples themselves, and there is no teacher.

    Args:
        problem: brings `measure`, `score` and `facts`.
    """

    def __init__(self, problem: MaskedProblem | ParticleProblem) -> None:
        self.problem, self.name = problem, problem.objective
        self.per_sample = problem.score is None
        self.partial = isinstance(problem, MaskedProblem) and not self.per_sample

    def score(self, measures: Array, reference: Array) -> float:
        """The problem's score of the samples that have measures; inf below two of them."""
        there = measures[~np.isnan(measures).all(1)]
        if len(there) < 2:
            return float("inf")
        if self.problem.score is None:
            return float(there[:, 0].mean())
        return float(self.problem.score(there))

    def facts(self, measures: Array) -> dict[str, float]:
        """The problem's facts, such as the share of samples left out."""
        return {} if self.problem.facts is None else self.problem.facts(measures)


class Paired:
    """Measures of schedules on the same samples, compared as an objective says.

    Intervals that have no formula come from `resamples` bootstrap resamples of seed `seed`.
    """

    def __init__(self, objective: Objective, *, resamples: int, seed: int) -> None:
        self._objective, self._drawn = objective, {"resamples": resamples, "seed": seed}

    def errors(self, measures: Array | None) -> Array | None:
        """The errors of all samples (N,); None unless each has one and none is negative."""
        if measures is None or not self._objective.per_sample or self._objective.partial:
            return None
        return measures[:, 0] if bool((measures[:, 0] >= 0).all()) else None

    def value(self, measures: Array, reference: Array) -> float:
        """The score that is reported: the plain geometric mean where the study compares these."""
        errors = self.errors(measures)
        if errors is not None and self._objective.statistic == "geometric":
            return geometric_ratio(errors, np.ones_like(errors))[0]
        return self._objective.score(measures, reference)

    def compared(self, a: Array | None, b: Array | None) -> Comparison | None:
        """Ratios of every statistic; None without errors of all samples."""
        one, other = self.errors(a), self.errors(b)
        return None if one is None or other is None else compare(one, other, **self._drawn)

    def ratio(
        self, a: Array, b: Array, reference: Array
    ) -> tuple[float | None, tuple[float, float] | None]:
        """The ratio of reported scores and its 95 % interval, None where there is none."""
        compared, statistic = self.compared(a, b), self._objective.statistic
        share = ratio(self.value(a, reference), self.value(b, reference))
        if compared is not None and statistic == "geometric":
            return compared.geometric, compared.interval
        if share is None or (compared is not None and statistic == "mean"):
            return share, None if compared is None else compared.mean_interval

        def score(measures: Array, chosen: Any) -> float:
            return self._objective.score(measures[chosen], reference[chosen])

        return share, score_interval(a, b, score, **self._drawn)

    def clearly_worse(self, a: Array | None, b: Array | None) -> str:
        """What of a is clearly worse than b's: its mean or its 90 % quantile; "" if neither.

        Clearly: the 95 % bootstrap interval of the ratio lies above 1.
        """
        one, other = self.errors(a), self.errors(b)
        if one is None or other is None:
            return ""
        for name, of in (("mean", np.mean), ("90 % quantile", q90)):
            low, _ = bootstrap_ratio(one, other, of, **self._drawn)
            if low > 1:
                return f"its {name} is clearly worse ({low:.2f} times at least)"
        return ""
