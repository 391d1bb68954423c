"""Commands that look at schedule files: show, lint, compare, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.experiments.cli.app import Settings, app, console
from fewstep.space.errors import FewstepError, StudyError

if TYPE_CHECKING:
    from fewstep.samplers.network import NetworkFacts


@app.command(epilog="Example:  fewstep show runs/demo/schedules/nfe05.json")
def show(
    file: Annotated[
        Path, typer.Argument(help="Schedule file.", metavar="FILE", show_default=False)
    ],
) -> None:
    """Explain a schedule step by step; neutral values are greyed."""
    from fewstep.experiments.cli import explain
    from fewstep.space import load_schedule

    schedule = load_schedule(file)
    screen = console()
    for line in explain.headline(schedule):
        screen.print(line, highlight=False, soft_wrap=True)
    screen.print(explain.steps_table(schedule))


@app.command(
    epilog="Examples:  fewstep lint runs/demo/schedules/*.json   |   "
    "fewstep lint nfe05.json --pipeline my_pipeline"
)
def lint(
    files: Annotated[
        list[Path], typer.Argument(help="Schedule files.", metavar="FILE...", show_default=False)
    ],
    pipeline: Annotated[
        Path | None,
        typer.Option(
            "--pipeline",
            help="Folder of a diffusers pipeline: say, fact by fact, whether the files fit it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check schedule files: what they say, and that their programs are what they say."""
    from fewstep.experiments.cli import explain
    from fewstep.space import load_schedule

    network = None
    if pipeline is not None:
        from fewstep.experiments.cli.listing import read_config
        from fewstep.samplers.network import network_facts

        network = network_facts(read_config(pipeline))
    wrong = 0
    for file in files:
        try:
            schedule = load_schedule(file)
        except FewstepError as error:
            wrong += 1
            print(f"fewstep: error: {error}", file=sys.stderr)
        else:
            print(f"{file}: ok, {schedule.kind}, {schedule.nfe} calls")
            for note in explain.missing(schedule):
                print(f"{file}: note: {note}")
            if network is not None:
                wrong += _unfit(file, schedule, network)
    if wrong:
        raise typer.Exit(2)


def _unfit(file: Path, schedule: object, network: NetworkFacts) -> bool:
    """Print the facts of a file and a pipeline; whether one is refused."""
    from fewstep.samplers.fits import facts
    from fewstep.space import OdeSchedule, ProgramSchedule

    if not isinstance(schedule, OdeSchedule | ProgramSchedule):
        print(f"{file}: refused: its kind does not run in a diffusers pipeline", file=sys.stderr)
        return True
    table = facts(schedule, network)
    for fact in table:
        refused = fact.verdict == "refused"
        line = f"{file}: {fact.verdict}: {fact.name}: {fact.line}"
        print(line, file=sys.stderr if refused else sys.stdout)
    return any(fact.verdict == "refused" for fact in table)


STATISTICS = (
    ("median", "median"),
    ("mean", "mean"),
    ("90 %q", "q90"),
    ("worse", "share_worse"),
    ("tail index", "tail_index"),
)


@app.command(
    epilog="Example:  fewstep compare runs/demo/schedules/nfe05.json ipndm3.json "
    "--study experiments/studies/digits.toml"
)
def compare(
    first: Annotated[Path, typer.Argument(help="Schedule file.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Schedule file.", metavar="B")],
    study: Annotated[
        Path | None,
        typer.Option("--study", help="Also score both with this study's model."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=2, help="Samples to score on.")
    ] = 256,
    settings: Settings = None,
) -> None:
    """Say what differs between two schedules and, with a study, how their scores compare."""
    from fewstep.experiments.cli import explain
    from fewstep.space import load_schedule

    a, b = load_schedule(first), load_schedule(second)
    lines = explain.differences(a, b)
    for line in lines or ["the same sampler"]:
        print(line)
    if study is None:
        return
    import tempfile

    from rich.table import Table

    from fewstep.experiments.cli import page
    from fewstep.experiments.cli.drawing import compare_scores
    from fewstep.search.config import load_study

    config = load_study(study, settings or [])
    with tempfile.TemporaryDirectory() as cache:
        rows = compare_scores([(str(first), a), (str(second), b)], config, samples, Path(cache))
    table = Table(title=f"{rows[0].objective}, {samples} samples, same noise")
    heads = ("schedule", "NFE", "score", "ratio to A", "95 %", *(name for name, _ in STATISTICS))
    for head in heads:
        table.add_column(head, no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            str(row.nfe),
            f"{row.score:.4g}",
            page.share(row.ratio),
            page.span(row.interval),
            *(
                "–" if row.comparison is None else f"{getattr(row.comparison, key):.3f}"
                for _, key in STATISTICS
            ),
        )
    table.caption = "score and ratio: the study's statistic; then ratios to A of other statistics"
    console().print(table)


@app.command(
    epilog="Examples:  fewstep report runs/demo   |   "
    "fewstep report nfe05.json --study experiments/studies/digits.toml"
)
def report(
    what: Annotated[
        Path,
        typer.Argument(
            help="Folder of a search, or a schedule file.", metavar="DIR|FILE", show_default=False
        ),
    ],
    study: Annotated[
        Path | None,
        typer.Option(
            "--study",
            help="Study file: for a schedule file; for a folder whose model's module lies beside "
            "the study file.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=2, help="Fresh samples of each score.")
    ] = 256,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="PNG to write; default decisions.png, in the folder.",
            show_default=False,
        ),
    ] = None,
    mattered: Annotated[
        bool, typer.Option("--decisions/--no-decisions", help="Score decisions, or only tables.")
    ] = True,
    settings: Settings = None,
    log: Annotated[
        bool, typer.Option("--log", help="Send MLflow what a search could not send, and leave.")
    ] = False,
) -> None:
    """Say what a search found, and which decisions of its schedules mattered at which step."""
    if log:
        from fewstep.experiments.cli.reporting import send_kept

        sent = send_kept(what, print)
        print(f"{sent} reports sent" if sent else f"{what}: nothing waits for MLflow")
        return
    from fewstep.experiments.cli import closing, decisions, reporting
    from fewstep.experiments.cli.terminal import Terminal

    if out is not None and out.is_dir():
        raise StudyError(f"--out {out} is a folder: name a PNG file")
    screen = console()
    folder = what if not what.is_file() else None
    if folder is None:
        found = reporting.of_file(what, study, settings or [], samples, Terminal())
    else:
        if settings:
            raise StudyError("--set goes with a schedule file: a search's settings are its own")
        rows, objective = reporting.rows_of(folder)
        screen.print(*closing.closing(rows, objective, folder), sep="\n", highlight=False)
        if not mattered:
            return
        if len({row.guidance for row in rows}) > 1:
            print(f"which decisions mattered: fewstep report {folder}/w{rows[-1].guidance:g}")
            return
        found = reporting.of_folder(folder, rows, study, samples, Terminal())
        if not found:
            return
    for explained in found:
        screen.print(decisions.decisions_table(explained))
    picture = decisions.decisions_picture(out or (folder or Path()) / "decisions.png", found)
    if folder is not None:
        decisions.add_section(folder / "report.html", found, picture)
    for explained in found:
        for line in decisions.words(explained):
            screen.print(line, highlight=False, soft_wrap=True)
    screen.print(str(picture), highlight=False, soft_wrap=True)
