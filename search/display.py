"""What a search shows, here nothing: the command line brings a terminal, pictures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from fewstep.search.run import Search
    from fewstep.search.verdict import Verdict


class Display:
    """Where progress is shown; also a context. This one shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def begins(self, run: Search, per_call: float) -> None:
        """What the search is about to do; `per_call` seconds of a network evaluation, measured."""

    def ends(self, run: Search, verdicts: Sequence[Verdict]) -> Sequence[Path]:
        """What it found, before its workers leave; files made in its folder, to be tracked."""
        return ()

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
    """Seconds in words, at least one, e.g. "3 min 20 s"."""
    if seconds < 100:
        return f"{max(1, seconds):.0f} s"
    if round(seconds / 60) < 100:
        minutes, rest = divmod(round(seconds / 10) * 10, 60)
        return f"{minutes} min {rest} s"
    return f"{round(seconds / 60) / 60:.1f} h"
