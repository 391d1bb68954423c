"""What is minimised.

endpoint_mse: a sample's error is the squared distance of its end point to the teacher's, divided
by the number of elements (pixels x channels): the MEAN SQUARE per element, so that RMSE is its
root in the units of the data. The score of a schedule is a statistic of its samples' errors, the
geometric mean unless the study says otherwise (`predictors.yardstick`). Noise and conditions are
shared by all schedules, so comparisons are paired, sample by sample.

frechet: |mu - mu'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2) between features of the samples and of
the teacher's end points (Heusel et al. 2017, arXiv 1706.08500, eq. 6), float64, the root by
eigendecomposition. It has no per-sample scores.

A problem whose samples are drawn (`samplers.problems`) brings its own measure and score, with no
teacher; samples that have no measure are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.predictors.yardstick import (
    Array,
    Comparison,
    Statistic,
    bootstrap_ratio,
    compare,
    geometric_ratio,
    level,
    middle95,
    paired_resamples,
    q90,
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


def frechet_distance(a: Array, b: Array) -> float:
    """Frechet distance of the Gaussians fitted to features (N, F) and (N', F), N >= 2.

    It is >= 0, 0 for equal sets; inf if a feature is not finite.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ cov_b @ root)
    gap = a.mean(0) - b.mean(0)
    distance = (
        gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.clip(inner, 0, None)).sum()
    )
    return float(max(distance, 0.0))


def ratio(a: float, b: float) -> float | None:
    """a / b; None where the scores are not positive numbers, so that a ratio says nothing."""
    return a / b if a >= 0 and b > 0 and np.isfinite(a) and np.isfinite(b) else None


def score_interval(
    a: Array,
    b: Array,
    score: Callable[[Array, NDArray[np.intp]], float],
    *,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Paired bootstrap interval (95 %) of score(a) / score(b) for an objective's own score.

    The measures a, b (N, K) are of the same samples, of which `score` gets those drawn: with
    replacement, the SAME ones for both; the interval holds the middle 95 % of the ratios (Efron
    and Tibshirani 1993, chapter 13). Resamples that have no score, because too few samples have
    measures, are left out. None where the scores have no ratio.

    Raises:
        StudyError: no resample has a score.
    """
    both = paired_resamples(a, b, score, resamples=resamples, seed=seed)
    both = both[np.isfinite(both).all(1)]
    if not len(both):
        raise StudyError("too few samples have a measure to compare: raise final.samples")
    if (both[:, 0] < 0).any() or (both[:, 1] <= 0).any():
        return None
    return middle95(both[:, 0] / both[:, 1])


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
