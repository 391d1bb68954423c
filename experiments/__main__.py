"""The command line: `fewstep --help`.

Every error this project raises on purpose ends as one line on standard error and exit code 2.
The commands are in `experiments/cli/`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import typer

from fewstep.experiments.cli import schema, search, show, write
from fewstep.experiments.cli.app import app
from fewstep.space.errors import FewstepError

__all__ = ["app", "main", "schema", "search", "show", "write"]

# Newer typers carry their own copy of click: its root error is found through what typer exports.
_USAGE: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; one-line errors."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A stopped job is told so by SIGTERM: end its MLflow runs and workers as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: Any = app(arguments, standalone_mode=False)
    except FewstepError as error:
        _fail(str(error), 2)
    except typer.Abort:
        _fail("interrupted; a search goes on with --resume", 130)
    except _USAGE as error:
        _fail(error.format_message(), 2)
    except KeyboardInterrupt:
        _fail("interrupted; a search goes on with --resume", 130)
    except BrokenPipeError:
        sys.exit(1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"fewstep: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
