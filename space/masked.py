"""Schedules for masked diffusion: how many tokens each network call unmasks, and how.

A sequence of L tokens starts fully masked; call k of the network decides `count` of the masked
positions at once, and the counts sum to L. With counts of one, uniform positions and temperature
one the first-hitting sampler draws from the model's law exactly (Zheng et al. 2409.02908,
section 4); every other schedule is an approximation worth searching. NFE is the number of calls.

A call chooses which positions (`positions`, `block`, `ends_last`), how many (`count`, and further
ones that a bound on confidence or entropy lets through), which tokens (`mode`, `temperature`,
`top_p`), and what it takes back (`remask`). Published samplers are such choices:

    MDLM, first hitting          counts of one, all else neutral
    LLaDA                        positions "drawn", temperature 0, block
    Dream                        positions "entropy" or "margin"
    Fast-dLLM, LLaDA 2           positions "drawn", min_confidence
    entropy-bounded (EB)         positions "entropy", max_entropy
    KLASS                        positions "confidence", min_confidence with max_kl, kl_window 2
    ReMDM, P2                    remask by "drawn" or "uniform", by "current"

Frame: a(t) is the share of visible tokens, a(0) = 1, decreasing to a(1) = `floor`:

    a(t) = 1 - (1 - floor) t        (floor = 0: linear; floor = 1e-3: MDLM's log-linear schedule)

References:
    Nie et al. 2502.09992 (LLaDA); Ye et al. 2508.15487 (Dream); Wu et al. 2505.22618 (Fast-dLLM);
    Ben-Hamu et al. 2505.24857 (entropy bound); Kim et al. 2511.05664 (KLASS);
    Wang et al. 2503.00307 (ReMDM); Peng et al. 2502.03540 (P2).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fewstep.space.errors import ScheduleError
from fewstep.space.schedule import FORMAT, LOADERS, VERSION, Frozen

__all__ = ["CallSpec", "MaskedNoise", "MaskedSchedule", "idle"]

_FIRST = ("count", "mode", "temperature", "top_p", "positions")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ScheduleError(message)


class CallSpec(Frozen):
    """One network call and the tokens it decides. Neutral values in brackets.

    "Confidence" is the probability of a position's most probable token, or with positions "drawn"
    that of the token drawn there; it and the entropy are the network's own, before `mode`,
    `temperature` and `top_p`.

    Args:
        count: positions unmasked after this call, >= 1; at least so many with a bound [1].
        mode: "parallel" draws all of them from this call's prediction; "extrapolate" continues
            the last two predictions linearly for every token but the first (2409.02908,
            section 4.3), no meaning at count 1 ["parallel"].
        temperature: T >= 0; tokens are drawn from mu^{1/T}, at 0 the most probable is taken [1].
        top_p: share of probability kept, 0 < top_p <= 1, the most probable tokens first [1].
        positions: "uniform" (the law's own order), "confidence" (largest probability first),
            "margin" (largest difference of the two largest probabilities first), "entropy"
            (smallest first) or "drawn" (most probable token drawn first) ["uniform"].
        min_confidence: also decide every position whose confidence is above, in [0, 1]; 1 lets
            none through [1].
        max_entropy: also decide the positions of least entropy, as long as the entropies of all
            that this call decides, the largest left out, sum to less than this; nats, >= 0; 0
            lets none through [0].
        max_kl: of the positions that a bound lets through, decide only those whose prediction has
            moved by a smaller KL divergence (nats, > 0) since the call before; None asks for
            nothing [None].
        kl_window: calls in a row for which that must hold, >= 1 [1].
        max_count: a bound lets no further position through once so many are decided, >= 1; None is
            no limit [None].
        block: positions are decided from left to right in blocks of so many free ones, a block
            only when the one before it is done or too small for the count; bounds hold in the
            first block that is not done. None is one block [None].
        hide_future: the network does not see what comes after the block [False].
        ends_last: positions where an end of text was drawn come last in their block [False].
        remask: share of the positions decided so far that are masked again after this call, in
            [0, 1); as many further positions are decided by it, so that the counts hold. In the
            last call nothing is [0].
        remask_by: which: "uniform" (any), "drawn" (least probable when they were drawn) or
            "current" (least probable by this call's prediction, which must then mean something
            at visible positions) ["uniform"].
    """

    count: int = 1
    mode: Literal["parallel", "extrapolate"] = "parallel"
    temperature: float = 1.0
    top_p: float = 1.0
    positions: Literal["uniform", "confidence", "margin", "entropy", "drawn"] = "uniform"
    min_confidence: float = 1.0
    max_entropy: float = 0.0
    max_kl: float | None = None
    kl_window: int = 1
    max_count: int | None = None
    block: int | None = None
    hide_future: bool = False
    ends_last: bool = False
    remask: float = 0.0
    remask_by: Literal["uniform", "drawn", "current"] = "uniform"

    @model_validator(mode="after")
    def _check(self) -> Self:
        _need(self.count >= 1, f"count {self.count} must be 1 or more")
        _need(self.temperature >= 0, f"temperature {self.temperature} must be 0 or more")
        _need(0 < self.top_p <= 1, f"top_p {self.top_p} is outside (0, 1]")
        _need(
            0 <= self.min_confidence <= 1,
            f"min_confidence {self.min_confidence} is outside [0, 1] (1 lets none through)",
        )
        _need(
            self.max_entropy >= 0,
            f"max_entropy {self.max_entropy} must be 0 or more nats (0 lets none through)",
        )
        _need(
            self.max_kl is None or self.max_kl > 0,
            f"max_kl {self.max_kl} must be positive, or left out to ask for nothing",
        )
        _need(self.kl_window >= 1, f"kl_window {self.kl_window} must be 1 or more")
        _need(
            self.max_count is None or self.max_count >= 1,
            f"max_count {self.max_count} must be 1 or more, or left out",
        )
        _need(self.block is None or self.block >= 1, f"block {self.block} must be 1 or more")
        _need(
            not self.hide_future or self.block is not None,
            "hide_future hides what comes after a block: give block",
        )
        _need(0 <= self.remask < 1, f"remask {self.remask} is outside [0, 1)")
        if self.mode == "extrapolate":
            _need(
                self.positions != "drawn" and not self.ends_last,
                "mode 'extrapolate' draws in the order of positions: it does not go with "
                "positions 'drawn' or ends_last, which order by what was drawn",
            )
            _need(
                not self.hide_future,
                "mode 'extrapolate' does not go with hide_future: the call before has not "
                "seen this block",
            )
        return self

    @property
    def bounded(self) -> bool:
        """Whether a bound may let further positions through."""
        return self.min_confidence < 1 or self.max_entropy > 0

    @property
    def exact(self) -> bool:
        """Whether this call draws from the model's law: every choice at its neutral value."""
        return self.canonical() == CallSpec().canonical()

    def canonical(self, *, first: bool = False, last: bool = False) -> list[object]:
        """The choices that change a sample, floats to 12 digits; others are left out."""
        unused = idle(self, first=first, last=last)
        chosen = self.model_copy(update={name: _NEUTRAL[name] for name in unused})
        values = [(name, getattr(chosen, name)) for name in type(self).model_fields]
        text = [(n, f"{v:.11e}" if isinstance(v, float) else v) for n, v in values]
        further = [
            [n, v]
            for (n, v), (_, raw) in zip(text, values, strict=True)
            if n not in _FIRST and raw != _NEUTRAL[n]
        ]
        return [v for n, v in text if n in _FIRST] + further


_NEUTRAL = {name: info.default for name, info in CallSpec.model_fields.items()}


def idle(call: CallSpec, *, first: bool = False, last: bool = False) -> frozenset[str]:
    """The choices of a call that change nothing, given its others.

    Args:
        call: the call.
        first: whether it is the first, before which nothing was decided.
        last: whether it is the last, which decides all that is left.
    """
    unused = set()
    bounded = call.bounded and not last and not (first and call.max_kl is not None)
    remasks = call.remask > 0 and not first and not last
    if call.count == 1 and not bounded and not remasks:
        unused.add("mode")
    if not bounded:
        unused |= {"max_kl", "kl_window", "max_count", "min_confidence", "max_entropy"}
    if call.max_kl is None:
        unused.add("kl_window")
    if not remasks:
        unused |= {"remask", "remask_by"}
    if last and ("mode" in unused or call.mode == "parallel"):
        unused |= {"positions", "block", "hide_future", "ends_last"}
    return frozenset(unused)


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
        ahead: what becomes of the calls when a bound runs ahead of the counts: "spread" rescales
            the counts of the calls left to the positions left, so that a sequence makes all of
            its calls while it has positions for them; "stop" keeps them, so that a sequence is
            done after fewer calls (as published samplers). Calls are random then, and the cost
            is their mean.
        provenance: where the schedule comes from; free JSON, no part of the digest.
    """

    kind: Literal["masked"] = "masked"
    length: int
    calls: tuple[CallSpec, ...]
    noise: MaskedNoise = MaskedNoise()
    variable: Literal["time", "fraction"] = "time"
    ahead: Literal["spread", "stop"] = "spread"
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
        for k, (before, call) in enumerate(itertools.pairwise(self.calls), start=1):
            _need(
                call.mode == "parallel" or not before.remask,
                f"call {k} cannot extrapolate: call {k - 1} remasks positions that have no "
                "older prediction",
            )
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

    def in_blocks(self, blocks: int, *, hide_future: bool = False) -> MaskedSchedule:
        """This schedule for each of several blocks of its length, from left to right.

        Args:
            blocks: how many, >= 1.
            hide_future: whether the network does not see the blocks to come.
        """
        inner = {"block": self.length, "hide_future": hide_future}
        calls = tuple(
            call.model_copy(update=inner if call.block is None else {}) for call in self.calls
        )
        shape = {"length": self.length * blocks, "calls": calls * blocks}
        return self.model_copy(update=shape)

    @property
    def counts(self) -> tuple[int, ...]:
        """Positions unmasked by each call."""
        return tuple(call.count for call in self.calls)

    @property
    def nfe(self) -> int:
        """Network calls; at most so many where bounds let sequences end early."""
        return len(self.calls)

    @property
    def uniforms(self) -> int:
        """Rows of uniforms that a sequence needs: two, and three for every call that remasks."""
        return 2 + 3 * sum(call.remask > 0 for call in self.calls)

    @property
    def exact(self) -> bool:
        """Whether the samples follow the model's law exactly."""
        return all(call.exact for call in self.calls)

    @property
    def bounded(self) -> bool:
        """Whether bounds make the number of calls of a sequence random."""
        return any(call.bounded for call in self.calls[:-1])

    def fitted(self, free: int) -> tuple[int, ...]:
        """The counts rescaled to another number of free positions; some may become 0.

        Args:
            free: free positions, 0 or more.

        Returns:
            One count per call; they sum to `free`, and are `counts` if `free == length`.
        """
        done = [round(c * free / self.length) for c in itertools.accumulate(self.counts)]
        return tuple(b - a for a, b in itertools.pairwise([0, *done]))

    @cached_property
    def digest(self) -> str:
        """Hash of what the sampler does: equal digests are equal samplers."""
        ends = {"first": 0, "last": self.nfe - 1}
        calls = [
            call.canonical(**{name: i == at for name, at in ends.items()})
            for i, call in enumerate(self.calls)
        ]
        extrapolates = any(call[1] == "extrapolate" for call in calls)
        shape = [self.kind, f"{self.noise.floor:.11e}", self.variable if extrapolates else ""]
        if self.ahead != "spread" and self.bounded:
            shape.append(self.ahead)
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
            **({} if self.ahead == "spread" else {"ahead": self.ahead}),
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


def _call(i: int, data: object) -> CallSpec:
    if not isinstance(data, dict):
        raise ScheduleError(f"calls[{i}] is {data!r}: an object is needed")
    try:
        return CallSpec(**data)
    except ScheduleError as error:
        raise ScheduleError(f"call {i}: {error}") from None


LOADERS["masked"] = MaskedSchedule.from_dict
