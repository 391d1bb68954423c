"""Schedules for masked diffusion: how many tokens each network call unmasks, and how.

A sequence of L tokens starts fully masked; call k of the network decides `count` of the masked
positions at once, and the counts sum to L. With counts of one, uniform positions and temperature
one the first-hitting sampler draws from the model's law exactly (Zheng et al. 2409.02908,
section 4); every other schedule is an approximation worth searching. NFE is the number of calls.

Frame: a(t) is the share of visible tokens, a(0) = 1, decreasing to a(1) = `floor`:

    a(t) = 1 - (1 - floor) t        (floor = 0: linear; floor = 1e-3: MDLM's log-linear schedule)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fewstep.space.errors import ScheduleError
from fewstep.space.schedule import FORMAT, LOADERS, VERSION, Frozen

__all__ = ["COUNTS", "CallSpec", "MaskedNoise", "MaskedSchedule", "counts_by_name", "split"]

COUNTS = ("uniform", "linear", "cosine", "reverse_cosine")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ScheduleError(message)


class CallSpec(Frozen):
    """One network call and the tokens it decides. Neutral values in brackets.

    Args:
        count: positions unmasked after this call, >= 1 [1].
        mode: "parallel" draws all of them from this call's prediction; "extrapolate" continues
            the last two predictions linearly for every token but the first (2409.02908,
            section 4.3), no meaning at count 1 ["parallel"].
        temperature: T > 0; tokens are drawn from mu^{1/T} [1].
        top_p: share of probability kept, 0 < top_p <= 1, the most probable tokens first [1].
        positions: "uniform" (the law's own order) or "confidence" (where the network's largest
            probability is largest) ["uniform"].
    """

    count: int = 1
    mode: Literal["parallel", "extrapolate"] = "parallel"
    temperature: float = 1.0
    top_p: float = 1.0
    positions: Literal["uniform", "confidence"] = "uniform"

    @model_validator(mode="after")
    def _check(self) -> Self:
        _need(self.count >= 1, f"count {self.count} must be 1 or more")
        _need(self.temperature > 0, f"temperature {self.temperature} must be positive")
        _need(0 < self.top_p <= 1, f"top_p {self.top_p} is outside (0, 1]")
        return self

    @property
    def exact(self) -> bool:
        """Whether this call draws from the model's law: every choice at its neutral value."""
        return self.canonical() == CallSpec().canonical()

    def canonical(self, *, last: bool = False) -> list[object]:
        """The choices that change a sample, floats to 12 digits; a last call takes the rest."""
        mode = "parallel" if self.count == 1 else self.mode
        positions = "uniform" if last and mode == "parallel" else self.positions
        numbers = [f"{self.temperature:.11e}", f"{self.top_p:.11e}"]
        return [self.count, mode, *numbers, positions]


class MaskedNoise(Frozen):
    """The masking schedule a(t) = 1 - (1 - floor) t, t in [0, 1].

    Args:
        floor: visible share at t = 1, 0 <= floor < 1; MDLM trains with 1e-3.
    """

    type: Literal["masked_linear"] = "masked_linear"
    floor: float = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        _need(0 <= self.floor < 1, f"floor {self.floor} is outside [0, 1)")
        return self

    def visible(self, t: Tensor) -> Tensor:
        """a(t), the probability that a token is visible at time t."""
        return 1 - (1 - self.floor) * t

    def time(self, share: Tensor) -> Tensor:
        """The time at which the masked share is `share` times its value at t = 1.

        Uniform `share` gives a first-hitting time: 1 - a(tau) is uniform below 1 - a(1).
        """
        return share


