"""Which decisions of a schedule matter: each one set to neutral alone, and scored again.

A decision is a field of a step that is not neutral, an inner time, or an analytical first step.
Its swap is the same schedule with that one thing neutral (an inner time at the middle, in lam, of
its neighbours) and as many network calls: a call that a decision frees is spent on a further time
halfway, one that it costs is saved by leaving a time out. Both schedules are scored on the same
samples; a decision matters as far as the ratio of their scores is away from 1. Decisions interact,
so the ratios of several do not multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fewstep.experiments.cli.rescore import Rescored
from fewstep.space.domain import LAM_CEILING, LAM_FLOOR
from fewstep.space.errors import ScheduleError
from fewstep.space.schedule import OdeSchedule, StepSpec

_PLAIN = StepSpec()
_WITH = ("relaxation_coefficient",)  # a number of another decision
DECISIONS = ("first", "time", *(name for name in StepSpec.model_fields if name not in _WITH))
"""Every decision, in the order of the tables."""

_UNCORRECTED = {n: getattr(_PLAIN, n) for n in StepSpec.model_fields if n.startswith("corrector")}
_UNSCALED: dict[str, Any] = {"relaxation": "none", "relaxation_coefficient": 0.0}


@dataclass(frozen=True)
class Swap:
    """One decision set to neutral.

    Args:
        step: the step it belongs to; a time belongs to the step that begins there.
        decision: one of `DECISIONS`.
        was: its value, in words.
        schedule: the schedule without it; None where it has no neutral value here.
        note: what else had to change, or why there is no schedule.
    """

    step: int
    decision: str
    was: str
    schedule: OdeSchedule | None
    note: str = ""


@dataclass(frozen=True)
class Effect:
    """What a schedule's score does without one decision.

    Args:
        step: see `Swap`.
        decision: see `Swap`.
        was: see `Swap`.
        note: see `Swap`.
        ratio: score without it / score with it; inf if nothing finite comes out without it, None
            if it was not swapped.
        interval: 95% paired bootstrap interval of the ratio.
    """

    step: int
    decision: str
    was: str
    note: str = ""
    ratio: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.interval is not None and not self.interval[0] <= 1 <= self.interval[1]


def swaps(schedule: OdeSchedule) -> list[Swap]:
    """Every decision of a schedule that does something, each set to neutral alone.

    Decisions without effect on the program (the basis of an order-1 step) are left out.
    """
    found = []
    if schedule.first != "network":
        make, note = partial(_called, schedule), "a call more here, a time or corrector less"
        found.append(_swap(schedule, 0, "first", schedule.first, make, note))
    for i, step in enumerate(schedule.steps):
        if i > 0:
            t = f"{schedule.times[i]:.4g}"
            found.append(_swap(schedule, i, "time", t, partial(_halfway, schedule, i)))
        for decision, was, changes in _neutral(step):
            make, note = partial(_changed, schedule, {i: changes}), ""
            if decision == "corrector" and step.corrector == "reeval":
                make, note = partial(_split, schedule, i, changes), "its call spent halfway"
            found.append(_swap(schedule, i, decision, was, make, note))
    return [s for s in found if s.schedule is None or not _same(s.schedule, schedule)]


def _same(a: OdeSchedule, b: OdeSchedule) -> bool:
    """Whether two schedules are one sampler, to rounding."""
    try:
        a.program.require_equal(b.program)
    except ScheduleError:
        return False
    return True


def _swap(
    schedule: OdeSchedule,
    step: int,
    decision: str,
    was: str,
    make: Callable[[], OdeSchedule],
    note: str = "",
) -> Swap:
    try:
        made = make()
        made.program  # noqa: B018
    except ScheduleError as error:
        return Swap(step, decision, was, None, str(error))
    if made.nfe != schedule.nfe:
        return Swap(step, decision, was, None, f"{made.nfe} calls without it")
    return Swap(step, decision, was, made, note)


def _neutral(step: StepSpec) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(decision, its value, the fields without it) of a step."""
    corrects = step.corrector != "none"
    if step.order > 1:
        kept = step.points_corrector if corrects else None
        changes: dict[str, Any] = {"order": 1, "slope_points": None, "corrector_order": kept}
        yield "order", str(step.order), changes | _UNSCALED
    if step.formulation != "data":
        yield "formulation", step.formulation, {"formulation": "data"}
    if step.basis != "lam":  # what acts in lam only must not begin to act
        changes = {"basis": "lam", "power": 1.0, "corrector_relaxation": "none"}
        slopes = {"slope_points": None, "corrector_slope_points": None}
        yield "basis", step.basis, changes | slopes | _UNSCALED
    if step.relaxation != "none":
        c = f" {step.relaxation_coefficient:.3g}" if step.relaxation == "linear" else ""
        yield "relaxation", step.relaxation + c, _UNSCALED
    if corrects:
        yield "corrector", step.corrector, _UNCORRECTED
    for name in DECISIONS[DECISIONS.index("power") :]:
        if name in ("order", "relaxation", "corrector"):
            continue
        value, neutral = getattr(step, name), getattr(_PLAIN, name)
        if value != neutral:
            yield name, _words(value), {name: neutral}


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{v:.3g}" for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _changed(
    schedule: OdeSchedule, changes: dict[int, dict[str, Any]], times: Sequence[float] = ()
) -> OdeSchedule:
    steps = tuple(
        step.model_copy(update=changes[i]) if i in changes else step
        for i, step in enumerate(schedule.steps)
    )
    return schedule.model_copy(update={"steps": steps, "times": tuple(times or schedule.times)})


