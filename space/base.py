"""What schedules share: frozen values with one-line errors, a noise schedule, times, an image.

Nothing that is loaded here can execute code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    ValidationError,
    field_serializer,
    field_validator,
)
from torch import Tensor

from fewstep.space.errors import ScheduleError, is_number, need
from fewstep.space.noise import NoiseSchedule, noise_from_dict, noise_to_dict
from fewstep.space.options import require_options

if TYPE_CHECKING:
    from fewstep.space.program import Program

FORMAT = "fewstep.schedule"
VERSION = 1
TINY = 1e-13
"""A coefficient below this is rounding, and is stored as 0."""


class Frozen(BaseModel):
    """A pydantic value whose construction errors are one-line `ScheduleError`s."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ScheduleError(_first_line(error, type(self).__name__)) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A validated copy with some fields changed; nothing computed before is kept."""
        kept = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**kept | dict(update or {}))


def _first_line(error: ValidationError, name: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ScheduleError):
        return str(cause)
    if first["type"] == "extra_forbidden":
        return f"{where} is not a field of {name}: remove it or check the spelling"
    return f"{where or name}: {first['msg']} (got {first['input']!r})"


class Noised(Frozen):
    """What schedules along a noise schedule share.

    Args:
        noise: the noise schedule (a `NoiseSchedule` or its JSON form).
    """

    noise: Any

    @field_validator("noise", mode="before")
    @classmethod
    def _noise(cls, value: object) -> object:
        made = noise_from_dict(value) if isinstance(value, dict) else value
        need(isinstance(made, NoiseSchedule), f"noise {made!r} is not a noise schedule")
        return made

    @field_serializer("noise")
    def _noise_out(self, value: NoiseSchedule) -> dict[str, Any]:
        return noise_to_dict(value)


class Timed(Noised):
    """A noise schedule and N+1 times.

    Args:
        noise: the noise schedule (a `NoiseSchedule` or its JSON form).
        times: N+1 strictly decreasing times within it; clean data at the lowest.
    """

    times: tuple[float, ...]

    def _check_times(self, n: int) -> None:
        """Raise a ScheduleError unless there are n + 1 sensible times for n >= 1 steps."""
        times = self.times
        need(n >= 1, "steps is empty: a schedule needs at least one step")
        need(len(times) == n + 1, f"{len(times)} times for {n} steps: give {n + 1} times")
        for i, (t, t_next) in enumerate(pairwise(times)):
            need(
                t > t_next,
                f"times[{i + 1}] = {t_next} is not below times[{i}] = {t}: times must decrease "
                "strictly",
            )
        names = [f"times[{i}]" for i in range(n + 1)]
        require_within(self.noise, dict(zip(names, times, strict=True)))


def require_within(noise: NoiseSchedule, times: Mapping[str, float]) -> None:
    """Raise a ScheduleError naming the first of some named times that `noise` does not have."""
    (top, _), low = noise.t_range, noise.t_data
    for name, t in times.items():
        need(t <= top * (1 + 1e-6), f"{name} = {t} is above the noise schedule's first time {top}")
        need(t >= low, f"{name} = {t} is below {low}, the time of clean data")
        need(
            low >= 0 or t == low or t > low + 0.5,
            f"{name} = {t}: below label {low + 0.5} only {low} (clean data) exists",
        )


class Replayable(Noised):
    """What a sampler asks of a schedule: a program, its noise schedule, image and options.

    Args:
        noise: the noise schedule (a `NoiseSchedule` or its JSON form).
        options: named run-time options that are not linear, e.g. {"threshold": {...}} (see
            `space.options`).
        provenance: where the schedule comes from; free JSON, not part of the digest.
    """

    options: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    _constant: Tensor | None = PrivateAttr(default=None)

    @field_validator("options")
    @classmethod
    def _options(cls, value: dict[str, Any]) -> dict[str, Any]:
        require_options(value)
        return value

    @property
    def constant(self) -> Tensor | None:
        """The constant image m, shape of one sample; None if the schedule carries none."""
        return self._constant

    @property
    def uses_constant(self) -> bool:
        """Whether the program has weights for a constant image."""
        return self._program.uses_constant

    def with_constant(self, m: Tensor) -> Self:
        """A copy that carries the constant image m, shape of one sample.

        Raises:
            ScheduleError: not a tensor of finite floating-point numbers.
        """
        need(
            isinstance(m, Tensor) and m.is_floating_point() and bool(torch.isfinite(m).all()),
            "the constant image must be a tensor of finite floating-point numbers",
        )
        copy = super().model_copy()
        copy._constant = m
        return copy

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """See `Frozen.model_copy`; the constant image is carried along."""
        copy = super().model_copy(update=update)
        copy._constant = self._constant
        return copy

    def __eq__(self, other: object) -> bool:
        """The same fields and the same image, number for number."""
        if type(self) is not type(other):
            return NotImplemented
        them = cast(Self, other)
        same = all(getattr(self, f) == getattr(them, f) for f in type(self).model_fields)
        a, b = self.constant, them.constant
        return same and (a is b if a is None or b is None else _bits(a) == _bits(b))

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def digest(self) -> str:
        """Hash of everything that decides a sample: equal digests are equal samplers.

        Program, noise schedule, options, the scale of x_T where the first query does not tell it,
        and the constant image (as float32) if the program uses one.
        """
        program = self._program
        parts: list[Any] = [program.digest, noise_to_dict(self.noise), self.options]
        start = cast(Any, self).start
        if start != (first := float(program.t[0])):
            scale = float(self.noise.prior_scale(start))
            if abs(scale - self.noise.prior_scale(first)) > 1e-9 * scale:
                parts.append({"start_scale": f"{scale:.11e}"})
        if self.constant is not None and self.uses_constant:
            parts.append({"constant": hashlib.sha256(_bits(self.constant.float())).hexdigest()})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    @property
    def _program(self) -> Program:
        return cast("Program", cast(Any, self).program)


def _bits(image: Tensor) -> bytes:
    """Shape and numbers of an image; -0 counts as 0."""
    data = image.detach().cpu().to(torch.float64) + 0.0
    return repr(tuple(data.shape)).encode() + data.contiguous().numpy().tobytes()


def require_nfe(found: object, nfe: int, what: str) -> None:
    """Raise a ScheduleError unless the `nfe` of a file is the number of calls it makes."""
    need(
        isinstance(found, int) and not isinstance(found, bool) and found == nfe,
        f"nfe is {found!r} in the file but its {what} make{'s' * (what[-1] != 's')} {nfe} calls",
    )


def read_numbers(value: object, name: str, size: int) -> Tensor:
    """A list of `size` finite numbers as a float64 tensor; a ScheduleError names what is wrong."""
    if not isinstance(value, list) or len(value) != size:
        raise ScheduleError(f"{name} must be a list of {size} numbers")
    for i, number in enumerate(value):
        need(is_number(number), f"{name}[{i}] is {_short(number)}: a finite number is needed")
    return torch.tensor(value, dtype=torch.float64)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def twelve_digits(value: object) -> object:
    """JSON with its numbers written to 12 significant digits, those below `TINY` as 0."""
    if isinstance(value, list):
        return [twelve_digits(v) for v in value]
    if isinstance(value, float):
        return "0" if abs(value) < TINY else f"{value:.11e}"
    return value
