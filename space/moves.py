"""Moves in a search space: sampling, mutation, crossover, neighbours, and steps in NFE.

All moves work on the named parameters and let `OdeDomain.from_params` settle the result, so every
child is a member. Probabilities and steps follow the table of the released USF search
(thu-nics/USF; arXiv 2312.07243 appendix), with times moved in lam instead of t or sigma, and with
what USF does not have (bases, re-evaluated correctors with their call counted) beside it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.space.choices import Parameter, Value, table
from fewstep.space.schedule import OdeSchedule
from fewstep.space.step_choices import step_values

if TYPE_CHECKING:
    from fewstep.space.domain import OdeDomain

RATES: dict[str, float] = {"relocate": 0.2}
"""Probability, per step, that a decision is proposed anew (a time "lam_i": moved), where it is not
`RATE`; "relocate" puts one time of the schedule elsewhere."""
RATE = 0.3
COEFFICIENT_STEP = 0.03  # standard deviation of a move of c, USF's


@cache
def split(name: str) -> tuple[str, int]:
    """("order_3") -> ("order", 3); globals get index -1."""
    stem, _, index = name.rpartition("_")
    return (stem, int(index)) if index.isdigit() else (name, -1)


def fit_times(
    given: Sequence[float], count: int, low: float, high: float, gap: float
) -> list[float]:
    """`count` increasing values with gaps of at least `gap`, near to `given`.

    Too many: the value with the least room goes; too few: midpoints of the widest gaps come.
    Feasible input of the right length is returned as it is, bit for bit.
    """
    values = sorted(min(max(v, low), high) for v in given)
    while len(values) > count:
        ends = [low, *values, high]
        room = [ends[i + 2] - ends[i] for i in range(len(values))]
        values.pop(int(np.argmin(room)))
    while len(values) < count:
        ends = [low, *values, high]
        widest = int(np.argmax(np.diff(ends)))
        values.insert(widest, 0.5 * (ends[widest] + ends[widest + 1]))
    if all(b - a >= gap * (1 - 1e-9) for a, b in pairwise([low, *values, high])):
        return values
    for i in range(count):
        values[i] = max(values[i], low + (i + 1) * gap, values[i - 1] + gap if i else low)
    for i in range(count - 1, -1, -1):
        values[i] = min(
            values[i], high - (count - i) * gap, values[i + 1] - gap if i + 1 < count else high
        )
    return values


def sample(domain: OdeDomain, rng: np.random.Generator) -> OdeSchedule:
    """A random member.

    Choices are drawn with their shares (`space.choices`), numbers uniformly in their bounds, and
    the inner times uniformly among all increasing sequences in lam that keep the gaps.
    """
    values: dict[str, Any] = {
        p.name: propose(p, rng) for p in domain.parameters if split(p.name)[0] != "lam"
    }
    count = domain.steps_of(values) - 1
    low, high = (
        values.get("lam_start", domain.lam_range[0]),
        values.get("lam_end", domain.lam_range[1]),
    )
    slack = high - low - (count + 1) * domain.min_gap
    inner = low + domain.min_gap * np.arange(1, count + 1) + np.sort(rng.uniform(0, slack, count))
    return domain.from_params(values | {f"lam_{i + 1}": float(v) for i, v in enumerate(inner)})


def propose(p: Parameter, rng: np.random.Generator) -> Value:
    """A fresh value of a parameter."""
    if p.kind == "float":
        return float(p.low + (p.high - p.low) * rng.random())
    options, cumulative = _shares(p)
    return options[bisect.bisect(cumulative, rng.random() * cumulative[-1])]


@cache
def _shares(p: Parameter) -> tuple[tuple[Value, ...], list[float]]:
    """The options of a choice and the running sum of their shares."""
    return p.options, list(itertools.accumulate(p.shares or (1.0,) * len(p.options)))


def mutate(
    domain: OdeDomain,
    schedule: OdeSchedule,
    rng: np.random.Generator,
    *,
    rates: Mapping[str, float] | None = None,
    scale: float = 0.05,
) -> OdeSchedule:
    """A changed copy of a member.

    Args:
        domain: the search space.
        schedule: a member.
        rng: source of randomness.
        rates: probabilities by decision, "lam" and "relocate"; those not named are `RATES`, else
            `RATE`.
        scale: standard deviation of a time's move, as a share of the range of lam; other numbers
            move by the same share of theirs, the linear coefficient by `COEFFICIENT_STEP`.

    Returns:
        A member that differs in at least one parameter.
    """
    rates = RATES | dict(rates or {})
    known = {p.name: p for p in domain.parameters}
    original = domain.params(schedule)
    low, high = domain.lam_range
    for _ in range(20):
        values: dict[str, Any] = dict(original)
        for name, p in known.items():
            stem, index = split(name)
            if index >= schedule.n_steps or rng.random() >= rates.get(stem, RATE):
                continue
            if stem == "lam":
                if name in values:
                    values[name] += rng.normal(0, scale * (high - low))
            elif p.kind == "float" and name in values:
                step = COEFFICIENT_STEP if stem == "coefficient" else scale * (p.high - p.low)
                values[name] = min(max(values[name] + rng.normal(0, step), p.low), p.high)
            elif p.kind == "float":
                values[name] = (
                    rng.normal(0, COEFFICIENT_STEP) if stem == "coefficient" else propose(p, rng)
                )
            else:
                values[name] = propose(p, rng)
        if schedule.n_steps > 1 and rng.random() < rates["relocate"]:
            values[f"lam_{rng.integers(1, schedule.n_steps)}"] = rng.uniform(low, high)
        child = domain.from_params(values)
        if domain.params(child) != original:
            return child
    return domain.sample(rng)  # a space with next to nothing open


def moved_times(
    domain: OdeDomain,
    lam: Sequence[float],
    others: Sequence[np.ndarray],
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Up to `count` vectors of N+1 lam around one, itself the first; all keep the gaps.

    Gaussian steps of log-uniform size, or steps along a difference of two of `others`, times of
    good members (differential evolution).
    """
    low, high = domain.lam_range
    free = slice(0 if domain.start_band else 1, len(lam) - (0 if domain.end_band else 1))
    same = [other for other in others if len(other) == len(lam)]
    out = np.tile(np.array(lam), (count, 1))
    for row in out[1:]:
        v = row[free]
        if rng.random() < 0.6 or len(same) < 3:
            touched = rng.random(len(v)) < rng.choice([0.3, 1.0])
            v += touched * rng.normal(0, (high - low) * 10 ** rng.uniform(-3, -1.2), len(v))
        else:
            a, b = rng.integers(len(same), size=2)
            v += rng.uniform(0.2, 1.0) * (same[a][free] - same[b][free])  # ends may be infinite
            v += rng.normal(0, 1e-3 * (high - low), len(v))
    out[:, free].sort(axis=1)
    inside = (np.diff(out, axis=1) >= domain.min_gap).all(1)
    for band, column, bounds in (
        (domain.start_band, 0, domain.start_lam),
        (domain.end_band, -1, domain.end_lam),
    ):
        if band is not None:
            inside &= (out[:, column] >= bounds[0]) & (out[:, column] <= bounds[1])
    moved: np.ndarray = out[inside]
    return moved