def _middle(schedule: OdeSchedule, a: int, b: int) -> float:
    """The time halfway, in lam, between times a and b."""
    lam = schedule.noise.lam(torch.tensor([schedule.times[a], schedule.times[b]]).double())
    middle = lam.clamp(LAM_FLOOR, LAM_CEILING).mean()
    return float(schedule.noise.t_of_lam(middle))


def _halfway(schedule: OdeSchedule, i: int) -> OdeSchedule:
    """Inner time i in the middle of its neighbours; shifts there keep their size in lam."""
    times = list(schedule.times)
    times[i] = _middle(schedule, i - 1, i + 1)
    ends = torch.tensor([schedule.times[i], times[i]], dtype=torch.float64)
    if bool(schedule.noise.lam(ends).diff().abs() < 1e-6):
        return schedule  # there already, to the rounding of the inverse
    changes: dict[int, dict[str, Any]] = {}
    for k, name in ((i, "dt_query"), (i, "dt_start"), (i - 1, "dt_land")):
        dt = getattr(schedule.steps[k], name)
        if dt == 0.0:
            continue
        lam = schedule.noise.lam(torch.cat([ends, ends[:1] + dt]))
        moved = float(schedule.noise.t_of_lam(lam[1] + lam[2] - lam[0])) - times[i]
        changes.setdefault(k, {})[name] = moved if math.isfinite(moved) else dt
    return _changed(schedule, changes, times)


def _split(schedule: OdeSchedule, i: int, changes: dict[str, Any]) -> OdeSchedule:
    """Step i without its re-evaluated corrector, in two halves: as many calls."""
    step = schedule.steps[i].model_copy(update=changes)
    halves = (
        step.model_copy(update={"dt_land": 0.0}),
        step.model_copy(update={"dt_query": 0.0, "dt_start": 0.0}),
    )
    times, steps = schedule.times, schedule.steps
    update = {
        "times": (*times[: i + 1], _middle(schedule, i, i + 1), *times[i + 1 :]),
        "steps": (*steps[:i], *halves, *steps[i + 1 :]),
    }
    return schedule.model_copy(update=update)


def _called(schedule: OdeSchedule) -> OdeSchedule:
    """The first output from the network: the first inner time goes, and history shrinks by one.

    Where step 0 re-evaluates, its corrector goes instead.
    """
    if schedule.steps[0].corrector == "reeval":
        return _changed(schedule, {0: _UNCORRECTED}).model_copy(update={"first": "network"})
    steps = [
        step.with_history(i, schedule.compensation_order)
        for i, step in enumerate(schedule.steps[1:])
    ]
    steps[:1] = [s.model_copy(update={"dt_query": 0.0, "dt_start": 0.0}) for s in steps[:1]]
    times = (schedule.times[0], *schedule.times[2:])
    update = {"first": "network", "times": times, "steps": tuple(steps)}
    return schedule.model_copy(update=update)


def effects(found: Sequence[Swap], scored: Rescored, whole: int) -> list[Effect]:
    """What each swap does: the most needed decision first, those not swapped last.

    Args:
        found: the swaps of a schedule.
        scored: results: the schedule's, and after it those of the swaps that have a schedule.
        whole: the position of the schedule itself.
    """
    made, at = [], whole
    for swap in found:
        effect = Effect(swap.step, swap.decision, swap.was, swap.note)
        if swap.schedule is not None:
            at += 1
            ratio, interval, _ = scored.ratio(at, whole)
            effect = replace(effect, ratio=ratio, interval=interval)
        made.append(effect)
    return sorted(made, key=lambda e: -1.0 if e.ratio is None else e.ratio, reverse=True)
