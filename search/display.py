"""What a search says while it runs, here to nobody; the terminal's form is the command line's."""

from __future__ import annotations

from typing import Self


class Display:
    """Where progress is shown; also a context. This one shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def total(self, evaluations: int | None) -> None:
        """The network evaluations expected in all; None if unknown (a budget in seconds)."""

    def stage(self, text: str) -> None:
        """What is being done now."""

    def advance(self, evaluations: int) -> None:
        """More network evaluations are done."""

    def working(self, evaluations: int) -> None:
        """Network evaluations of work that has not ended, until now."""

    def saved(self, evaluations: int) -> None:
        """So many of the expected network evaluations will not be needed."""

    def note(self, text: str) -> None:
        """A line to keep."""


def duration(seconds: float) -> str:
    """Seconds in words, e.g. "3 min 20 s"."""
    if seconds < 1:
        return "under a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        rest = round((seconds - 60 * int(seconds // 60)) / 10) * 10
        return (
            f"{int(seconds // 60)} min {rest} s"
            if rest < 60
            else f"{int(seconds // 60) + 1} min 0 s"
        )
    return f"{minutes / 60:.1f} h"


def count(number: int) -> str:
    """A large number in short, e.g. "2.1 M"."""
    if number >= 1_000_000:
        return f"{number / 1e6:.1f} M"
    return f"{number / 1e3:.0f} k" if number >= 10_000 else str(number)