class MaskedSchedule(Frozen):
    """A complete schedule for a masked diffusion sampler.

    Args:
        length: free positions L, the sum of the counts.
        calls: one `CallSpec` per network call.
        noise: the masking schedule (a `MaskedNoise` or its JSON form); matters to networks that
            are told the time, and to extrapolation.
        variable: what extrapolation is linear in: "time" (the hitting times, random; as
            published) or "fraction" (the masked share n/L, deterministic).
        provenance: where the schedule comes from; free JSON, no part of the digest.
    """

    kind: Literal["masked"] = "masked"
    length: int
    calls: tuple[CallSpec, ...]
    noise: MaskedNoise = MaskedNoise()
    variable: Literal["time", "fraction"] = "time"
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("noise", mode="before")
    @classmethod
    def _noise(cls, value: object) -> object:
        return MaskedNoise(**value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        _need(self.length >= 1, f"length {self.length} must be 1 or more")
        _need(len(self.calls) >= 1, "calls is empty: a schedule needs at least one call")
        total = sum(self.counts)
        _need(total == self.length, f"the counts sum to {total} but length is {self.length}")
        _need(self.calls[0].mode == "parallel", "call 0 cannot extrapolate: it has no history")
        return self

    @classmethod
    def from_counts(cls, counts: tuple[int, ...] | list[int], **choices: Any) -> MaskedSchedule:
        """A schedule with these counts, and the same choices (of `CallSpec`) at every call.

        "extrapolate" is left out of call 0, which has no history.
        """
        calls = [CallSpec(count=count, **choices) for count in counts]
        if calls and calls[0].mode == "extrapolate":
            calls[0] = calls[0].model_copy(update={"mode": "parallel"})
        return cls(length=sum(counts), calls=tuple(calls))

    @classmethod
    def token_by_token(cls, length: int) -> MaskedSchedule:
        """The exact schedule: `length` calls of one token."""
        return cls.from_counts([1] * length)

    @property
    def counts(self) -> tuple[int, ...]:
        """Positions unmasked by each call."""
        return tuple(call.count for call in self.calls)

    @property
    def nfe(self) -> int:
        """Network calls."""
        return len(self.calls)

    @property
    def exact(self) -> bool:
        """Whether the samples follow the model's law exactly."""
        return all(call.exact for call in self.calls)

    def fitted(self, free: int) -> tuple[int, ...]:
        """The counts rescaled to another number of free positions; some may become 0.

        Args:
            free: free positions, 0 or more.

        Returns:
            One count per call; they sum to `free`, and are `counts` if `free == length`.
        """
        done = [round(c * free / self.length) for c in _cumulative(self.counts)]
        return tuple(b - a for a, b in itertools.pairwise([0, *done]))

    @cached_property
    def digest(self) -> str:
        """Hash of what the sampler does: equal digests are equal samplers."""
        last = self.nfe - 1
        calls = [call.canonical(last=i == last) for i, call in enumerate(self.calls)]
        extrapolates = any(call[1] == "extrapolate" for call in calls)
        shape = [self.kind, f"{self.noise.floor:.11e}", self.variable if extrapolates else ""]
        return hashlib.sha256(json.dumps([shape, calls]).encode()).hexdigest()[:20]

    def to_dict(self) -> dict[str, Any]:
        """The file form: format, version, choices that differ from neutral, provenance."""
        calls = [
            {"count": call.count} | call.model_dump(mode="json", exclude_defaults=True)
            for call in self.calls
        ]
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "nfe": self.nfe,
            "length": self.length,
            "noise": self.noise.model_dump(mode="json"),
            "variable": self.variable,
            "calls": calls,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MaskedSchedule:
        """Read the file form.

        Raises:
            ScheduleError: a missing or unknown field, or choices that make no sense.
        """
        body = {k: v for k, v in data.items() if k not in ("format", "version", "nfe")}
        for field in ("length", "calls"):
            _need(field in body, f"{field} is missing from the schedule file")
        _need(isinstance(body["calls"], list), "calls must be a list of objects")
        body["calls"] = tuple(_call(i, call) for i, call in enumerate(body["calls"]))
        schedule = cls(**body)
        nfe = data.get("nfe", schedule.nfe)
        _need(nfe == schedule.nfe, f"nfe is {nfe} in the file but it lists {schedule.nfe} calls")
        return schedule


def split(weights: list[float], length: int) -> tuple[int, ...]:
    """Integer counts proportional to weights, each at least 1, that sum to `length`.

    The cumulative shares are rounded, then moved apart by the least that leaves every count >= 1.

    Raises:
        ScheduleError: more calls than positions, or weights that are not positive numbers.
    """
    calls = len(weights)
    _need(1 <= calls <= length, f"{calls} calls for {length} positions: use 1..{length} calls")
    good = all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0
    _need(good, "weights must be finite, >= 0 and not all 0")
    ends = [round(c * length / sum(weights)) for c in _cumulative(weights)]
    ends[-1] = length
    for i in range(calls):
        ends[i] = max(ends[i], i + 1, ends[i - 1] + 1 if i else 1)
    for i in range(calls - 1, -1, -1):
        ends[i] = min(ends[i], length - (calls - 1 - i))
    return tuple(b - a for a, b in itertools.pairwise([0, *ends]))


def counts_by_name(name: str, length: int, calls: int) -> tuple[int, ...]:
    """The named baselines: `calls` counts that sum to `length`.

    Args:
        name: "uniform" (equal counts, the paper's choice), "linear" (counts growing like 1, 2,
            3, ...), "cosine" (MaskGIT's: the masked share after call k of N is cos(pi k / 2N),
            few tokens first), "reverse_cosine" (the same counts from the other end).
        length: positions to decide.
        calls: network calls, 1..length.

    Raises:
        ScheduleError: an unknown name, or more calls than positions.

    References:
        Chang et al. 2202.04200, section 3.3 (cosine).
    """
    _need(name in COUNTS, f"counts {name!r} are unknown: use one of {', '.join(COUNTS)}")
    _need(1 <= calls <= length, f"{calls} calls for {length} positions: use 1..{length} calls")
    if name == "uniform":
        weights = [1.0] * calls
    elif name == "linear":
        weights = [k + 1.0 for k in range(calls)]
    else:
        share = [math.cos(math.pi * k / (2 * calls)) for k in range(calls + 1)]
        weights = [a - b for a, b in itertools.pairwise(share)]
        weights = weights[::-1] if name == "reverse_cosine" else weights
    return split(weights, length)


def _cumulative(values: tuple[int, ...] | list[float]) -> list[float]:
    total, result = 0.0, []
    for value in values:
        total += value
        result.append(total)
    return result


def _call(i: int, data: object) -> CallSpec:
    if not isinstance(data, dict):
        raise ScheduleError(f"calls[{i}] is {data!r}: an object is needed")
    try:
        return CallSpec(**data)
    except ScheduleError as error:
        raise ScheduleError(f"call {i}: {error}") from None


LOADERS["masked"] = MaskedSchedule.from_dict
