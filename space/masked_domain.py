"""The search space of masked schedules at a fixed number of network calls.

A member decides `length` positions in exactly `nfe` calls: a composition of the length into
counts, and per call the open choices out of extrapolation, temperature and the rule for positions.
It answers what a strategy asks of a space (`sample`, `mutate`, `crossover`, `contains`, `params`,
`from_params`, `encode`), as `OdeDomain` does for ODE schedules. `from_params` is total: any
values become the nearest member, and it inverts `params` exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from fewstep.space.errors import ScheduleError
from fewstep.space.masked import (
    COUNTS,
    CallSpec,
    MaskedNoise,
    MaskedSchedule,
    counts_by_name,
    split,
)
from fewstep.space.protocol import distributions
from fewstep.space.step_choices import Parameter, Value

__all__ = ["MaskedDomain"]

_DIGITS = 6  # decimals of a canonical temperature
RATES = {"count": 0.6, "run": 0.7, "mode": 0.1, "positions": 0.1, "temperature": 0.3}


@dataclass(frozen=True)
class MaskedDomain:
    """All schedules of `nfe` calls for `length` positions, with the choices left open.

    Args:
        length: positions, >= nfe.
        nfe: network calls of every member, >= 1.
        modes: allowed modes, the neutral one first.
        positions: allowed rules, the neutral one first.
        temperature: (low, high) with 0 < low <= 1 <= high; None fixes it to 1.
        noise: the masking schedule.
        variable: what extrapolation is linear in.

    Raises:
        ScheduleError: an empty space.
    """

    length: int
    nfe: int
    modes: tuple[str, ...] = ("parallel",)
    positions: tuple[str, ...] = ("uniform",)
    temperature: tuple[float, float] | None = None
    noise: MaskedNoise = field(default_factory=MaskedNoise)
    variable: str = "time"

    def __post_init__(self) -> None:
        if not 1 <= self.nfe <= self.length:
            raise ScheduleError(f"domain: nfe {self.nfe} must lie in 1..{self.length}, the length")
        for name, allowed in (("modes", ("parallel", "extrapolate")),
                              ("positions", ("uniform", "confidence"))):  # fmt: skip
            if not getattr(self, name) or not set(getattr(self, name)) <= set(allowed):
                raise ScheduleError(f"domain: {name} must be out of {', '.join(allowed)}")
        if (
            self.temperature is not None
            and not 0 < self.temperature[0] <= 1 <= self.temperature[1]
        ):
            raise ScheduleError(f"domain: temperature {self.temperature} must enclose 1")

    def with_nfe(self, nfe: int) -> MaskedDomain:
        """The same choices at another number of calls."""
        return replace(self, nfe=nfe)

    def baselines(self) -> dict[str, MaskedSchedule]:
        """The named counts, with every allowed mode and rule kept the same at all calls.

        Samplers that are equal are named once.
        """
        found = {}
        for name in COUNTS:
            for mode in self.modes:
                for rule in self.positions:
                    counts = counts_by_name(name, self.length, self.nfe)
                    extra = [v for v in (mode, rule) if v not in ("parallel", "uniform")]
                    made = self._member([(c, mode, rule, 1.0) for c in counts])
                    found["/".join([name, *extra])] = made
        first: dict[str, str] = {}
        for name, made in found.items():
            first.setdefault(made.digest, name)
        return {name: made for name, made in found.items() if first[made.digest] == name}

    def contains(self, schedule: object) -> str | None:
        """Why a schedule is not a member, or None if it is."""
        if not isinstance(schedule, MaskedSchedule):
            return f"a {type(schedule).__name__} is no masked schedule"
        if schedule.length != self.length:
            return f"it decides {schedule.length} positions, not {self.length}"
        if schedule.nfe != self.nfe:
            return f"it makes {schedule.nfe} calls, not {self.nfe}"
        if schedule.noise != self.noise or schedule.variable != self.variable:
            return "its masking schedule or variable is another"
        low, high = self.temperature or (1.0, 1.0)
        for k, call in enumerate(schedule.calls):
            if call.mode != "parallel" and call.mode not in self.modes:
                return f"call {k}: mode {call.mode!r} is not open"
            idle = k == self.nfe - 1 and call.mode == "parallel"  # it decides all that is left
            if call.positions not in self.positions and not idle:
                return f"call {k}: positions {call.positions!r} is not open"
            if not low <= call.temperature <= high:
                return f"call {k}: temperature {call.temperature} is outside {low} to {high}"
            if call.top_p != 1:
                return f"call {k}: top_p is not searched"
        return None

    def params(self, schedule: MaskedSchedule) -> dict[str, Any]:
        """The parameters of a member: `count_k` and the open choices of every call.

        Raises:
            ScheduleError: the schedule is not a member; says why.
        """
        reason = self.contains(schedule)
        if reason is not None:
            raise ScheduleError(f"not in the search space: {reason}")
        found: dict[str, Any] = {}
        for k, call in enumerate(schedule.calls):
            found[f"count_{k}"] = call.count
            if len(self.modes) > 1:
                found[f"mode_{k}"] = call.mode
            if len(self.positions) > 1:
                found[f"positions_{k}"] = call.positions
            if self.temperature is not None:
                found[f"temperature_{k}"] = round(call.temperature, _DIGITS)
        return found

    def from_params(self, values: Mapping[str, Any]) -> MaskedSchedule:
        """The member nearest to any values: missing ones are neutral, counts are made to sum."""
        weights = [max(0.0, float(values.get(f"count_{k}", 1))) for k in range(self.nfe)]
        counts = split(weights if any(weights) else [1.0] * self.nfe, self.length)
        low, high = self.temperature or (1.0, 1.0)
        calls = []
        for k, count in enumerate(counts):
            mode = values.get(f"mode_{k}", self.modes[0])
            rule = values.get(f"positions_{k}", self.positions[0])
            heat = min(max(float(values.get(f"temperature_{k}", 1.0)), low), high)
            mode = mode if mode in self.modes else self.modes[0]
            rule = rule if rule in self.positions else self.positions[0]
            calls.append((count, mode, rule, round(heat, _DIGITS)))
        return self._member(calls)

    def canonical(self, schedule: MaskedSchedule) -> MaskedSchedule:
        """The member equal to `schedule` as a sampler, provenance left out."""
        return self.from_params(self.params(schedule))

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter of a member, call by call; see `Domain`."""
        found = []
        for k in range(self.nfe):
            found.append(Parameter(f"count_{k}", "int", 1, self.length - self.nfe + 1, neutral=1))
            for name, open_ in (("mode", self.modes), ("positions", self.positions)):
                choices: tuple[Value, ...] = open_
                if len(choices) > 1:
                    found.append(
                        Parameter(f"{name}_{k}", "choice", choices=choices, neutral=choices[0])
                    )
            if self.temperature is not None:
                found.append(
                    Parameter(f"temperature_{k}", "float", *self.temperature, neutral=1.0)
                )
        return tuple(found)

    def distributions(self) -> dict[str, Any]:
        """The parameters as Optuna distributions (needs the search extra)."""
        return distributions(self.parameters)

    def encode(self, schedule: MaskedSchedule) -> np.ndarray:
        """A member as a flat float64 vector: cumulative shares, then the choices as numbers."""
        self.params(schedule)
        counts = np.array(schedule.counts, dtype=np.float64)
        parts = [counts.cumsum() / self.length]
        if len(self.modes) > 1:
            parts.append(np.array([float(c.mode == "extrapolate") for c in schedule.calls]))
        if len(self.positions) > 1:
            parts.append(np.array([float(c.positions == "confidence") for c in schedule.calls]))
        if self.temperature is not None:
            parts.append(np.log([c.temperature for c in schedule.calls]))
        return np.concatenate(parts)

    def sample(self, rng: np.random.Generator) -> MaskedSchedule:
        """A random member: compositions uniform, choices uniform, log-temperatures uniform."""
        cuts = np.sort(rng.choice(self.length - 1, self.nfe - 1, replace=False)) + 1
        counts = np.diff([0, *cuts, self.length])
        low, high = (math.log(v) for v in self.temperature or (1.0, 1.0))
        calls = []
        for count in counts.tolist():
            heat = math.exp(rng.uniform(low, high)) if self.temperature else 1.0
            mode, rule = str(rng.choice(self.modes)), str(rng.choice(self.positions))
            calls.append((count, mode, rule, round(heat, _DIGITS)))
        return self._member(calls)

    def mutate(
        self,
        schedule: MaskedSchedule,
        rng: np.random.Generator,
        *,
        rates: Mapping[str, float] | None = None,
        scale: float = 0.1,
    ) -> MaskedSchedule:
        """A changed copy, never equal to the original where the space has another member.

        Args:
            schedule: a member.
            rng: source of randomness.
            rates: "count" is the chance that positions move from one call to another; "run" that
                one choice changes alike at neighbouring calls, instead of at calls by themselves,
                for which the others are the chance per call; defaults `RATES`.
            scale: standard deviation of the log temperature of a call, half that of a run's.
        """
        chance = RATES | dict(rates or {})
        before = self.canonical(schedule)
        for _ in range(100):
            values = self.params(before)
            if self.nfe > 1 and rng.random() < chance["count"]:
                for _ in range(1 + int(rng.geometric(0.6))):
                    a, b = rng.choice(self.nfe, 2, replace=False).tolist()
                    moved = min(int(rng.geometric(0.6)), values[f"count_{a}"] - 1)
                    values[f"count_{a}"] -= moved
                    values[f"count_{b}"] += moved
            for names in self._alike(chance, rng):
                values |= self._changed(values, names, rng, scale)
            child = self.from_params(values)
            if child.digest != before.digest:
                return child
        return before

    def _alike(self, chance: Mapping[str, float], rng: np.random.Generator) -> list[list[str]]:
        """Parameters to change, those of one list alike: one choice in a run, or each alone."""
        stems = [name for name, open_ in (
            ("mode", len(self.modes) > 1),
            ("positions", len(self.positions) > 1),
            ("temperature", self.temperature is not None),
        ) if open_]  # fmt: skip
        if stems and rng.random() < chance["run"]:
            stem = str(rng.choice(stems))
            first, last = sorted(rng.integers(self.nfe, size=2).tolist())
            return [[f"{stem}_{k}" for k in range(first, last + 1)]]
        return [
            [f"{stem}_{k}"]
            for k in range(self.nfe)
            for stem in stems
            if rng.random() < chance[stem]
        ]

    def _changed(
        self, values: Mapping[str, Any], names: list[str], rng: np.random.Generator, scale: float
    ) -> dict[str, Any]:
        """New values of parameters of one kind, all moved by the same, a run twice as far."""
        stem = names[0].rpartition("_")[0]
        if stem == "temperature":
            factor = math.exp(rng.normal(0, scale if len(names) == 1 else 2 * scale))
            return {name: values[name] * factor for name in names}
        return dict.fromkeys(names, str(rng.choice(getattr(self, _FIELD[stem]))))

    def crossover(
        self, a: MaskedSchedule, b: MaskedSchedule, rng: np.random.Generator
    ) -> MaskedSchedule:
        """A child that takes the calls before a random one from `a`, the rest from `b`."""
        cut = int(rng.integers(self.nfe + 1))
        first, second = self.params(a), self.params(b)
        return self.from_params(
            {k: first[k] if int(k.rpartition("_")[2]) < cut else second[k] for k in first}
        )

    def adopt(self, schedule: object) -> list[MaskedSchedule]:
        """The member that unmasks at the pace of a schedule of any number of calls.

        After a share of the calls the same share of positions is visible, and a call has the
        other choices of the one in its place; choices that are not open are neutral. None from a
        schedule of another length.
        """
        if not isinstance(schedule, MaskedSchedule) or schedule.length != self.length:
            return []
        done = np.cumsum([0, *schedule.counts])
        ends = np.linspace(0, schedule.nfe, self.nfe + 1)
        values: dict[str, Any] = {}
        for k, count in enumerate(np.diff(np.interp(ends, np.arange(len(done)), done))):
            call = schedule.calls[int((ends[k] + ends[k + 1]) / 2)]
            values |= {f"count_{k}": float(count), f"mode_{k}": call.mode}
            values |= {f"positions_{k}": call.positions, f"temperature_{k}": call.temperature}
        return [self.from_params(values)]

    def neighbours(self, schedule: MaskedSchedule) -> list[MaskedSchedule]:
        """Members that differ by one position moved between adjacent calls."""
        values, found = self.params(schedule), []
        for k in range(self.nfe - 1):
            for a, b in ((k, k + 1), (k + 1, k)):
                if values[f"count_{a}"] > 1:
                    moved = {f"count_{a}": values[f"count_{a}"] - 1}
                    moved[f"count_{b}"] = values[f"count_{b}"] + 1
                    found.append(self.from_params(values | moved))
        return found

    def _member(self, calls: list[tuple[int, str, str, float]]) -> MaskedSchedule:
        """Calls of (count, mode, rule, temperature); what does not matter is neutral."""
        made = []
        for k, (count, mode, rule, heat) in enumerate(calls):
            data: dict[str, Any] = {"count": count, "temperature": heat}
            data["mode"] = "parallel" if k == 0 or count == 1 else mode
            last = k == len(calls) - 1 and data["mode"] == "parallel"
            data["positions"] = self.positions[0] if last else rule
            made.append(CallSpec(**data))
        data = {"length": self.length, "noise": self.noise, "variable": self.variable}
        return MaskedSchedule(calls=tuple(made), **data)


_FIELD = {"mode": "modes", "positions": "positions"}
