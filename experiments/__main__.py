"""The command line: `fewstep --help`.

Every error this project raises on purpose ends as one line on standard error and exit code 2.
The commands are in `experiments/cli/`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import typer

from fewstep.experiments.cli import schema, search, show, submit, write
from fewstep.experiments.cli.app import app
from fewstep.space.errors import FewstepError

__all__ = ["app", "main", "schema", "search", "show", "submit", "write"]

# Newer typers carry their own copy of click: its root error is found through what typer exports.
_USAGE: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


_INTERRUPTED, _TERMINATED = 130, 143
_received: list[int] = []


def _terminate(number: int, frame: Any) -> None:
    """A job is told to stop by SIGTERM: its runs and workers end as Ctrl-C ends them."""
    _received.append(number)
    raise KeyboardInterrupt


def _interrupted() -> None:
    word, code = ("terminated", _TERMINATED) if _received else ("interrupted", _INTERRUPTED)
    _fail(f"{word}; a search goes on with --resume", code)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; one-line errors."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code: Any = app(arguments, standalone_mode=False)
    except FewstepError as error:
        _fail(str(error), 2)
    except _USAGE as error:
        _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        _interrupted()
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror}{where}: make room; a search goes on with --resume", 2)
    else:
        if code == _INTERRUPTED:  # typer's own answer to a KeyboardInterrupt
            _interrupted()
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"fewstep: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
