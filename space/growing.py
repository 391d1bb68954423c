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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.space.costs import stages
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule, finite_lam
from fewstep.space.program import Program, ProgramSchedule, at_times, written_out
from fewstep.space.schedule import OdeSchedule

__all__ = ["grown", "widened", "with_calls"]


def with_calls(schedule: Any, nfe: int) -> Any:
    """A schedule of any kind that gives the same samples in `nfe` calls; None if there is none."""
    if getattr(schedule, "first", None) == "mean" and schedule.constant is None:
        return None
    if isinstance(schedule, OdeSchedule | ProgramSchedule) and schedule.nfe < nfe:
        try:
            return grown(schedule, nfe)
        except ScheduleError:
            return None
    return schedule if schedule.nfe == nfe else None


def grown(schedule: OdeSchedule | ProgramSchedule, nfe: int) -> OdeSchedule | ProgramSchedule:
    """A schedule of `nfe` calls that gives the samples of one of fewer calls.

    A call is added between the two middle queries, in the middle of their lam, several are spread
    evenly among all: where queries are as good as they can be, the others then have least to move.

    Args:
        schedule: any without fresh noise.
        nfe: network calls of the result, at least as many as the schedule's.

    Returns:
        The program with the calls; the schedule itself if nothing is to add.

    Raises:
        ScheduleError: fewer calls than the schedule has, the time shift as an option, fresh noise.
    """
    if nfe < schedule.nfe:
        raise ScheduleError(f"grown: the schedule makes {schedule.nfe} calls, more than {nfe}")
    if nfe == schedule.nfe:
        return schedule
    if "time_shift" in schedule.options:
        raise ScheduleError(
            "grown: options.time_shift moves levels while sampling, so that no call can be added "
            "without changing the samples"
        )
    program = schedule.program
    if program.stochastic:
        raise ScheduleError("grown: the program adds fresh noise: no call can be added")
    for at in _gaps(nfe - schedule.nfe, program.nfe):
        program = _one_more_call(program, schedule.noise, at, schedule.end)
    return ProgramSchedule.of(schedule).model_copy(update={"program": program})


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
    """A program whose call c has become `widths[c]` queries of one stage.

    Further queries are `AHEAD` of a step apart in lam; their states are a first-order step from
    the call's with the newest output before its stage. The first has half of the call's weight in
    every row, the others share the rest.

    Args:
        schedule: a program without fresh noise; its stages stay, and grow.
        widths: queries for each call, at least 1.

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
    heads = [stage[0] for stage in stages(program) for _ in stage]
    times, states, source = list[Tensor](), list[Tensor](), list[int]()
    for c, width in enumerate(widths):
        here = torch.cat([p[c : c + 1], image[c], outputs[c]])
        for i in range(width):
            ahead = AHEAD * i / max(width - 1, 1)
            t = program.t[c] if i == 0 else noise.t_of_lam(lam[c] + ahead * (lam[c + 1] - lam[c]))
            keep = noise.sigma(t) / program.sigma[c]
            state = keep * here
            newest = _image_of(here)
            if heads[c]:
                newest = torch.cat([state.new_zeros(2), spread[heads[c] - 1]])
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
