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
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fewstep.space.choices import Parameter, Value
from fewstep.space.counts import COUNTS, best_counts, counts_by_name, split
from fewstep.space.errors import ScheduleError
from fewstep.space.masked import CallSpec, MaskedNoise, MaskedSchedule, idle
from fewstep.space.masked_choices import CHOICES, NEUTRAL, MaskedChoice, require_open, told
from fewstep.space.protocol import Domain

__all__ = ["MaskedDomain"]

_DIGITS = 6  # decimals of a canonical number
RATES = {"count": 0.6, "run": 0.7, "temperature": 0.3}  # others: _RATE
_RATE = 0.1


@dataclass(frozen=True)
class MaskedDomain(Domain):
    """All schedules of `nfe` calls for `length` positions, with the choices left open.

    A list holds the values allowed, the neutral one first; a pair (low, high) is a range, and None
    leaves a choice at its neutral value. See `CallSpec` for what they mean.

    Args:
        length: positions, >= nfe.
        nfe: network calls of every member (at most, where bounds let sequences end early), >= 1.
        modes: of `mode`.
        positions: of `positions`.
        temperature: 0 <= low <= 1 <= high; drawn in its logarithm if low > 0.
        top_p: (low, 1).
        min_confidence: (low, 1); 1 lets none through.
        max_entropy: (0, high) in nats; 0 lets none through.
        max_kl: 0 < low < high in nats; high asks for nothing.
        kl_windows: of `kl_window`.
        max_counts: of `max_count`; 0 is no limit.
        blocks: of `block`; 0 is one block.
        hide_future: of `hide_future`.
        ends_last: of `ends_last`.
        remask: (0, high), high < 1.
        remask_by: of `remask_by`.
        noise: the masking schedule.
        variable: what extrapolation is linear in.
        ahead: what a bound that runs ahead of the counts does to the calls left.
        curve: h(m), from which the counts "dp" are made; see `space.counts`.

    Raises:
        ScheduleError: an empty space.
    """

    length: int
    nfe: int
    modes: tuple[str, ...] = ("parallel",)
    positions: tuple[str, ...] = ("uniform",)
    temperature: tuple[float, float] | None = None
    top_p: tuple[float, float] | None = None
    min_confidence: tuple[float, float] | None = None
    max_entropy: tuple[float, float] | None = None
    max_kl: tuple[float, float] | None = None
    kl_windows: tuple[int, ...] = (1,)
    max_counts: tuple[int, ...] = (0,)
    blocks: tuple[int, ...] = (0,)
    hide_future: tuple[bool, ...] = (False,)
    ends_last: tuple[bool, ...] = (False,)
    remask: tuple[float, float] | None = None
    remask_by: tuple[str, ...] = ("uniform",)
    noise: MaskedNoise = field(default_factory=MaskedNoise)
    variable: Literal["time", "fraction"] = "time"
    ahead: Literal["spread", "stop"] = "spread"
    curve: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.nfe <= self.length:
            raise ScheduleError(f"domain: nfe {self.nfe} must lie in 1..{self.length}, the length")
        if self.curve is not None and len(self.curve) != self.length:
            raise ScheduleError(
                f"domain: the curve has {len(self.curve)} values for {self.length} positions: "
                "measure it for this model and prompt"
            )
        for choice in CHOICES:
            require_open(choice, getattr(self, choice.field))

    @cached_property
    def _open(self) -> tuple[MaskedChoice, ...]:
        """The choices that have more than one value."""
        return tuple(c for c in CHOICES if len(getattr(self, c.field) or ()) > 1)

    def _neutral(self, choice: MaskedChoice) -> Value:
        """The value of a choice that does nothing, or the first allowed."""
        open_: Any = getattr(self, choice.field)
        if not choice.number:
            return told(open_[0])
        return 1.0 if choice.off is None else float(open_[choice.off])

    def _told_of(self, call: CallSpec, choice: MaskedChoice) -> Value:
        """A call's value as a parameter."""
        value = getattr(call, choice.name)
        if choice.none and value is None:
            return self._neutral(choice)
        return round(float(value), _DIGITS) if choice.number else told(value)

    def _meant(self, choice: MaskedChoice, value: Any) -> Any:
        """A parameter's value as a call's, the nearest that is allowed."""
        open_: Any = getattr(self, choice.field)
        if not choice.number:
            allowed = [told(v) for v in open_]
            value = open_[allowed.index(value) if value in allowed else 0]
            return (value or None) if NEUTRAL[choice.name] is None else value
        number = round(min(max(float(value), open_[0]), open_[1]), _DIGITS)
        return None if choice.none and number >= open_[1] else number

    def baselines(self) -> dict[str, MaskedSchedule]:
        """The named counts, with every allowed mode and rule kept the same at all calls.

        Samplers that are equal are named once.
        """
        counts = {name: counts_by_name(name, self.length, self.nfe) for name in COUNTS}
        if self.curve is not None:
            counts["dp"] = best_counts(self.curve, self.nfe)[-1]
        found = {}
        for name, numbers in counts.items():
            for mode in self.modes:
                for rule in self.positions:
                    extra = [v for v in (mode, rule) if v not in ("parallel", "uniform")]
                    choices = {"mode": mode, "positions": rule}
                    made = self._member([{"count": c} | choices for c in numbers])
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
        if schedule.ahead != self.ahead and any(call.bounded for call in schedule.calls):
            return f"ahead is {schedule.ahead!r}, not {self.ahead!r}"
        for k, call in enumerate(schedule.calls):
            unused = idle(call, first=k == 0, last=k == self.nfe - 1)
            for choice in CHOICES:
                reason = self._outside(choice, call)
                if reason is not None and choice.name not in unused:
                    return f"call {k}: {reason}"
        return None

    def _outside(self, choice: MaskedChoice, call: CallSpec) -> str | None:
        """Why a call's value is not open, or None if it is."""
        value, open_ = getattr(call, choice.name), getattr(self, choice.field)
        if value == NEUTRAL[choice.name] and (choice.number or choice.name == "mode"):
            return None
        if choice.number:
            low, high = open_ or (NEUTRAL[choice.name],) * 2
            if open_ is None and choice.name != "temperature":
                return f"{choice.name} is not searched"
            ok = low <= value <= high
            return None if ok else f"{choice.name} {value} is outside {low} to {high}"
        allowed = [self._meant(choice, told(v)) for v in open_]
        return None if value in allowed else f"{choice.name} {value!r} is not open"

    def _values(self, schedule: MaskedSchedule) -> dict[str, Any]:
        """See `Domain`; `count_k` and the open choices of every call."""
        found: dict[str, Any] = {}
        for k, call in enumerate(schedule.calls):
            found[f"count_{k}"] = call.count
            for choice in self._open:
                found[f"{choice.name}_{k}"] = self._told_of(call, choice)
        return found

    def from_params(self, values: Mapping[str, Any]) -> MaskedSchedule:
        """The member nearest to any values: missing ones are neutral, counts are made to sum."""
        weights = [max(0.0, float(values.get(f"count_{k}", 1))) for k in range(self.nfe)]
        counts = split(weights if any(weights) else [1.0] * self.nfe, self.length)
        calls = []
        for k, count in enumerate(counts):
            data: dict[str, Any] = {"count": count}
            for choice in self._open:
                value = values.get(f"{choice.name}_{k}", self._neutral(choice))
                data[choice.name] = self._meant(choice, value)
            calls.append(data)
        return self._member(calls)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter of a member, call by call; see `Domain`."""
        found = []
        for k in range(self.nfe):
            found.append(Parameter(f"count_{k}", "int", 1, self.length - self.nfe + 1, neutral=1))
            for choice in self._open:
                name, open_ = f"{choice.name}_{k}", getattr(self, choice.field)
                neutral = self._neutral(choice)
                if choice.number:
                    low, high = open_
                    found.append(Parameter(name, "float", low, high, neutral=neutral))
                else:
                    values = tuple(told(v) for v in open_)
                    found.append(Parameter(name, "choice", choices=values, neutral=neutral))
        return tuple(found)

    def encode(self, schedule: MaskedSchedule) -> np.ndarray:
        """A member as a flat float64 vector: cumulative shares, then the choices as numbers."""
        values = self.params(schedule)
        counts = np.array(schedule.counts, dtype=np.float64)
        parts = [counts.cumsum() / self.length]
        for choice in self._open:
            column = [values[f"{choice.name}_{k}"] for k in range(self.nfe)]
            open_ = getattr(self, choice.field)
            if choice.number:
                log = self._logarithmic(choice)
                parts.append(np.log(column) if log else np.array(column, dtype=np.float64))
            else:
                for other in open_[1:]:  # one-hot, the neutral value all zero
                    parts.append(np.array([float(v == told(other)) for v in column]))
        return np.concatenate(parts)

    def _logarithmic(self, choice: MaskedChoice) -> bool:
        return bool(choice.log) and getattr(self, choice.field)[0] > 0

    def sample(self, rng: np.random.Generator) -> MaskedSchedule:
        """A random member: compositions uniform, choices uniform, log-temperatures uniform."""
        cuts = np.sort(rng.choice(self.length - 1, self.nfe - 1, replace=False)) + 1
        counts = np.diff([0, *cuts, self.length])
        values: dict[str, Any] = {}
        for k, count in enumerate(counts.tolist()):
            values[f"count_{k}"] = count
            for choice in self._open:
                values[f"{choice.name}_{k}"] = self._drawn(choice, rng)
        return self.from_params(values)

    def _drawn(self, choice: MaskedChoice, rng: np.random.Generator) -> Value:
        """A random value of a choice; one that may be off is off every other time."""
        open_ = getattr(self, choice.field)
        if not choice.number:
            return told(open_[int(rng.integers(len(open_)))])
        low, high = open_
        if choice.off is not None and rng.random() < 0.5:
            return self._neutral(choice)
        if self._logarithmic(choice):
            return math.exp(rng.uniform(math.log(low), math.log(high)))
        return float(rng.uniform(low, high))

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
        before: MaskedSchedule = self.canonical(schedule)
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
        stems = [choice.name for choice in self._open]
        if stems and rng.random() < chance["run"]:
            stem = str(rng.choice(stems))
            first, last = sorted(rng.integers(self.nfe, size=2).tolist())
            return [[f"{stem}_{k}" for k in range(first, last + 1)]]
        return [
            [f"{stem}_{k}"]
            for k in range(self.nfe)
            for stem in stems
            if rng.random() < chance.get(stem, _RATE)
        ]

    def _changed(
        self, values: Mapping[str, Any], names: list[str], rng: np.random.Generator, scale: float
    ) -> dict[str, Any]:
        """New values of parameters of one kind, all moved by the same, a run twice as far."""
        stem = names[0].rpartition("_")[0]
        choice = next(c for c in self._open if c.name == stem)
        if not choice.number or (choice.off is not None and rng.random() < 0.5):
            return dict.fromkeys(names, self._drawn(choice, rng))
        step = rng.normal(0, scale if len(names) == 1 else 2 * scale)
        if self._logarithmic(choice):
            return {name: values[name] * math.exp(step) for name in names}
        low, high = getattr(self, choice.field)
        return {name: values[name] + (high - low) * step for name in names}

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
            values[f"count_{k}"] = float(count)
            for choice in self._open:
                values[f"{choice.name}_{k}"] = self._told_of(call, choice)
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

    def _member(self, calls: list[dict[str, Any]]) -> MaskedSchedule:
        """Calls of these choices; what does not matter, or goes with nothing, is neutral."""
        fixed = {
            c.name: self._meant(c, self._neutral(c))
            for c in CHOICES
            if c not in self._open and not c.number
        }
        made: list[CallSpec] = []
        for k, given in enumerate(calls):
            data = fixed | given
            if k == 0 or given["count"] == 1 or (made[-1].remask if made else 0):
                data["mode"] = "parallel"
            if data.get("mode") == "extrapolate":
                if data.get("positions") == "drawn" or data.get("ends_last"):
                    data["mode"] = "parallel"
                data["hide_future"] = False
            if data.get("block") is None:
                data["hide_future"] = False
            call = CallSpec(**data)
            unused = idle(call, first=k == 0, last=k == self.nfe - 1)
            for choice in CHOICES:
                if choice.name in unused and choice.name != "mode":
                    data[choice.name] = fixed.get(choice.name, NEUTRAL[choice.name])
                    if choice in self._open and not choice.number:
                        data[choice.name] = self._meant(choice, self._neutral(choice))
            made.append(CallSpec(**data))
        shape: dict[str, Any] = {"noise": self.noise, "variable": self.variable}
        shape["ahead"] = self.ahead
        return MaskedSchedule(length=self.length, calls=tuple(made), **shape)
