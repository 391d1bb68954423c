"""The one family of errors. A message is one line: what is wrong, where, and what to change."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator


class FewstepError(Exception):
    """Root of every error this project raises on purpose."""


class ScheduleError(FewstepError, ValueError):
    """A schedule, a noise schedule or a schedule file that cannot mean anything."""


class ModelError(FewstepError, RuntimeError):
    """A model that breaks the Denoiser contract: wrong shape, NaN, missing file."""


class StudyError(FewstepError, ValueError):
    """A study file, a search option or an output folder that cannot be used."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an exception says, in one line; its type's name where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextlib.contextmanager
def blamed(setting: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors, by default ScheduleErrors, into a StudyError that names a study's setting."""
    caught = kinds or (ScheduleError,)
    try:
        yield
    except caught as error:
        raise StudyError(f"{setting}: {error}") from None


def need(condition: bool, message: str) -> None:
    """Raise a ScheduleError with this message unless the condition holds."""
    if not condition:
        raise ScheduleError(message)


def is_number(x: object) -> bool:
    """Whether a value of a file is a finite number that a float can hold."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        return False
    try:
        return math.isfinite(float(x))
    except OverflowError:
        return False
