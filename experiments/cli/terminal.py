"""What a search says while it runs, on a terminal or in a log.

On a terminal one line shows the stage, a bar over the network evaluations of the whole search and
the time left; elsewhere (a log file, a job) finished stages are printed and, every 30 s, the share
done, the rate and the time left. What turns out not to be needed is taken off the total.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fewstep.experiments.cli.announcing import announce, count
from fewstep.experiments.cli.page import Paged
from fewstep.search.display import duration

if TYPE_CHECKING:
    from fewstep.search.run import Search

_EVERY = 30.0
_GLANCE = 0.2  # seconds between looks at work that has not ended


class Terminal(Paged):
    """Shows a rich progress bar on a terminal, and plain lines elsewhere.

    Args:
        console: where to write; default standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            speed_estimate_period=60,
        )
        self._task: Any = self._progress.add_task("starting", total=None)
        self._said = self._begun = time.monotonic()
        self._stage, self._total, self._done = "starting", 0, 0
        self._working, self._glanced = 0, 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begins(self, run: Search, per_call: float) -> None:
        """See `Display`."""
        announce(run, per_call)

    def total(self, evaluations: int | None) -> None:
        """See `Display`."""
        self._progress.reset(self._task, total=evaluations)
        self._begun, self._total, self._done = time.monotonic(), evaluations or 0, 0

    def stage(self, text: str) -> None:
        """See `Display`."""
        self._stage = text
        self._progress.update(self._task, description=text)
        self._say()

    def advance(self, evaluations: int) -> None:
        """See `Display`."""
        self._done += evaluations
        self._show()

    def working(self, evaluations: int) -> None:
        """See `Display`."""
        self._working = evaluations
        if evaluations and time.monotonic() - self._glanced > _GLANCE:
            self._glanced = time.monotonic()
            self._show()

    def _show(self) -> None:
        """Move the bar, and say how far it is."""
        done = self._done + self._working
        self._progress.update(self._task, completed=min(done, self._total) or done)
        self._say()

    def saved(self, evaluations: int) -> None:
        """See `Display`."""
        if self._total:
            self._total = max(self._total - evaluations, self._done)
            self._progress.update(self._task, total=self._total)

    def _say(self) -> None:
        """The stage and how far it is, every 30 s where there is no bar to look at."""
        now = time.monotonic()
        if self.console.is_terminal or now - self._said < _EVERY:
            return
        text, seconds = self._stage, now - self._begun
        done = self._done + self._working
        if self._total and done:
            left = seconds * max(self._total - done, 0) / done
            text += f": {min(100 * done // self._total, 99)} %, "
            text += f"{count(int(done / seconds))} network evaluations a second, "
            text += f"about {duration(left)} left"
        self.note(text)

    def note(self, text: str) -> None:
        """See `Display`."""
        self._said = time.monotonic()
        self.console.print(text, highlight=False, soft_wrap=True)
