"""What is minimised, and statistics of paired scores.

endpoint_mse: a sample's score is the squared distance of its end point to the teacher's, divided
by the number of elements (pixels x channels): the MEAN SQUARE per element, so that RMSE is its
root in the units of the data. The score of a schedule is the mean over samples. Noise and
conditions are shared by all schedules, so comparisons are paired, sample by sample.

frechet: |mu - mu'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2) between features of the samples and of
the teacher's end points (Heusel et al. 2017, arXiv 1706.08500, eq. 6), float64, the root by
eigendecomposition. It has no per-sample scores.

A problem whose samples are drawn (`samplers.problems`) brings its own measure and score, with no
teacher; samples that have no measure are left out.

Bootstrap: samples are drawn with replacement, the SAME ones for both schedules, and the ratio of
the two scores is formed; the interval holds the middle 95% of ratios (Efron and Tibshirani 1993,
ch. 13, percentile interval).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.samplers import MaskedProblem, ParticleProblem
from fewstep.space.errors import StudyError

Array = NDArray[np.float64]


class Objective(Protocol):
    """Workers `measure` samples; the driver turns all measures of a schedule into a score.

    Attributes:
        name: of the score.
        per_sample: whether column 0 of the measures is a score of each sample, their mean the
            schedule's.
        partial: whether a sample may have no measure, a row of NaN.
    """

    name: str
    per_sample: bool
    partial: bool

    def measure(self, x: Tensor, reference: Tensor) -> Tensor:
        """Samples (M, B, *shape), the teacher's end points (B, *shape) -> (M, B, K)."""
        ...

    def score(self, measures: Array, reference: Array) -> float:
        """Measures (N, K) of a schedule and of the teacher -> the number minimised."""
        ...

    def facts(self, measures: Array) -> dict[str, float]:
        """Measures (N, K) -> further numbers to report."""
        ...


class EndpointMSE:
    """Mean over samples of the squared distance to the teacher, per element."""

    name = "endpoint_mse"
    per_sample = True
    partial = False

    def measure(self, x: Tensor, reference: Tensor) -> Tensor:
        """Mean over elements of the squared difference, float64, K = 1."""
        difference = (x - reference).to(torch.float64)
        return difference.square().flatten(2).mean(-1, keepdim=True)

    def score(self, measures: Array, reference: Array) -> float:
        """Mean over samples."""
        return float(measures.mean())

    def facts(self, measures: Array) -> dict[str, float]:
        """None."""
        return {}


class Frechet:
    """Frechet distance of features to those of the teacher's end points.

    Args:
        features: images (B, *shape) -> (B, F).
    """

    name = "frechet"
    per_sample = False
    partial = False

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

    def facts(self, measures: Array) -> dict[str, float]:
        """None."""
        return {}


class Measured:
    """A problem's own score; its blocks measure samples themselves, and there is no teacher.

    Args:
        problem: brings `measure`, `score` and `facts`.
    """

    def __init__(self, problem: MaskedProblem | ParticleProblem) -> None:
        self.problem, self.name = problem, problem.objective
        self.per_sample = problem.score is None
        self.partial = isinstance(problem, MaskedProblem) and not self.per_sample

    def measure(self, x: Tensor, reference: Tensor) -> Tensor:
        """Refuses: populations of particles are more than their states."""
        raise StudyError(f"objective {self.name} has no teacher to measure")

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
    """Frechet distance between the Gaussians fitted to two sets of features.

    Args:
        a: features, shape (N, F), N >= 2.
        b: features, shape (N', F).

    Returns:
        A number >= 0, 0 for equal sets; inf if a feature is not finite.
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


def ratio_interval(
    a: Array,
    b: Array,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    score: Callable[[Array, NDArray[np.intp]], float] | None = None,
) -> tuple[float, float]:
    """Paired bootstrap interval (95%) of score(a) / score(b).

    Args:
        a: measures of one schedule, shape (N,) or (N, K).
        b: measures of the other on the same samples.
        resamples: number of resamples.
        seed: of the resampling.
        score: (measures, chosen samples) -> score; default the mean of column 0 over the chosen.
            Resamples that have no score, because too few samples have measures, are left out.

    Raises:
        StudyError: no resample has a score.
    """
    rng = np.random.default_rng(seed)
    n = len(a)
    if score is None:
        pair = np.stack([a.reshape(n, -1)[:, 0], b.reshape(n, -1)[:, 0]], axis=1)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
        sums = counts @ pair
        ratios = sums[:, 0] / np.maximum(sums[:, 1], np.finfo(float).tiny)
    else:
        picks = [rng.integers(0, n, size=n) for _ in range(min(resamples, 500))]
        both = np.array([(score(a, p), score(b, p)) for p in picks])
        both = both[np.isfinite(both).all(1)]
        if not len(both):
            raise StudyError("too few samples have a measure to compare: raise final.samples")
        ratios = both[:, 0] / np.maximum(both[:, 1], np.finfo(float).tiny)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