def crossover(
    domain: OdeDomain, a: OdeSchedule, b: OdeSchedule, rng: np.random.Generator
) -> OdeSchedule:
    """A child of two members, as released: each key from one parent, then swaps.

    With probability 1/2, steps swap formulation and derivative, each with probability 1/2.
    Order, slope, relaxation and its coefficient are one key. Times come from one parent whole;
    where the child's correctors make it longer or shorter than that parent, times are added or
    thinned in the widest or narrowest gaps.
    """
    parents = (domain.params(a), domain.params(b))
    rows = table(domain.choices)

    def key(name: str) -> str:
        stem, _ = split(name)
        return rows[stem].key if stem in rows else stem

    keys = sorted({key(name) for p in parents for name in p})
    source = {k: int(rng.integers(2)) for k in keys}
    swapping = rng.random() < 0.5
    swapped = [swapping and rng.random() < 0.5 for _ in range(domain.max_steps)]
    child: dict[str, Value] = {}
    for which, values in enumerate(parents):
        for name, value in values.items():
            k, (_, index) = key(name), split(name)
            flip = index >= 0 and k in ("order", "formulation") and swapped[index]
            if (source[k] ^ flip) == which:
                child[name] = value
    return domain.from_params(child)


def neighbours(
    domain: OdeDomain, schedule: OdeSchedule, *, step: float = 0.02
) -> list[OdeSchedule]:
    """Members one decision away from a member, each once.

    Every other choice, and every number moved by +-`step` of its range.
    """
    here = domain.params(schedule)
    seen = [here]
    found: list[OdeSchedule] = []
    for p in domain.parameters:
        if p.name not in here:
            continue
        for value in _others(p, here[p.name], step):
            member = domain.from_params(here | {p.name: value})
            values = domain.params(member)
            if values not in seen:
                seen.append(values)
                found.append(member)
    return found


