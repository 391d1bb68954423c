"""The command line: `fewstep --help`.

Every error this project raises on purpose ends as one line on standard error and exit code 2. Heavy imports stay inside the commands, so
that help and completion answer at once and the commands for schedule files need no search libraries.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.space.errors import FewstepError, StudyError

# Typer carries its own copy of click from 0.2x on and imports click before: its error is found through what both export.
_USAGE: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="fewstep",
    help="Find the solver schedule that samples a diffusion model best in few network calls, and replay it anywhere.",
    epilog="Start with:  fewstep search STUDY.toml --out runs/mine   then   fewstep show runs/mine/schedules/nfe05.json",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"fewstep {version('fewstep')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and leave.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options before the command."""


@app.command(
    epilog="Example:  fewstep search experiments/digits.toml --out runs/demo --set search.samples=128"
)
def search(
    study: Annotated[
        Path, typer.Argument(help="Study file (TOML).", metavar="STUDY.toml", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for what the search leaves; default runs/NAME.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override a setting: table.key=value (repeatable).",
            metavar="KEY=VALUE",
            show_default=False,
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy", help="Short for --set search.strategy=NAME.", show_default=False
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard the search in --out.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="Ray cluster to use: auto, host:port or ray://host:port.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the closing table only.")
    ] = False,
) -> None:
    """Find schedules for the model of a study, and the evidence that they are better."""
    from fewstep.search.config import load_study

    overrides = list(settings or [])
    if strategy is not None:
        overrides.append(f"search.strategy={strategy}")
    config = load_study(study, overrides)
    if resume and overwrite:
        raise StudyError("--resume and --overwrite contradict each other: give one")
    from rich.console import Console

    from fewstep.search import report, run
    from fewstep.search.display import Silent, Terminal, duration

    folder = out or Path("runs") / config.name
    display = Silent() if quiet else Terminal()
    outcome = run.search(
        config, folder, resume=resume, overwrite=overwrite, address=address, display=display
    )
    console = Console()
    if not console.is_terminal:
        console.width = 118
    if not quiet:
        console.print(report.named_table(outcome.rows))
    console.print(report.results_table(outcome.rows, config.objective.name))
    console.print(
        f"{duration(outcome.seconds)}; schedules, pictures and report.html are in {outcome.out}",
        highlight=False,
        soft_wrap=True,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; one-line errors."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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
