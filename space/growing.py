"""More calls, the same samples: calls added to a schedule with weight 0.

A step that takes the state from s to t with a mix F of outputs is two steps with the same F, from
s to a level u between and from u to t, since

    Psi(s -> t; F) = Psi(u -> t; F) Psi(s -> u; F)

for every formulation: F counts as constant within a step. The network is asked at u as well, and
its answer gets weight 0 there and in all later steps. What was fitted stays as it is, and a fit
that starts from here has only to find what the new call is good for.
"""

from __future__ import annotations

import torch

from fewstep.space.coefficients import first, step_weights
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule, finite_lam
from fewstep.space.schedule import OdeSchedule, StepSpec
from fewstep.space.solve import Choices

__all__ = ["grown"]


def grown(schedule: OdeSchedule, nfe: int) -> OdeSchedule:
    """A schedule of `nfe` calls that gives the samples of one of fewer calls.

    A call is added between the two middle queries, in the middle of their lam, several are spread
    evenly among all: where queries are as good as they can be, the others then have least to move.

    Args:
        schedule: plain steps, whatever their order, basis, shifts and extra weights.
        nfe: network calls of the result, at least as many as the schedule's.

    Returns:
        The schedule with its orders written out as extra weights; itself if nothing is to add.

    Raises:
        ScheduleError: fewer calls than the schedule has, the time shift as an option, or a step
            that does more than mix outputs (a corrector, a tableau, compensation, a start further
            back, fresh noise).
    """
    if nfe < schedule.nfe:
        raise ScheduleError(f"grown: the schedule makes {schedule.nfe} calls, more than {nfe}")
    if nfe > schedule.nfe and "time_shift" in schedule.options:
        raise ScheduleError(
            "grown: options.time_shift moves levels while sampling, so that no call can be added "
            "without changing the samples"
        )
    more, gaps = nfe - schedule.nfe, max(1, schedule.n_steps - 1)
    if more:
        schedule = _written_out(schedule)
    for k in reversed(range(more)):
        schedule = _one_more(schedule, int((k + 0.5) * gaps / more))
    return schedule


def _written_out(schedule: OdeSchedule) -> OdeSchedule:
    """Every step of order 1, its older outputs in the extra weights; the same program."""
    choices, steps = Choices(schedule, {}), []
    network = schedule.first == "network"
    levels = [
        choices.level(i, step.dt_start if i or network else 0.0)
        for i, step in enumerate(schedule.steps)
    ]
    for i, step in enumerate(schedule.steps):
        _splittable(i, step)
        land, rule = choices.level(i + 1, step.dt_land), choices.rule(i)
        others = [levels[i - k] for k in range(1, step.order)]
        used = step_weights(rule, schedule.noise, levels[i], others, land, implicit=False)
        older = [0.0] * i
        total = first(step.formulation, levels[i], land)
        for k, weight in enumerate(used[1:]):
            older[k] += float(weight / total)
        for k, extra in enumerate(step.weights):
            older[k] += extra
        steps.append(
            step.model_copy(
                update={
                    "order": 1,
                    "slope_points": None,
                    "relaxation": "none",
                    "relaxation_coefficient": 0.0,
                    "weights": tuple(older),
                }
            )
        )
    return schedule.model_copy(update={"steps": tuple(steps)})


def _splittable(i: int, step: StepSpec) -> None:
    for name, neutral in (
        ("corrector", "none"),
        ("tableau", None),
        ("compensation", 1.0),
        ("start", 0),
        ("eta", 0.0),
    ):
        value = getattr(step, name)
        if value != neutral:
            raise ScheduleError(
                f"step {i}: {name} {value} does more than mix outputs, so that no call can be "
                "added without changing the samples"
            )


def _one_more(schedule: OdeSchedule, at: int) -> OdeSchedule:
    """One call more, between queries `at` and `at` + 1; of a single query, after it."""
    noise, times, steps = schedule.noise, list(schedule.times), list(schedule.steps)
    asked = [t + step.dt_query for t, step in zip(times, steps, strict=False)] + times[-1:]
    time, query = (_middle(noise, *ends[at : at + 2]) for ends in (times, asked))
    whole = steps[at]
    before = whole.model_copy(update={"dt_land": 0.0})
    after = StepSpec(
        formulation=whole.formulation,
        basis=whole.basis,
        power=whole.power,
        weights=(1 - sum(whole.weights), *whole.weights),
        dt_query=query - time,
        dt_land=whole.dt_land,
        guidance=whole.guidance,
    )
    later = [
        step.model_copy(update={"weights": (*step.weights[:k], 0.0, *step.weights[k:])})
        for k, step in enumerate(steps[at + 1 :])
    ]
    return schedule.model_copy(
        update={
            "times": (*times[: at + 1], time, *times[at + 1 :]),
            "steps": (*steps[:at], before, after, *later),
        }
    )


def _middle(noise: NoiseSchedule, a: float, b: float) -> float:
    ends = finite_lam(noise, torch.tensor([a, b], dtype=torch.float64))
    return float(noise.t_of_lam(ends.mean()))
