"""The command that searches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fewstep.experiments.cli.app import Overwrite, Resume, Settings, app, console
from fewstep.experiments.cli.piping import spread, write_study
from fewstep.space.errors import StudyError


class _Search(TyperCommand):
    """Takes several numbers after one --nfe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click."""
        parsed: list[str] = super().parse_args(ctx, spread(args, "--nfe"))
        return parsed


@app.command(
    cls=_Search,
    epilog="Examples:  fewstep search experiments/studies/digits.toml --out runs/demo "
    "--set search.samples=128   |   "
    "fewstep search --pipeline my_pipeline --prompts prompts.txt --nfe 4 6 8 --out runs/mine",
)
def search(
    study: Annotated[
        Path | None,
        typer.Argument(help="Study file (TOML).", metavar="STUDY.toml", show_default=False),
    ] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(
            "--pipeline",
            help="Instead of a study: folder of a saved diffusers pipeline.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="With --pipeline: file with one prompt a line.", show_default=False
        ),
    ] = None,
    nfe: Annotated[
        list[int] | None,
        typer.Option("--nfe", min=1, help="With --pipeline: network calls.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for what the search leaves; default runs/NAME.",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy", help="Short for --set search.strategy=NAME.", show_default=False
        ),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
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
    from fewstep.experiments.cli.submit import lasting
    from fewstep.search.cluster import in_job
    from fewstep.search.config import load_study

    overrides = list(settings or [])
    if strategy is not None:
        overrides.append(f"search.strategy={strategy}")
    if resume and overwrite:
        raise StudyError("--resume and --overwrite contradict each other: give one")
    if (study is None) == (pipeline is None):
        raise StudyError("give a study file, or --pipeline DIR, and not both")
    if pipeline is not None:
        out = out or Path("runs") / pipeline.resolve().name
        study = write_study(pipeline, prompts, nfe or [], out, keep=resume)
        print(f"study: {study}", flush=True)
    elif prompts is not None or nfe:
        raise StudyError("--prompts and --nfe go with --pipeline: a study file has its own")
    assert study is not None
    config = load_study(study, overrides)
    if in_job():
        config = lasting(config, out)
    from fewstep.experiments.cli import closing
    from fewstep.experiments.cli.addresses import check_address
    from fewstep.experiments.cli.announcing import places
    from fewstep.experiments.cli.page import Paged
    from fewstep.experiments.cli.terminal import Terminal
    from fewstep.search import run
    from fewstep.search.display import duration

    if config.search.workers != 0 or address is not None:
        check_address(address)
    folder = out or Path("runs") / config.name
    display = Paged() if quiet else Terminal()
    outcome = run.search(
        config, folder, resume=resume, overwrite=overwrite, address=address, display=display
    )
    screen = console()
    tables = closing.closing(outcome.rows, outcome.objective, folder, named=not quiet)
    screen.print(*tables, sep="\n", highlight=False)
    each = len(config.search.guidance or ()) > 1
    where = f"in {outcome.out}{' and its folder of each scale' if each else ''}"
    more = {"highlight": False, "soft_wrap": True}
    said = f"{duration(outcome.seconds)}; schedules, pictures and report.html are {where}"
    screen.print(said, **more)
    if in_job():
        screen.print(places(config, folder, config.name), **more)
    if any(row.failed_stage for row in outcome.rows):
        raise typer.Exit(3)
