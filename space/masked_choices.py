"""The choices of a masked call that a search may leave open: ONE table, and what values may be.

A domain has a field for each: a list of values, the neutral one first, or a range (low, high) that
holds the neutral value. Parameters, moves, encoding and membership all follow from the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from fewstep.space.choices import Value
from fewstep.space.errors import ScheduleError
from fewstep.space.masked import CallSpec

__all__ = ["CHOICES", "NEUTRAL", "MaskedChoice", "require_open", "told"]


@dataclass(frozen=True)
class MaskedChoice:
    """A choice of a call that a domain may leave open.

    Args:
        name: field of `CallSpec`.
        field: field of `MaskedDomain`: values, the neutral one first, or (low, high).
        log: for a number, whether it is drawn and moved in its logarithm.
        off: the end of the range, 0 or 1, at which a number does nothing; None: neutral is inside.
        none: whether the number at that end is written as None.
    """

    name: str
    field: str
    log: bool | None = None
    off: int | None = None
    none: bool = False

    @property
    def number(self) -> bool:
        """Whether it is a number of a range; otherwise it is one of a few values."""
        return self.log is not None


CHOICES = (
    MaskedChoice("mode", "modes"),
    MaskedChoice("positions", "positions"),
    MaskedChoice("temperature", "temperature", log=True),
    MaskedChoice("top_p", "top_p", log=False, off=1),
    MaskedChoice("min_confidence", "min_confidence", log=False, off=1),
    MaskedChoice("max_entropy", "max_entropy", log=False, off=0),
    MaskedChoice("max_kl", "max_kl", log=True, off=1, none=True),
    MaskedChoice("kl_window", "kl_windows"),
    MaskedChoice("max_count", "max_counts"),
    MaskedChoice("block", "blocks"),
    MaskedChoice("hide_future", "hide_future"),
    MaskedChoice("ends_last", "ends_last"),
    MaskedChoice("remask", "remask", log=False, off=0),
    MaskedChoice("remask_by", "remask_by"),
)
NEUTRAL: dict[str, Any] = {name: info.default for name, info in CallSpec.model_fields.items()}


def told(value: Any) -> Value:
    """A value of a call as a parameter's: None is 0."""
    found: Value = 0 if value is None else value
    return found


def require_open(choice: MaskedChoice, open_: Any) -> None:
    """Refuse what a domain may not leave open.

    Raises:
        ScheduleError: values that a call cannot have, none or one twice; a range that is empty or
            does not hold the neutral value.
    """
    (_require_range if choice.number else _require_values)(choice, open_)


def _require_values(choice: MaskedChoice, open_: Any) -> None:
    """Refuse values that a call cannot have, or none."""
    name, known = choice.field, get_args(CallSpec.model_fields[choice.name].annotation)
    words = [v for v in known if isinstance(v, str)]
    if isinstance(NEUTRAL[choice.name], bool):
        good, told = all(isinstance(v, bool) for v in open_), "true, false"
    elif words:
        good, told = set(open_) <= set(words), ", ".join(words)
    else:
        least = 1 if choice.name == "kl_window" else 0
        good = all(isinstance(v, int) and v >= least for v in open_)
        told = f"whole numbers from {least}"
    if not open_ or not good or len(set(open_)) != len(open_):
        raise ScheduleError(f"domain: {name} must be out of {told}, each once")


def _require_range(choice: MaskedChoice, open_: Any) -> None:
    """Refuse a range that does not hold the neutral value, or that a call cannot have."""
    if open_ is None:
        return
    name = choice.field
    if len(open_) != 2 or not open_[0] < open_[1]:
        raise ScheduleError(f"domain: {name} {open_} must be a pair (low, high), low < high")
    low, high = open_
    if name == "temperature" and not 0 <= low <= 1 <= high:
        raise ScheduleError(f"domain: temperature {open_} must enclose 1 and not be negative")
    if name == "max_kl" and not low > 0:
        raise ScheduleError(f"domain: max_kl {open_} must be positive")
    if name in ("top_p", "min_confidence") and not (0 <= low and high == 1):
        raise ScheduleError(f"domain: {name} {open_} must end at 1, where it does nothing")
    if name in ("max_entropy", "remask") and low != 0:
        raise ScheduleError(f"domain: {name} {open_} must begin at 0, where it does nothing")
    if name == "remask" and not high < 1:
        raise ScheduleError(f"domain: remask {open_} must end below 1")
