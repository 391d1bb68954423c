"""The continuous decisions of a schedule as unconstrained numbers, and back.

A schedule's discrete choices stay; its numbers become a vector theta that is exactly neutral at 0:

    times         lam gaps = min_gap + (range - N min_gap) softmax(logits + theta)
    start_level   the first time at lam + theta, never above the noise schedule's first
    shifts        query / start / land at lam + theta (network, start level, landing level)
    weights       extra weights on up to `history` older outputs of every step
    compensation  1 + theta from step K on
    relaxation    coefficient + theta (order >= 2, lam basis)
    guidance      scale * exp(theta), where the schedule or the problem has one

`values(theta)` gives what `space.compile` takes, with gradients; `schedule(theta)` the ordinary
schedule that holds the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.space import Program, compile
from fewstep.space.errors import StudyError
from fewstep.space.noise import finite_lam
from fewstep.space.schedule import OdeSchedule, StepSpec

KNOBS = (
    "times",
    "start_level",
    "query",
    "start",
    "land",
    "weights",
    "compensation",
    "relaxation",
    "guidance",
)
DEFAULT = ("times", "start_level", "query", "start", "land", "weights")
_SHIFTS = {"query": "dt_query", "start": "dt_start", "land": "dt_land"}
_REACH = 2.0  # of a shift, in lam


@dataclass(frozen=True)
class Knobs:
    """Which numbers of one schedule may move.

    Args:
        schedule: the schedule to start from; theta = 0 is this schedule.
        names: a subset of `KNOBS`.
        history: older outputs that get an extra weight, per step at most.
        min_gap: smallest distance of neighbouring times, in lam; lowered where the schedule has
            smaller gaps already.
        guidance: scale to start from where "guidance" is open and the steps set none.
        reference: time whose scale the start states have that programs run on; None is the
            schedule's first.
    """

    schedule: OdeSchedule
    names: tuple[str, ...] = DEFAULT
    history: int = 16
    min_gap: float = 0.02
    guidance: float | None = None
    reference: float | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in KNOBS:
                raise StudyError(f"refine: {name!r} is not one of {', '.join(KNOBS)}")

    @cached_property
    def base(self) -> OdeSchedule:
        """The schedule with fields opened whose neutral value changes nothing."""
        steps = []
        for i, step in enumerate(self.schedule.steps):
            changes: dict[str, object] = {}
            if "weights" in self.names and step.tableau is None:
                count = min(self.history, i)
                old = step.weights[:count]
                changes["weights"] = (*old, *(0.0 for _ in range(count - len(old))))
            plain = step.relaxation in ("none", "linear") and step.order >= 2
            if "relaxation" in self.names and plain and step.basis == "lam":
                changes["relaxation"] = "linear"
            if "guidance" in self.names and step.guidance is None and self.guidance is not None:
                changes["guidance"] = self.guidance
            steps.append(step.model_copy(update=changes) if changes else step)
        return self.schedule.model_copy(update={"steps": tuple(steps)})

    @cached_property
    def _layout(self) -> list[tuple[str, int]]:
        """Names and sizes of the parts of theta."""
        n = self.schedule.n_steps
        sizes = []
        for name in self.names:
            if name == "times":
                sizes.append((name, n))
            elif name == "start_level":
                first = torch.tensor(self.schedule.times[0], dtype=torch.float64)
                if bool(torch.isfinite(self.schedule.noise.lam(first))):
                    sizes.append((name, 1))
            elif name == "weights":
                sizes.append((name, sum(len(s.weights) for s in self.base.steps)))
            elif name == "guidance" and any(s.guidance is None for s in self.base.steps):
                continue
            elif name == "compensation" and n <= self.schedule.compensation_order:
                continue
            else:
                sizes.append((name, n))
        return sizes

    @property
    def size(self) -> int:
        """Length of theta."""
        return sum(size for _, size in self._layout)

    def zeros(self) -> Tensor:
        """The neutral theta."""
        return torch.zeros(self.size, dtype=torch.float64)

    def scale(self) -> Tensor:
        """How far each number may usefully move, for step sizes: 1 for gaps, less for the rest."""
        sizes = {"times": 1.0, "weights": 0.5, "guidance": 0.3, "compensation": 0.3}
        parts = [torch.full((size,), sizes.get(name, 0.3)) for name, size in self._layout]
        return torch.cat(parts).double() if parts else self.zeros()

    def _parts(self, theta: Tensor) -> dict[str, Tensor]:
        names = [name for name, _ in self._layout]
        sizes = [size for _, size in self._layout]
        return dict(zip(names, theta.split(sizes), strict=True))

    def _times(self, gaps_by: Tensor | None, start_by: Tensor | None) -> Tensor:
        """N+1 times; the last stays exactly where it is, and the first unless it is open."""
        times = torch.tensor(self.schedule.times, dtype=torch.float64)
        if gaps_by is None and start_by is None:
            return times
        noise, n = self.schedule.noise, len(times) - 1
        lam = finite_lam(noise, times)
        gaps = lam.diff()
        least = min(self.min_gap, 0.5 * float(gaps.min()))
        begin, first = lam[0], times[0]
        if start_by is not None:
            top = noise.lam(torch.tensor(noise.t_range[0], dtype=torch.float64))
            begin = reflected(lam[0] + start_by[0], top, lam[-1] - 2 * n * least)
            moved = noise.t_of_lam(begin)
            first = torch.where(begin == lam[0], moved - moved.detach() + times[0], moved)
        total = lam[-1] - begin - least * n
        logits = torch.log(gaps - least)
        share = torch.softmax(logits if gaps_by is None else logits + gaps_by, dim=0)
        inner = begin + torch.cumsum(least + total * share, dim=0)[:-1]
        return torch.cat([first[None], noise.t_of_lam(inner), times[-1:]])

    def values(self, theta: Tensor) -> dict[str, Tensor]:
        """The numbers as `space.compile(base, values)` takes them; differentiable in theta."""
        parts = self._parts(theta)
        base, noise = self.base, self.schedule.noise
        times = self._times(parts.get("times"), parts.get("start_level"))
        values: dict[str, Tensor] = {"times": times}
        t_start, low = noise.t_range[0], min(noise.t_range[1], self.schedule.times[-1])
        for name, field in _SHIFTS.items():
            if name in parts:
                at = times[1:] if name == "land" else times[:-1]
                old = torch.tensor([getattr(s, field) for s in base.steps], dtype=torch.float64)
                shift = _REACH * torch.tanh(parts[name] / _REACH)
                fixed = torch.isinf(noise.lam(at.detach() + old))
                lam = torch.where(fixed, torch.zeros_like(at), noise.lam(at + old))
                moved = noise.t_of_lam(lam + shift).clamp(low, t_start)
                delta = moved - at
                exact = delta - delta.detach() + old  # neutral to the bit, with its gradient
                values[field] = torch.where(fixed, old, torch.where(shift == 0, exact, delta))
        if "weights" in parts:
            values["weights"] = self._weights(parts["weights"])
        if "compensation" in parts:
            old = torch.tensor([s.compensation for s in base.steps], dtype=torch.float64)
            late = torch.arange(len(old)) >= base.compensation_order
            values["compensation"] = old + late * parts["compensation"]
        if "relaxation" in parts:
            old = torch.tensor([s.relaxation_coefficient for s in base.steps], dtype=torch.float64)
            values["relaxation_coefficient"] = old + parts["relaxation"]
        if "guidance" in parts:
            scales = torch.tensor([s.guidance for s in base.steps], dtype=torch.float64)
            values["guidance"] = scales * torch.exp(parts["guidance"])
        return values

    def _weights(self, theta: Tensor) -> Tensor:
        """(N, history), padded with zeros that meet no point."""
        rows, at = [], 0
        for step in self.base.steps:
            count = len(step.weights)
            row = torch.tensor(step.weights, dtype=torch.float64) + theta[at : at + count]
            rows.append(torch.cat([row, torch.zeros(self.history - count, dtype=torch.float64)]))
            at += count
        return torch.stack(rows)

    def program(self, theta: Tensor) -> Program:
        """The program at theta, for start states of the scale at `reference`; differentiable.

        Where the first time decides the scale of x_T (EDM, rectified flow) and has moved, the
        weights of x_T make up for it.
        """
        values = self.values(theta)
        program = compile(self.base, values)
        scale: Callable[[Any], Any] = self.schedule.noise.prior_scale
        reference = self.schedule.times[0] if self.reference is None else self.reference
        share = scale(values["times"][0]) / scale(reference)
        if not isinstance(share, Tensor):  # variance preserving: always 1
            return program
        init = torch.cat([share * program.init[:1], program.init[1:]])
        return dataclasses.replace(program, init=init, e=share * program.e)

    def apply(self, theta: Tensor) -> OdeSchedule:
        """The schedule with the numbers of theta written into its steps."""
        values = {k: v.detach() for k, v in self.values(theta).items()}
        times = tuple(values.pop("times").tolist())
        steps = []
        for i, step in enumerate(self.base.steps):
            changes = {name: _number(value[i], step, name) for name, value in values.items()}
            steps.append(step.model_copy(update=changes))
        return self.base.model_copy(update={"times": times, "steps": tuple(steps)})


def _number(value: Tensor, step: StepSpec, name: str) -> object:
    if name == "weights":
        return tuple(value[: len(step.weights)].tolist())
    number = float(value)
    if name == "relaxation_coefficient" and step.relaxation != "linear":
        return 0.0
    return number if math.isfinite(number) else getattr(step, name)


def reflected(lam: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`lam` folded into [low, high]; unlike a clamp it has a slope everywhere, at `low` too."""
    up = torch.where(lam < low - 1e-9, 2 * low - lam, lam)
    return torch.where(up > high, torch.maximum(2 * high - up, low), up)


def open_knobs(names: Sequence[str] | str | None) -> tuple[str, ...]:
    """Knob names from a study's list or comma string; None gives the default."""
    if names is None:
        return DEFAULT
    parts = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    return tuple(n for n in parts if n)
