"""A schedule replayed call by call, for hosts that own the loop (pipelines, other samplers).

`Replay` holds the state between calls: the host asks its network and hands the data prediction in.
The rows are advanced as `samplers.ode` does, so that all replays agree to the last bit.

A run may start in the middle (image to image): at the first call of a step, whose state has the
level that `state_levels` says. Steps of multi-call solvers are not cut; a file with only a program
has no steps, and starts at any call by folding (`ProgramSchedule.tail`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.ode import advance_row, rows_of, threshold
from fewstep.space.coefficients import TABLEAUS
from fewstep.space.errors import ScheduleError
from fewstep.space.files import load_schedule
from fewstep.space.program import Program, ProgramSchedule
from fewstep.space.schedule import OdeSchedule

Replayed = OdeSchedule | ProgramSchedule


def step_starts(schedule: OdeSchedule) -> dict[int, int]:
    """{index of a network call that begins a step: index of that step}.

    Call 0 is the start of the schedule, also where its first step makes no call.
    """
    starts, call = {0: 0}, 0
    for i, step in enumerate(schedule.steps):
        if call > 0:
            starts[call] = i
        call += 1 if i > 0 or schedule.first == "network" else 0
        call += 0 if step.tableau is None else len(TABLEAUS[step.tableau].c) - 1
        call += step.corrector == "reeval"
    return starts


def from_call(schedule: Replayed, call: int) -> Replayed:
    """The schedule from network call `call` on.

    Raises:
        ScheduleError: no such call, or one inside a step that makes several.
    """
    if not 0 <= call < schedule.nfe:
        raise ScheduleError(
            f"a start at call {call} of {schedule.nfe}: image-to-image strength is too low for "
            "this schedule; use more"
        )
    if call == 0:
        return schedule
    if isinstance(schedule, ProgramSchedule):
        return schedule.tail(call)
    starts = step_starts(schedule)
    if call not in starts:
        told = ", ".join(f"{c} (strength {1 - c / schedule.nfe:.3g})" for c in sorted(starts))
        raise ScheduleError(
            f"call {call} lies inside a step of this solver, which makes several calls a step: "
            f"start at one of calls {told}"
        )
    return schedule.tail(starts[call])


def state_levels(schedule: Replayed) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the state at every call and of the sample, shapes (C + 1,), float64.

    At the first call of a step that is the level of the step's time, whatever time the network is
    told; at a later stage of a step, and in a file with only a program, that of the query.
    """
    program, noise = schedule.program, schedule.noise
    t = torch.cat([program.t, torch.tensor([schedule.end], dtype=torch.float64)])
    if isinstance(schedule, OdeSchedule):
        for call, step in step_starts(schedule).items():
            if step > 0 or schedule.first == "network":
                t[call] = schedule.times[step]
    return noise.alpha(t), noise.sigma(t)


class Replay:
    """One run of a schedule.

    Args:
        schedule: what to run, from its first call on.
        x_T: the start state, shape (B, *shape); kept in at least float32.

    Attributes:
        call: index of the next network call, 0..nfe.
        state: the state now; the sample after the last call.
    """

    def __init__(self, schedule: Replayed, x_T: Tensor) -> None:
        self.schedule = schedule
        self.program: Program = schedule.program
        self.call = 0
        self._rows = rows_of(self.program)
        dtype = torch.promote_types(x_T.dtype, torch.float32)
        self._x_T = x_T.to(dtype, copy=True) if any(self._rows["e"]) else x_T.to(dtype)
        self._m = constant_of(schedule, self._x_T) if any(self._rows["k"]) else None
        self._history: list[Tensor] = []
        self.state = started(schedule, self._x_T)

    def edited(self, state: Tensor) -> None:
        """Take over a host's state where it changed it, such as inpainting does.

        In a lower precision than ours, only what differs from our state is taken, so that nothing
        else is rounded.
        """
        if state.dtype == self.state.dtype:
            self.state = state
            return
        same = state == self.state.to(state.dtype)
        self.state = torch.where(same, self.state, state.to(self.state.dtype))

    def noisy(self) -> bool:
        """Whether the next row adds fresh noise."""
        return bool(self._rows["g"][self.call] != 0.0)

    def advance(self, D: Tensor, fresh: Tensor | None = None) -> Tensor:
        """The state after one call.

        Args:
            D: the network's data prediction at `state`, at the call's query time.
            fresh: unit noise where `noisy()`.
        """
        if "threshold" in self.schedule.options:
            D = threshold(D, **self.schedule.options["threshold"])
        self._history.append(D)
        now = advance_row(
            self._rows, self.call, self.state, self._x_T, self._m, self._history, fresh
        )
        self.call, self.state = self.call + 1, now
        return now

    @property
    def done(self) -> bool:
        """Whether the last call was made."""
        return self.call >= self.program.nfe


def started(schedule: Replayed, x_T: Tensor) -> Tensor:
    """p_0 x_T + k_0 m: x_T itself unless the schedule has an analytical first step."""
    p, k = schedule.program.init.tolist()
    if (p, k) == (1.0, 0.0):
        return x_T
    y: Tensor = p * x_T
    return y if k == 0.0 else y + k * constant_of(schedule, y)


def constant_of(schedule: Replayed, like: Tensor) -> Tensor:
    """The schedule's constant image in the dtype and device of `like`.

    Raises:
        ScheduleError: the schedule was loaded without it.
    """
    if schedule.constant is None:
        raise ScheduleError(
            "the schedule starts from a constant image: load it from its file, with the "
            ".safetensors beside it, or give constants"
        )
    return schedule.constant.to(like)


def load_replayed(schedule: Any, constants: list[Any] | None) -> list[Replayed]:
    """Schedules for a diffusers pipeline, of different numbers of calls.

    Args:
        schedule: a file's path, its parsed JSON, or a list of these.
        constants: for each its constant image as nested lists, or None.

    Raises:
        ScheduleError: a file that cannot be read or does not run in a pipeline, equal calls.
    """
    if schedule is None:
        raise ScheduleError("schedule is missing: give a schedule file, as schedule='nfe05.json'")
    files = schedule if isinstance(schedule, list) else [schedule]
    images = constants or [None] * len(files)
    if not files or len(images) != len(files):
        raise ScheduleError(f"{len(images)} constants for {len(files)} schedules")
    loaded = [_load(f, image) for f, image in zip(files, images, strict=True)]
    for i, one in enumerate(loaded):
        if one.nfe in [other.nfe for other in loaded[:i]]:
            raise ScheduleError(f"two schedules have {one.nfe} calls: keep one of them")
    return loaded


def _load(source: str | os.PathLike[str] | Mapping[str, Any], image: object) -> Replayed:
    data = json.loads(json.dumps(source)) if isinstance(source, Mapping) else source
    schedule = load_schedule(data)
    if image is not None and isinstance(schedule, OdeSchedule):
        schedule = schedule.with_constant(torch.tensor(image, dtype=torch.float32))
    if not isinstance(schedule, OdeSchedule | ProgramSchedule):
        raise ScheduleError(
            f"kind {schedule.kind!r} does not run in a diffusers pipeline: use kind ode"
        )
    return schedule
