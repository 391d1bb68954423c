"""More calls, the same samples: calls added to a schedule with weight 0.

In a program the new call is asked at a mix of the states around it,

    y' = A y_i + B y_{i+1},    A alpha_i + B alpha_{i+1} = alpha',
                               A sigma_i + B sigma_{i+1} = sigma'

which for first-order steps is where the trajectory passes the new level. With row i written as
y_{i+1} = r y_i + f, f the part without the state, the two rows

    y' = (A + B r) y_i + B f,     y_{i+1} = r / (A + B r) y' + A / (A + B r) f

give y_{i+1} again. The new output gets weight 0 in all later rows. What was fitted stays as it
is, and a fit that starts from here has only to find what the new call is good for.

A call may also be given company: queries beside it, a stage (`widened`). They are asked ahead of
it at states that older outputs already say, and share its weights, half and half: the samples stay
nearly, and a fit has both to move. From weight 0 it would leave them idle.

In steps the same is two steps with the same mix F of outputs, from s to a level u between and from
u to t, since Psi(s -> t; F) = Psi(u -> t; F) Psi(s -> u; F) for every formulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from fewstep.space.coefficients import first, step_weights
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule, finite_lam
from fewstep.space.program import Program, ProgramSchedule, at_times, written_out
from fewstep.space.schedule import OdeSchedule, StepSpec
from fewstep.space.solve import Choices

__all__ = ["grown", "widened"]


@overload
def grown(schedule: OdeSchedule, nfe: int) -> OdeSchedule: ...
@overload
def grown(schedule: ProgramSchedule, nfe: int) -> ProgramSchedule: ...
def grown(schedule: OdeSchedule | ProgramSchedule, nfe: int) -> OdeSchedule | ProgramSchedule:
    """A schedule of `nfe` calls that gives the samples of one of fewer calls.

    A call is added between the two middle queries, in the middle of their lam, several are spread
    evenly among all: where queries are as good as they can be, the others then have least to move.

    Args:
        schedule: any program, or plain steps, whatever their order, basis, shifts and extra
            weights. `ProgramSchedule.of` makes a program of any other steps.
        nfe: network calls of the result, at least as many as the schedule's.

    Returns:
        The schedule with its orders written out as extra weights; itself if nothing is to add.

    Raises:
        ScheduleError: fewer calls than the schedule has, the time shift as an option, fresh noise,
            or a step that does more than mix outputs (a corrector, a tableau, compensation, a
            start further back).
    """
    if nfe < schedule.nfe:
        raise ScheduleError(f"grown: the schedule makes {schedule.nfe} calls, more than {nfe}")
    if nfe > schedule.nfe and "time_shift" in schedule.options:
        raise ScheduleError(
            "grown: options.time_shift moves levels while sampling, so that no call can be added "
            "without changing the samples"
        )
    more = nfe - schedule.nfe
    if more == 0:
        return schedule
    if isinstance(schedule, ProgramSchedule):
        if schedule.program.stochastic:
            raise ScheduleError("grown: the program adds fresh noise: no call can be added")
        program = schedule.program
        for at in _gaps(more, program.nfe):
            program = _one_more_call(program, schedule.noise, at, schedule.end)
        return schedule.model_copy(update={"program": program})
    schedule = _written_out(schedule)
    for at in _gaps(more, schedule.n_steps):
        schedule = _one_more(schedule, at)
    return schedule


def _gaps(more: int, points: int) -> list[int]:
    """Where to add `more` points among `points`: the gaps after these, the last one first."""
    gaps = max(1, points - 1)
    return [int((k + 0.5) * gaps / more) for k in reversed(range(more))]


def _one_more_call(program: Program, noise: NoiseSchedule, at: int, end: float) -> Program:
    """One call more, between calls `at` and `at` + 1; of a single call, between it and the end."""
    ends = torch.tensor([*program.t.tolist(), end], dtype=torch.float64)[at : at + 2]
    between = noise.t_of_lam(finite_lam(noise, ends).mean())
    (alpha, alpha_next), (sigma, sigma_next) = noise.alpha(ends), noise.sigma(ends)
    whole = alpha * sigma_next - alpha_next * sigma
    a, b = torch.zeros_like(whole), torch.ones_like(whole)  # both calls at one level: y' = y_{i+1}
    if bool(whole != 0):
        a = (noise.alpha(between) * sigma_next - alpha_next * noise.sigma(between)) / whole
        b = (alpha * noise.sigma(between) - noise.alpha(between) * sigma) / whole
    r = program.r[at]
    kept = a + b * r
    share = torch.ones_like(kept) if bool(r == 0) else a / kept

    def rows(old: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return torch.cat([old[:at], before[None], after[None], old[at + 1 :]])

    def split(old: Tensor) -> Tensor:
        return rows(old, b * old[at], share * old[at])

    mixes = split(program.b)
    unused = torch.zeros_like(mixes[:, :1])
    grown = Program(
        t=rows(program.t, program.t[at], between),
        label=program.label,
        alpha=program.alpha,
        sigma=program.sigma,
        init=program.init,
        r=rows(program.r, kept, torch.zeros_like(r) if bool(r == 0) else r / kept),
        e=split(program.e),
        k=split(program.k),
        b=torch.cat([mixes[:, : at + 1], unused, mixes[:, at + 1 :]], dim=1),
        g=split(program.g),
        guidance=None
        if program.guidance is None
        else rows(program.guidance, program.guidance[at], program.guidance[at]),
        network=program.network and (*program.network[: at + 1], *program.network[at:]),
    )
    return at_times(grown, noise, grown.t)


AHEAD = 1 / 3
"""How far ahead of a call the furthest query beside it is asked, in steps."""


def widened(schedule: ProgramSchedule, widths: Sequence[int]) -> ProgramSchedule:
    """A program whose call c is a stage of `widths[c]` queries.

    Further queries are `AHEAD` of a step apart in lam; their states are a first-order step from
    the call's with the newest output before it. The first has half of the call's weight in every
    row, the others share the rest.

    Args:
        schedule: a program without fresh noise.
        widths: queries of each stage, at least 1.

    Raises:
        ScheduleError: another number of widths than calls, a width below 1, or fresh noise.
    """
    program, noise = schedule.program, schedule.noise
    if len(widths) != program.nfe or min(widths) < 1:
        raise ScheduleError(f"widened: {list(widths)} are no widths of {program.nfe} calls")
    if program.stochastic:
        raise ScheduleError("widened: the program adds fresh noise: no call can be added")
    if max(widths) == 1:
        return schedule
    spread = _spread(widths)
    p, rest, _ = written_out(program)
    image, outputs = rest[:, :1], rest[:, 1:] @ spread
    ends = torch.tensor([*program.t.tolist(), schedule.end], dtype=torch.float64)
    lam = finite_lam(noise, ends)
    times, states, source = list[Tensor](), list[Tensor](), list[int]()
    for c, width in enumerate(widths):
        here = torch.cat([p[c : c + 1], image[c], outputs[c]])
        for i in range(width):
            ahead = AHEAD * i / max(width - 1, 1)
            t = program.t[c] if i == 0 else noise.t_of_lam(lam[c] + ahead * (lam[c + 1] - lam[c]))
            keep = noise.sigma(t) / program.sigma[c]
            state = keep * here
            newest = torch.cat([state.new_zeros(2), spread[c - 1]]) if c else _image_of(here)
            times.append(t)
            states.append(state + (noise.alpha(t) - program.alpha[c] * keep) * newest)
            source.append(c)
    states.append(torch.cat([p[-1:], image[-1], outputs[-1]]))
    rows = torch.stack(states)
    zero = torch.zeros(len(source), dtype=torch.float64)
    wide = replace(
        program,
        init=rows[0, :2],
        r=zero,
        e=rows[1:, 0],
        k=rows[1:, 1] if program.uses_constant else zero,
        b=rows[1:, 2:],
        g=zero,
        guidance=None if program.guidance is None else program.guidance[source],
        network=program.network and tuple(program.network[c] for c in source),
    )
    return schedule.model_copy(update={"program": at_times(wide, noise, torch.stack(times))})


def _spread(widths: Sequence[int]) -> Tensor:
    """The share that each query has of the output of each call, (C, queries)."""
    shares = torch.zeros(len(widths), sum(widths), dtype=torch.float64)
    at = 0
    for c, width in enumerate(widths):
        shares[c, at] = 1.0 if width == 1 else 0.5
        shares[c, at + 1 : at + width] = 0.5 / max(width - 1, 1)
        at += width
    return shares


def _image_of(state: Tensor) -> Tensor:
    """The constant image alone, in the form of a state."""
    found = torch.zeros_like(state)
    found[1] = 1.0
    return found


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