def _others(p: Parameter, value: Value, step: float) -> Iterator[Value]:
    if p.kind == "choice":
        yield from (c for c in p.choices if c != value)
        return
    width = 1.0 if p.kind == "int" else step * (p.high - p.low)
    for sign in (-1.0, 1.0):
        moved = float(value) + sign * width
        if p.low <= moved <= p.high:
            yield int(moved) if p.kind == "int" else moved


def adopt(domain: OdeDomain, schedule: OdeSchedule) -> list[OdeSchedule]:
    """Members made from a schedule of the same noise and any NFE.

    One call fewer: every way of deleting a step; one more: every gap of times halved, the new step
    a copy of the one it halves. Further apart, the narrowest (widest) gaps are deleted (halved)
    first and the last change is tried everywhere.

    Returns:
        Distinct members, none if the noise schedule is another.
    """
    if not isinstance(schedule, OdeSchedule) or schedule.noise != domain.noise:
        return []
    if schedule.nfe == domain.nfe:
        member = domain.contains(schedule) is None
        return [
            domain.canonical(schedule)
            if member
            else domain.from_params(_raw(domain, schedule.times, schedule.steps, schedule.first))
        ]
    lam = np.clip(domain.lam(schedule.times), *domain.lam_range).tolist()
    steps = list(schedule.steps)
    while abs(domain.nfe - _calls(steps, schedule.first)) > 1 and len(steps) > 1:
        more = domain.nfe > _calls(steps, schedule.first)
        at = (
            int(np.argmax(np.diff(lam)))
            if more
            else int(np.argmin(np.array(lam[2:]) - np.array(lam[:-2])))
        )
        lam, steps = (_insert if more else _delete)(lam, steps, at)
    more = domain.nfe > _calls(steps, schedule.first)
    variants = [
        (_insert if more else _delete)(lam, steps, at)
        for at in range(len(steps) if more else len(steps) - 1)
    ] or [(lam, steps)]
    found: list[OdeSchedule] = []
    for new_lam, new_steps in variants:
        member_values = domain.from_params(
            _raw(domain, domain.time(new_lam), new_steps, schedule.first)
        )
        if member_values not in found:
            found.append(member_values)
    return found


def _calls(steps: Sequence[Any], first: str) -> int:
    return len(steps) + sum(1 for s in steps if s.corrector == "reeval") - (first != "network")


def _insert(lam: list[float], steps: list[Any], at: int) -> tuple[list[float], list[Any]]:
    middle = 0.5 * (lam[at] + lam[at + 1])
    return [*lam[: at + 1], middle, *lam[at + 1 :]], [*steps[: at + 1], *steps[at:]]


def _delete(lam: list[float], steps: list[Any], at: int) -> tuple[list[float], list[Any]]:
    """Without the inner time at + 1 and the step that lands on it."""
    return [*lam[: at + 1], *lam[at + 2 :]], [*steps[:at], *steps[at + 1 :]]


def _raw(
    domain: OdeDomain, times: Sequence[float], steps: Sequence[Any], first: str
) -> dict[str, Any]:
    """Parameters of steps that need not be a member's; `from_params` settles them."""
    lam = np.clip(domain.lam(times), *domain.lam_range)
    values: dict[str, Any] = {"first": first, "lam_start": lam[0], "lam_end": lam[-1]}
    values |= {f"lam_{i}": float(lam[i]) for i in range(1, len(steps))}
    for i, step in enumerate(steps):
        values |= {
            f"{name}_{i}": value for name, value in step_values(step).items() if value is not None
        }
    return values
