"""The application that the commands register with, and what they share.

Heavy imports stay inside the commands, so that help and completion answer at once and the commands
for schedule files need no search libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="fewstep",
    help="Find the solver schedule that samples a diffusion model best in few network calls, "
    "and replay it anywhere.",
    epilog="Start with:  fewstep search STUDY.toml --out runs/mine   "
    "then   fewstep show runs/mine/schedules/nfe05.json",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a setting: table.key=value (repeatable).",
        metavar="KEY=VALUE",
        show_default=False,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the search in --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Discard the search in --out.")]
File = Annotated[Path, typer.Argument(help="Schedule file.", metavar="FILE", show_default=False)]


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


def console() -> Any:
    """A rich console, 160 columns wide where it is no terminal."""
    from rich.console import Console

    made = Console()
    if not made.is_terminal:
        made.width = 160
    return made
