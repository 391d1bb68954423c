"""The statistics that scores, choices and verdicts rest on: what per-sample errors say.

Errors of few-call sampling are heavy-tailed. Samples at the boundary between two modes of the data
end in another one, their error is thousands of times the median, and a mean over a few hundred
samples is ruled by the two or three of them it happens to hold: tail indices near 1 are usual
here, where a mean hardly exists. Logarithms of the errors are well behaved, so a study compares
geometric means by default.

    geometric   exp of the mean log error, without the 1 % smallest and largest (one sample at
                least at either end, so that no single sample decides anything)
    trimmed     mean without the 5 % smallest and largest
    median
    mean
    backward    mean of e / s^2, s the teacher's gain: how strongly its end point answers to its
                start noise. The error as the change of the start noise that would explain it,
                which basin boundaries leave small.

A verdict reports the plain geometric mean of all its fresh samples, with an interval by the
central limit theorem on the paired differences of logs.

The Frechet distance compares features of samples, which have no errors of their own.

References: tail index, Hill 1975 (Ann. Statist. 3, 1163); bootstrap, Efron and Tibshirani 1993.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator

from fewstep.space.errors import StudyError

Array = NDArray[np.float64]
Statistic = Literal["geometric", "mean", "median", "trimmed", "backward"]
FLOOR = 1e-20
"""An error below this counts as this: logarithms stay finite where two samples are equal."""

Number = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]
"""A number whose JSON form is null where it is not finite."""

LEVEL = 0.1
"""Of the test by which a schedule loses against another."""

_NORMAL95 = 1.959964
_TRIMMED = {"geometric": 0.01, "trimmed": 0.05}


def level(errors: Array, statistic: Statistic, gain: Array | None = None) -> float:
    """One number for per-sample errors (N,), >= 0 for "geometric", in their own unit.

    "backward" needs the teacher's squared `gain` of every sample.
    """
    if statistic == "median":
        return float(np.median(errors))
    if statistic == "mean":
        return float(errors.mean())
    if statistic == "backward":
        if gain is None:
            raise ValueError("backward errors need the teacher's gain")
        return float((errors / np.maximum(gain, FLOOR)).mean())
    values = np.sort(np.log(np.maximum(errors, FLOOR)) if statistic == "geometric" else errors)
    cut = min(math.ceil(_TRIMMED[statistic] * len(values)), (len(values) - 1) // 2)
    inner = float(values[cut : len(values) - cut].mean())
    return math.exp(inner) if statistic == "geometric" else inner


def comparable(errors: Array, statistic: Statistic) -> Array:
    """Per-sample numbers whose paired differences say which schedule is better, shape (N,)."""
    if statistic in ("geometric", "median"):
        return np.log(np.maximum(errors, FLOOR))
    return errors


def loses(candidate: Array, leader: Array, statistic: Statistic = "mean") -> bool:
    """Whether a candidate's errors are worse than the leader's on the same samples, both (n,).

    By a one-sided Wilcoxon signed-rank test on the paired differences, at level `LEVEL`.
    """
    difference = comparable(candidate, statistic) - comparable(leader, statistic)
    if level(candidate, statistic) <= level(leader, statistic) or not difference.any():
        return False
    from scipy.stats import wilcoxon  # half a second and 30 MB, in every worker and command

    return bool(wilcoxon(difference, alternative="greater").pvalue < LEVEL)


def tail_index(errors: Array, share: float = 0.02) -> float:
    """Hill's estimator on the largest `share` of the errors (10 at least); inf where they agree.

    Moments of order above it do not exist: below 2 a mean has no standard error.
    """
    ordered = np.sort(np.maximum(errors, FLOOR))[::-1]
    count = min(max(10, int(share * len(ordered))), len(ordered) - 1)
    if count < 1:
        return math.inf
    mean = float(np.log(ordered[:count] / ordered[count]).mean())
    return 1 / mean if mean > 0 else math.inf


def geometric_ratio(a: Array, b: Array) -> tuple[float, tuple[float, float]]:
    """Paired ratio of geometric means of two schedules' errors, and its 95 % interval."""
    logs = np.log(np.maximum(a, FLOOR)) - np.log(np.maximum(b, FLOOR))
    middle = float(logs.mean())
    half = _NORMAL95 * float(logs.std(ddof=1)) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    return math.exp(middle), (math.exp(middle - half), math.exp(middle + half))


