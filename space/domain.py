"""The search space of ODE schedules at a fixed number of network calls.

A member is an `OdeSchedule` whose steps use only the open decisions, whose times run from the
start to the end level with at least `min_gap` in lam between neighbours, and which makes exactly
`nfe` calls. Times are searched, proposed and measured in lam = log(alpha/sigma), half the log-SNR:
uniform proposals there, not in sigma, where 99 % of them would miss the data end.

A canonical member and its named parameters (`params`, real Optuna distributions; a parameter that
does not matter is absent) are equal views, each the exact inverse of the other. For exactness
canonical lam are multiples of 1e-9, far above the rounding of every noise schedule's inverse and
far below any effect (a schedule made elsewhere moves by at most 5e-10 in lam).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.space import moves
from fewstep.space.choices import Parameter, Place, Value
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule
from fewstep.space.protocol import Domain
from fewstep.space.schedule import OdeSchedule, StepSpec
from fewstep.space.step_choices import StepChoices, heun_as_corrector

LAM_FLOOR, LAM_CEILING = -7.0, 7.5  # where a level is infinite, times are searched up to here
FIRST: dict[Value, float] = {"network": 0.3, "zero": 0.3, "mean": 0.4}  # shares proposed
_DIGITS = 9  # decimals of lam in a canonical member


@dataclass(frozen=True)
class OdeDomain(Domain):
    """All schedules of `nfe` calls for a noise schedule, with the decisions left open.

    Args:
        noise: the noise schedule.
        nfe: network calls of every member, >= 1.
        choices: the decisions of a step.
        first: first steps allowed, out of "network", "mean" (needs `constant`), "zero".
        start_band: (low, high) model times the first time may take; None fixes it to the noise
            schedule's first time.
        end_band: (low, high) model times the last time may take; None fixes it to the noise
            schedule's last time.
        min_gap: least difference in lam of neighbouring times, > 0.
        constant: the image of the "mean" first step, shape of one sample.

    Raises:
        ScheduleError: an empty or contradictory space.
    """

    noise: NoiseSchedule
    nfe: int
    choices: StepChoices = field(default_factory=StepChoices)
    first: tuple[str, ...] = ("network",)
    start_band: tuple[float, float] | None = None
    end_band: tuple[float, float] | None = None
    min_gap: float = 0.05
    constant: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ScheduleError(f"domain: nfe {self.nfe} must be at least 1")
        if not self.first or not set(self.first) <= {"network", "mean", "zero"}:
            raise ScheduleError(f"domain: first {self.first!r}: use 'network', 'mean', 'zero'")
        if "mean" in self.first and self.constant is None:
            raise ScheduleError(
                "domain: first 'mean' needs the constant image: give constant (in a study, let "
                "refinement use the mean: [refine] mean = true)"
            )
        for band in (self.start_band, self.end_band):
            if band is not None and not band[0] < band[1]:
                raise ScheduleError(f"domain: band {band} must be (low, high) with low < high")
        low, high = self.start_lam[1], self.end_lam[0]
        if not self.min_gap > 0 or high - low < self.max_steps * self.min_gap:
            raise ScheduleError(
                f"domain: {self.max_steps} gaps of {self.min_gap} do not fit in lam {low:.3g} to"
                f" {high:.3g}: lower min_gap"
            )

    def lam(self, times: Sequence[float]) -> list[float]:
        """lam of model times, on the grid of 1e-9 that parameters live on."""
        values: list[float] = self.noise.lam(torch.tensor(times, dtype=torch.float64)).tolist()
        return [round(v, _DIGITS) for v in values]

    def time(self, lam: Sequence[float]) -> list[float]:
        """Model times of lam rounded to the grid: `lam` gives the rounded values back exactly."""
        rounded = [round(v, _DIGITS) for v in lam]
        times: list[float] = self.noise.t_of_lam(
            torch.tensor(rounded, dtype=torch.float64)
        ).tolist()
        return times

    @cached_property
    def start_lam(self) -> tuple[float, float]:
        """(low, high) of the first time's lam, finite; equal where it is fixed."""
        t = self.noise.t_range[0]
        low, high = self.lam([t, t] if self.start_band is None else self.start_band[::-1])
        return max(low, LAM_FLOOR), max(high, LAM_FLOOR)

    @cached_property
    def end_lam(self) -> tuple[float, float]:
        """(low, high) of the last time's lam, finite; equal where it is fixed."""
        t = self.noise.t_range[1]
        low, high = self.lam([t, t] if self.end_band is None else self.end_band[::-1])
        return min(low, LAM_CEILING), min(high, LAM_CEILING)

    @property
    def lam_range(self) -> tuple[float, float]:
        """The widest range of lam a member spans (finite)."""
        return self.start_lam[0], self.end_lam[1]

    @property
    def max_steps(self) -> int:
        """Most steps a member can have: one more than calls if the first may be analytical."""
        return self.nfe + (self.first != ("network",))

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter a member may have, in a fixed order; it has those that matter."""
        found: list[Parameter] = []
        if len(self.first) > 1:
            found.append(
                Parameter("first", "choice", choices=self.first, neutral=self.first[0]).with_prior(
                    FIRST
                )
            )
        if self.start_band is not None:
            found.append(
                Parameter("lam_start", "float", *self.start_lam, neutral=self.start_lam[0])
            )
        if self.end_band is not None:
            found.append(Parameter("lam_end", "float", *self.end_lam, neutral=self.end_lam[1]))
        for i in range(self.max_steps):
            if i > 0:
                found.append(
                    Parameter(f"lam_{i}", "float", *self.lam_range, neutral=self.lam_range[1])
                )
            found.extend(self.choices.parameters(i))
        return tuple(found)

    @cached_property
    def _infinite_ends(self) -> tuple[bool, bool]:
        """Whether all members end on clean data (lam = inf), and start at alpha = 0."""
        clean = self.noise.t_range[1] <= self.noise.t_data and self.end_band is None
        pure = math.isinf(self.lam([self.noise.t_range[0]])[0]) and self.start_band is None
        return clean, pure

    def place(self, first: str, steps: Sequence[StepSpec] = ()) -> Place:
        """Where the step after `steps` stands."""
        calls = self.nfe + (first != "network") - sum(_calls(step) for step in steps)
        reused = bool(steps) and steps[-1].corrector == "reuse"
        return Place(len(steps), calls, *self._infinite_ends, reused)

    def from_params(self, values: Mapping[str, Any]) -> OdeSchedule:
        """The member nearest to any values.

        Missing values are neutral, impossible ones are settled, missing times fill the widest
        gaps.
        """
        first, given, steps = self._settled(values)
        start = self._level("lam_start", values, self.start_lam, self.start_band, 0)
        end = self._level("lam_end", values, self.end_lam, self.end_band, 1)
        inner = moves.fit_times(given, len(steps) - 1, start[0], end[0], self.min_gap)
        times = (start[1], *self.time(inner), end[1])
        return self._member(times, steps, first)

    def _settled(self, values: Mapping[str, Any]) -> tuple[str, list[float], list[StepSpec]]:
        """How the member nearest to any values begins, the inner lam given, and its steps."""
        first = str(values.get("first", self.first[0]))
        first = first if first in self.first else self.first[0]
        by_step: dict[int, dict[str, Any]] = {}
        given: list[float] = []
        for name, value in values.items():
            stem, _, index = name.rpartition("_")
            if not index.isdigit():
                continue
            if stem == "lam":
                given.append(float(value))
            else:
                by_step.setdefault(int(index), {})[stem] = value
        steps: list[StepSpec] = []
        place = self.place(first)
        while place.calls > 0:
            steps.append(self.choices.settle(by_step.get(place.index, {}), place))
            place = place.after(steps[-1])
        return first, given, steps

    def matter(self, values: Mapping[str, Any]) -> set[str]:
        """See `Domain`; asked for once per suggestion, so no schedule is made."""
        first, _, steps = self._settled(values)
        found = {p.name for p in self.parameters if p.name in ("first", "lam_start", "lam_end")}
        place = self.place(first)
        for i, step in enumerate(steps):
            found |= {f"lam_{i}"} if i else set()
            found |= {f"{name}_{i}" for name, _ in self.choices.active(step, place)}
            place = place.after(step)
        return found

    def _member(
        self, times: Sequence[float], steps: Sequence[StepSpec], first: str
    ) -> OdeSchedule:
        extra: dict[str, Any] = {"first": first} if first != "network" else {}
        if any(name == "compensation" for name, _, _ in self.choices.extras):
            extra["compensation_order"] = self.choices.compensation_order
        made = OdeSchedule(noise=self.noise, times=tuple(times), steps=tuple(steps), **extra)
        return (
            made.with_constant(self.constant)
            if first == "mean" and self.constant is not None
            else made
        )

    def _level(
        self,
        name: str,
        values: Mapping[str, Any],
        bounds: tuple[float, float],
        band: tuple[float, float] | None,
        side: int,
    ) -> tuple[float, float]:
        """(lam, time) of the start or the end."""
        if band is None:
            return bounds[side], self.noise.t_range[side]
        lam = min(max(float(values.get(name, bounds[side])), bounds[0]), bounds[1])
        return lam, self.time([lam])[0]

    def _values(self, schedule: OdeSchedule) -> dict[str, Value]:
        """See `Domain`."""
        found: dict[str, Value] = {"first": schedule.first} if len(self.first) > 1 else {}
        lam = self.lam(schedule.times)
        if self.start_band is not None:
            found["lam_start"] = lam[0]
        if self.end_band is not None:
            found["lam_end"] = lam[-1]
        place = self.place(schedule.first)
        for i, step in enumerate(schedule.steps):
            if i > 0:
                found[f"lam_{i}"] = lam[i]
            settled = self.choices.canonical(step, place)
            found |= {f"{name}_{i}": value for name, value in self.choices.active(settled, place)}
            place = place.after(settled)
        return found

    def contains(self, schedule: object) -> str | None:
        """Why a schedule is not a member, or None if it is.

        A member's steps are the same sampler in canonical form: equal programs to 1e-9. The reason
        names the first field that changes on the way there.
        """
        if not isinstance(schedule, OdeSchedule):
            return f"a {type(schedule).__name__} has no choices to search"
        if schedule.noise != self.noise:
            return "its noise schedule is another"
        if schedule.nfe != self.nfe:
            return f"it makes {schedule.nfe} calls, not {self.nfe}"
        if schedule.first not in self.first:
            return f"first {schedule.first!r} is not among {self.first}"
        if schedule.options:
            return f"run-time options {sorted(schedule.options)} are not searched"
        for name, band, t, fixed in (
            ("times[0]", self.start_band, schedule.times[0], self.noise.t_range[0]),
            (
                f"times[{schedule.n_steps}]",
                self.end_band,
                schedule.times[-1],
                self.noise.t_range[1],
            ),
        ):
            low, high = band or (fixed, fixed)
            slack = (1e-12 if band is None else 1e-7) * abs(
                high
            )  # a band's ends are rounded in lam
            if not low - slack <= t <= high + slack:
                return f"{name} = {t} is outside {low} to {high}"
        lam = [min(max(v, LAM_FLOOR), LAM_CEILING) for v in self.lam(schedule.times)]
        for i, (a, b) in enumerate(pairwise(lam)):
            if b - a < self.min_gap * (1 - 1e-6):
                return f"step {i} advances lam by {b - a:.4g}: the minimum gap is {self.min_gap}"
        image = schedule.constant
        if image is not None and self.constant is not None and schedule.uses_constant:
            if image.shape != self.constant.shape or not torch.equal(
                image.double(), self.constant.double()
            ):
                return "its constant image is another than the search's"
        return self._moved(schedule)

    def _moved(self, schedule: OdeSchedule) -> str | None:
        """The first field of a step that changes when the steps are settled, and the program."""
        given = [heun_as_corrector(step) for step in schedule.steps]
        steps: list[Any] = []
        place = self.place(schedule.first)
        while place.calls > 0 and len(steps) < len(given):
            steps.append(self.choices.canonical(given[place.index], place))
            place = place.after(steps[-1])
        if steps == given:
            return None

        def same(to: Sequence[StepSpec | None]) -> bool:
            try:
                there = schedule.model_copy(update={"steps": tuple(to)})
                there.program.require_equal(schedule.program)
            except ScheduleError:
                return False
            return True

        if same(steps):
            return None
        for i, (a, b) in enumerate(zip(given, steps, strict=False)):
            for name in StepSpec.model_fields:
                one, other = getattr(a, name), getattr(b, name)
                single = [*given[:i], _with(a, name, other), *given[i + 1 :]]
                if one != other and not same(single):
                    return (
                        f"step {i}: {name} {one!r} is not open here, where it would be {other!r}"
                    )
        return "its steps have no canonical form that is the same sampler"

    def steps_of(self, values: Mapping[str, Value]) -> int:
        """How many steps the member of these parameters has."""
        calls = self.nfe + (values.get("first", self.first[0]) != "network")
        least = 2 if self._infinite_ends[0] else 1  # a last step that re-evaluates needs sigma > 0
        n = 0
        while calls > 0:
            calls -= 2 if calls > least and values.get(f"corrector_{n}") == "reeval" else 1
            n += 1
        return n

    # a random member, a changed copy, a child of two, those next to one, those near any schedule
    sample = moves.sample
    mutate = moves.mutate
    crossover = moves.crossover
    neighbours = moves.neighbours
    adopt = moves.adopt


def _with(step: StepSpec, name: str, value: Any) -> StepSpec | None:
    try:
        return step.model_copy(update={name: value})
    except ScheduleError:
        return None


def _calls(step: StepSpec) -> int:
    return 2 if step.corrector == "reeval" else 1
