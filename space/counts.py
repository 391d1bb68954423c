"""Counts: how many tokens each of C network calls decides, by name or by dynamic programming.

With uniformly random positions and temperature 1, the expected divergence of the sampler's law
from the model's is, for counts c_0 .. c_{C-1} with m_k tokens visible before call k (Chen, Cong
and Li 2511.04647, the left Riemann sum of the information curve),

    sum_k c_k h(m_k) - sum_m h(m),        m_k = c_0 + ... + c_{k-1}

where h(m) is the mean cross-entropy of a masked token when m random ones are visible. Only the
first sum depends on the counts, and dynamic programming minimises it exactly for every number of
calls at once. `samplers.curve` measures h.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from fewstep.space.errors import ScheduleError

__all__ = ["COUNTS", "best_counts", "counts_by_name", "counts_cost", "split"]

COUNTS = ("uniform", "linear", "cosine", "reverse_cosine")


def split(weights: Sequence[float], length: int) -> tuple[int, ...]:
    """Integer counts proportional to weights, each at least 1, that sum to `length`.

    The cumulative shares are rounded, then moved apart by the least that leaves every count >= 1.

    Raises:
        ScheduleError: more calls than positions, or weights that are not positive numbers.
    """
    calls = len(weights)
    _fits(calls, length)
    if not (all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0):
        raise ScheduleError("weights must be finite, >= 0 and not all 0")
    ends = [round(c * length / sum(weights)) for c in itertools.accumulate(weights)]
    ends[-1] = length
    for i in range(calls):
        ends[i] = max(ends[i], i + 1, ends[i - 1] + 1 if i else 1)
    for i in range(calls - 1, -1, -1):
        ends[i] = min(ends[i], length - (calls - 1 - i))
    return tuple(b - a for a, b in itertools.pairwise([0, *ends]))


def counts_by_name(name: str, length: int, calls: int) -> tuple[int, ...]:
    """The named baselines: `calls` counts that sum to `length`.

    Args:
        name: "uniform" (equal counts, the paper's choice), "linear" (counts growing like 1, 2,
            3, ...), "cosine" (MaskGIT's: the masked share after call k of N is cos(pi k / 2N),
            few tokens first), "reverse_cosine" (the same counts from the other end).
        length: positions to decide.
        calls: network calls, 1..length.

    Raises:
        ScheduleError: an unknown name, or more calls than positions.

    References:
        Chang et al. 2202.04200, section 3.3 (cosine).
    """
    if name not in COUNTS:
        raise ScheduleError(f"counts {name!r} are unknown: use one of {', '.join(COUNTS)}")
    _fits(calls, length)
    if name == "uniform":
        weights = [1.0] * calls
    elif name == "linear":
        weights = [k + 1.0 for k in range(calls)]
    else:
        share = [math.cos(math.pi * k / (2 * calls)) for k in range(calls + 1)]
        weights = [a - b for a, b in itertools.pairwise(share)]
        weights = weights[::-1] if name == "reverse_cosine" else weights
    return split(weights, length)


def counts_cost(curve: Sequence[float], counts: Sequence[int]) -> float:
    """sum_k c_k h(m_k) in nats: what `best_counts` minimises.

    Args:
        curve: h(0) .. h(L-1).
        counts: positive, their sum L.
    """
    visible = itertools.accumulate(counts[:-1], initial=0)
    return float(sum(c * curve[m] for c, m in zip(counts, visible, strict=True)))


def best_counts(curve: Sequence[float], calls: int | None = None) -> list[tuple[int, ...]]:
    """The counts of least expected divergence, for 1, 2, .. `calls` network calls.

    With F_k(n) the least cost of deciding the first n tokens in k calls, F_k(n) = min over m < n
    of F_{k-1}(m) + (n - m) h(m): O(L^2) for each number of calls.

    Args:
        curve: h(0) .. h(L-1) in nats, finite; h(m) is the mean cross-entropy of a masked token
            when m random ones are visible.
        calls: the largest number of calls wanted, 1..L; default L.

    Returns:
        Entry k - 1 has k positive counts that sum to L.

    Raises:
        ScheduleError: a curve that is empty or not finite, or more calls than positions.

    References:
        Chen, Cong and Li 2511.04647 (optimal inference schedules by dynamic programming).
    """
    h = np.asarray(curve, dtype=np.float64)
    if h.ndim != 1 or not len(h) or not np.isfinite(h).all():
        raise ScheduleError("curve must be a list of finite numbers, one for each position")
    length = len(h)
    calls = length if calls is None else calls
    _fits(calls, length)
    start, end = np.arange(length)[:, None], np.arange(1, length + 1)[None]
    price = np.where(end > start, (end - start) * h[:, None], np.inf)  # of one call, m -> n
    best = np.full(length + 1, np.inf)
    best[0], came = 0.0, []
    for _ in range(calls):
        totals = best[:length, None] + price
        came.append(totals.argmin(0))
        best = np.concatenate([[np.inf], totals.min(0)])
    return [_traced(came[:k], length) for k in range(1, calls + 1)]


def _traced(came: Sequence[np.ndarray], length: int) -> tuple[int, ...]:
    """The counts of a shortest path, read from its end."""
    counts, n = [], length
    for row in reversed(came):
        m = int(row[n - 1])
        counts.append(n - m)
        n = m
    return tuple(reversed(counts))


def _fits(calls: int, length: int) -> None:
    if not 1 <= calls <= length:
        raise ScheduleError(f"{calls} calls for {length} positions: use 1..{length} calls")
