"""Run-time options: what a schedule asks of the executor that is not linear in the outputs.

Each is named in `options` of a schedule and checked where the schedule is made. Whoever replays a
schedule runs all of its options or refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

from fewstep.space.errors import ScheduleError, is_number

SEMANTICS = ("paper", "pnm")


class _Option:
    """One option: a frozen dataclass of its settings, read from its JSON object."""

    name: ClassVar[str]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The settings of this option in a schedule's `options`.

        Raises:
            ScheduleError: a missing, unknown or impossible setting; it is named.
        """
        option, known = options[cls.name], fields(cls)  # type: ignore[arg-type]
        where = f"options.{cls.name}"
        if not isinstance(option, Mapping):
            raise ScheduleError(f"{where} is {option!r}: an object with its settings is needed")
        for name in option:
            if name not in {f.name for f in known}:
                names = ", ".join(f.name for f in known)
                raise ScheduleError(f"{where}.{name} is unknown: use {names}")
        for f in known:
            if f.default is MISSING and f.name not in option:
                raise ScheduleError(f"{where}.{f.name} is missing")
        return cls(**option)

    def _require(self, *checks: tuple[bool, str]) -> None:
        for holds, message in checks:
            if not holds:
                raise ScheduleError(f"options.{self.name}.{message}")


@dataclass(frozen=True)
class Threshold(_Option):
    """`options["threshold"]`: data predictions clipped (see `samplers.ode.threshold`).

    Args:
        quantile: share of |D| below the clip, over one sample, 0..1; 0 clips all at `minimum`.
        minimum: the clip is at least this, > 0.
        maximum: the clip is at most this, >= minimum [no limit].
    """

    quantile: float = 0.995
    minimum: float = 1.0
    maximum: float = math.inf
    name: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        self._require(
            (
                is_number(self.quantile) and 0 <= self.quantile <= 1,
                f"quantile {self.quantile!r} must be a number from 0 to 1",
            ),
            (
                is_number(self.minimum) and self.minimum > 0,
                f"minimum {self.minimum!r} must be a number above 0",
            ),
            (
                self.maximum == math.inf
                or (is_number(self.maximum) and self.maximum >= self.minimum),
                f"maximum {self.maximum!r} must be a number from minimum up",
            ),
        )


@dataclass(frozen=True)
class VarianceRule(_Option):
    """`options["time_shift"]`: the variance-driven time shift (see `samplers.shift`).

    Args:
        rule: "variance", the only one.
        window: half-width in training steps, an integer >= 0; 0 is off.
        cutoff: no shift at or below this time, in model time.
        semantics: "paper" or "pnm".
        per: one shift per "image", or per "batch" from the mean variance.
        data_variance: v, the variance of the data per pixel, >= 0; 0 is the published rule.
    """

    rule: str
    window: int
    cutoff: float
    semantics: str = "paper"
    per: str = "image"
    data_variance: float = 0.0
    name: ClassVar[str] = "time_shift"

    def __post_init__(self) -> None:
        whole = isinstance(self.window, int) and not isinstance(self.window, bool)
        self._require(
            (self.rule == "variance", f"rule {self.rule!r} is unknown: use 'variance'"),
            (is_number(self.cutoff), f"cutoff {self.cutoff!r} must be a time"),
            (
                whole and self.window >= 0,
                f"window {self.window!r} must be a whole number of training steps, 0 or more",
            ),
            (
                self.semantics in SEMANTICS,
                f"semantics {self.semantics!r} is unknown: use one of {', '.join(SEMANTICS)}",
            ),
            (self.per in ("image", "batch"), f"per {self.per!r} must be 'image' or 'batch'"),
            (
                is_number(self.data_variance) and self.data_variance >= 0,
                f"data_variance {self.data_variance!r} must be 0 or more",
            ),
        )


OPTIONS: dict[str, type[_Option]] = {o.name: o for o in (Threshold, VarianceRule)}


def require_options(options: Mapping[str, Any], known: Mapping[str, Any] = OPTIONS) -> None:
    """Raise a ScheduleError unless every option is known and its settings make sense."""
    for name in options:
        if name not in known:
            raise ScheduleError(f"options.{name} is unknown: use {', '.join(known)}")
        OPTIONS[name].of(options)
