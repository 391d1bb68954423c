"""Rivals that end early, set to a mean number of network calls.

The entropy bound (Ben-Hamu et al. 2505.24857) and KLASS (Kim et al. 2511.05664) let a call decide
one position and all others that a bound lets through, so that how many calls a sequence takes is
random. Samplers of fixed counts are compared with them at equal cost: each rule has one number,
its strictness x in (0, 1), on which the mean calls rise from the fewest to one a position, and
`calibrated` finds the x of a wanted mean by bisection.

    entropy bound    max_entropy = (1 - x) / x nats
    KLASS            min_confidence = x, max_kl = .09 (1 - x) / x; x = .9 is as published (.9, .01)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fewstep.samplers import TokenDenoiser, sample_masked
from fewstep.samplers.token_denoiser import CountedSequences
from fewstep.space.masked import CallSpec, MaskedSchedule

__all__ = ["RULES", "calibrated", "entropy_bound", "klass", "mean_calls"]

Rule = Callable[[int, float], MaskedSchedule]


def _ending_early(length: int, call: CallSpec) -> MaskedSchedule:
    return MaskedSchedule(length=length, calls=(call,) * length, ahead="stop")


def entropy_bound(length: int, strictness: float) -> MaskedSchedule:
    """The entropy bound, for sequences of `length` free positions."""
    bound = (1 - strictness) / strictness
    return _ending_early(length, CallSpec(positions="entropy", max_entropy=bound))


def klass(length: int, strictness: float) -> MaskedSchedule:
    """KLASS with a window of two calls, for sequences of `length` free positions."""
    moved = 0.09 * (1 - strictness) / strictness
    call = CallSpec(positions="confidence", min_confidence=strictness, max_kl=moved, kl_window=2)
    return _ending_early(length, call)


RULES: Mapping[str, Rule] = {"entropy bound": entropy_bound, "KLASS": klass}


def mean_calls(
    schedule: MaskedSchedule, denoiser: TokenDenoiser, tokens: Tensor, u: Tensor
) -> float:
    """Network calls of a sequence, mean over sequences."""
    counted = CountedSequences(denoiser)
    sample_masked(schedule, counted, tokens, u=u)
    return counted.sequences / len(tokens)


def calibrated(
    rule: Rule,
    wanted: Sequence[int],
    denoiser: TokenDenoiser,
    tokens: Tensor,
    u: Tensor,
    *,
    within: float = 0.03,
    rounds: int = 14,
) -> dict[int, MaskedSchedule]:
    """The rule's schedules of wanted mean calls; its strictness and mean are their provenance.

    For six rounds the bracket is cut where the logarithm of the mean, taken as linear, has the
    wanted value, never nearer than a tenth of it to its ends, and then in halves. What one mean
    costs to find helps the others.

    Args:
        rule: positions and strictness to a schedule.
        wanted: mean calls, each more than the fewest of the rule and less than one a position.
        denoiser: the model.
        tokens: sequences with as many masks each, not those of the comparison.
        u: their uniforms, `(B, 2, L)`.
        within: how far from the wanted mean is near enough, as a share of it.
        rounds: most schedules tried for each; the nearest one is taken.
    """
    free = int((tokens[0] == denoiser.mask).sum())
    tried: dict[float, float] = {}
    found = {}
    for calls in wanted:
        for turn in range(rounds):
            if any(abs(mean / calls - 1) <= within for mean in tried.values()):
                break
            x = _between({0.0: 1.0, 1.0: float(free)} | tried, calls, halve=turn >= 6)
            tried[x] = mean_calls(rule(free, x), denoiser, tokens, u)
        x = min(tried, key=lambda x: abs(tried[x] - calls))
        facts = {"strictness": x, "mean_calls": tried[x], "sequences": len(tokens)}
        found[calls] = rule(free, x).model_copy(update={"provenance": facts})
    return found


def _between(tried: Mapping[float, float], calls: int, *, halve: bool) -> float:
    """The strictness to try next."""
    low = max(x for x, mean in tried.items() if mean < calls)
    high = min(x for x in tried if x > low)
    ends = [math.log(tried[x]) for x in (low, high)]
    share = 0.5 if halve else (math.log(calls) - ends[0]) / (ends[1] - ends[0])
    return low + (high - low) * min(max(share, 0.1), 0.9)