def bootstrap_ratio(
    a: Array, b: Array, of: Any, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of of(a) / of(b), errors (N,) resampled at the same samples.

    `of` is a statistic of errors, such as `np.mean`.
    """

    def score(errors: Array, at: NDArray[np.intp]) -> float:
        return float(of(errors[at]))

    both = paired_resamples(a, b, score, resamples=resamples, seed=seed)
    return middle95(np.array([_ratio(*pair) for pair in both.tolist()]))


def paired_resamples(
    a: Array,
    b: Array,
    score: Callable[[Array, NDArray[np.intp]], float],
    *,
    resamples: int,
    seed: int,
) -> Array:
    """score(a), score(b) of samples drawn with replacement, the SAME ones for both, (R, 2)."""
    rng, n = np.random.default_rng(seed), len(a)
    picks = [rng.integers(0, n, size=n) for _ in range(resamples)]
    return np.array([(score(a, at), score(b, at)) for at in picks])


def middle95(values: Array) -> tuple[float, float]:
    """What holds the middle 95 % of values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


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


def ratio(a: float, b: float) -> float | None:
    """a / b; None where the scores are not positive numbers, so that a ratio says nothing."""
    return a / b if a >= 0 and b > 0 and np.isfinite(a) and np.isfinite(b) else None


def _ratio(above: float, below: float) -> float:
    """A ratio of two statistics >= 0; equal ones have 1, at 0 too."""
    if below > 0:
        return above / below
    return 1.0 if above == 0 else math.inf


def q90(errors: Array) -> float:
    """The 90 % quantile."""
    return float(np.quantile(errors, 0.9))


@dataclass(frozen=True)
class Comparison:
    """Two schedules on the same fresh samples: the errors of the one found over the other's.

    `geometric` (with its 95 % `interval`), `median`, `mean`, `q90` and `q99` are ratios of these
    statistics; `mean_interval`, 95 % by bootstrap, is None where the tail index is below 2, so
    that a mean has no standard error. `share_worse` of the samples have a larger error with the
    found schedule; its worst sample carries `worst_share` of its mean; `tail_index` is the lower
    of the two schedules'.
    """

    samples: int
    geometric: Number
    interval: tuple[float, float]
    median: Number
    mean: Number
    mean_interval: tuple[float, float] | None
    q90: Number
    q99: Number
    share_worse: Number
    worst_share: Number
    tail_index: Number

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; no number that JSON lacks."""
        return {
            k: v if v is None or np.isfinite(v).all() else None for k, v in asdict(self).items()
        }


def compare(a: Array, b: Array, *, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compare per-sample errors of two schedules on the same samples, both shape (N,), >= 0."""

    def share(of: Any) -> float:
        return _ratio(float(of(a)), float(of(b)))

    geometric, interval = geometric_ratio(a, b)
    tail = min(tail_index(a), tail_index(b))
    total = float(a.sum())
    return Comparison(
        samples=len(a),
        geometric=geometric,
        interval=interval,
        median=share(np.median),
        mean=share(np.mean),
        mean_interval=(
            bootstrap_ratio(a, b, np.mean, resamples=resamples, seed=seed) if tail >= 2 else None
        ),
        q90=share(q90),
        q99=share(lambda e: np.quantile(e, 0.99)),
        share_worse=float((a > b).mean()),
        worst_share=float(a.max()) / total if total > 0 else 0.0,
        tail_index=tail,
    )


def frechet_distance(a: Array, b: Array) -> float:
    """Frechet distance of the Gaussians fitted to features (N, F) and (N', F), N >= 2.

    |mu - mu'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2) (Heusel et al. 2017, arXiv 1706.08500,
    eq. 6), float64, the root by eigendecomposition. It is >= 0, 0 for equal sets; inf if a feature
    is not finite.
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
