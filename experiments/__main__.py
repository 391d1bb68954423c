"""The command line: `fewstep --help`.

Every error this project raises on purpose ends as one line on standard error and exit code 2.
Heavy imports stay inside the commands, so that help and completion answer at once and the commands
for schedule files need no search libraries.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.space.errors import FewstepError, StudyError

# Newer typers carry their own copy of click: its root error is found through what typer exports.
_USAGE: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

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


@app.command(
    epilog="Example:  fewstep search experiments/digits.toml --out runs/demo "
    "--set search.samples=128"
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
    settings: Settings = None,
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
    from fewstep.experiments import explain
    from fewstep.search import run
    from fewstep.search.display import Silent, Terminal, duration

    folder = out or Path("runs") / config.name
    display = Silent() if quiet else Terminal()
    outcome = run.search(
        config, folder, resume=resume, overwrite=overwrite, address=address, display=display
    )
    console = _console()
    closing = explain.closing(outcome.rows, outcome.objective, folder, named=not quiet)
    console.print(*closing, sep="\n", highlight=False)
    each = len(config.search.guidance or ()) > 1
    where = f"in {outcome.out}{' and its folder of each scale' if each else ''}"
    console.print(
        f"{duration(outcome.seconds)}; schedules, pictures and report.html are {where}",
        highlight=False,
        soft_wrap=True,
    )


@app.command(epilog="Example:  fewstep show runs/demo/schedules/nfe05.json")
def show(
    file: Annotated[
        Path, typer.Argument(help="Schedule file.", metavar="FILE", show_default=False)
    ],
) -> None:
    """Explain a schedule step by step; neutral values are greyed."""
    from fewstep.experiments import explain
    from fewstep.space import load_schedule

    schedule = load_schedule(file)
    console = _console()
    for line in explain.headline(schedule):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(explain.steps_table(schedule))


@app.command(epilog="Example:  fewstep lint runs/demo/schedules/*.json")
def lint(
    files: Annotated[
        list[Path], typer.Argument(help="Schedule files.", metavar="FILE...", show_default=False)
    ],
) -> None:
    """Check schedule files: what they say, and that their programs are what they say."""
    from fewstep.experiments import explain
    from fewstep.space import load_schedule

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
    if wrong:
        raise typer.Exit(2)


@app.command(
    epilog="Example:  fewstep compare runs/demo/schedules/nfe05.json ipndm3.json "
    "--study experiments/digits.toml"
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
    from fewstep.experiments import explain
    from fewstep.space import load_schedule

    a, b = load_schedule(first), load_schedule(second)
    lines = explain.differences(a, b)
    for line in lines or ["the same sampler"]:
        print(line)
    if study is None:
        return
    import tempfile

    from rich.table import Table

    from fewstep.experiments.drawing import compare_scores
    from fewstep.search.config import load_study

    config = load_study(study, settings or [])
    with tempfile.TemporaryDirectory() as cache:
        rows = compare_scores([(str(first), a), (str(second), b)], config, samples, Path(cache))
    table = Table(title=f"{rows[0].objective}, {samples} samples, same noise")
    for head in ("schedule", "NFE", "mean", "median", "ratio to A", "95%"):
        table.add_column(head, no_wrap=True)
    for row in rows:
        median = "–" if row.median is None else f"{row.median:.4g}"
        low, high = row.interval
        cells = (row.name, str(row.nfe), f"{row.score:.4g}", median, f"{row.ratio:.3f}")
        table.add_row(*cells, f"{low:.3f}–{high:.3f}")
    _console().print(table)


@app.command(
    epilog="Example:  fewstep sample runs/demo/schedules/nfe05.json "
    "--study experiments/digits.toml --n 16 --out digits.png"
)
def sample(
    file: Annotated[
        Path, typer.Argument(help="Schedule file.", metavar="FILE", show_default=False)
    ],
    study: Annotated[Path, typer.Option("--study", help="Study file that names the model.")],
    count: Annotated[int, typer.Option("--n", "-n", min=1, max=4096, help="Samples.")] = 16,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write.")] = Path("samples.png"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise.")] = 0,
    settings: Settings = None,
) -> None:
    """Draw samples with a schedule and the model of a study."""
    from fewstep.experiments import drawing
    from fewstep.search.config import load_study
    from fewstep.search.evaluate import Evaluator
    from fewstep.search.preparing import evaluator_spec
    from fewstep.space import load_schedule

    if out.is_dir():
        raise StudyError(f"--out {out} is a folder: name a PNG file")
    schedule = load_schedule(file)
    evaluator = Evaluator.from_spec(evaluator_spec(load_study(study, settings or [])))
    evaluator.seed = seed
    x = drawing.draw(schedule, evaluator, count, str(file))
    out.parent.mkdir(parents=True, exist_ok=True)
    drawing.sheet(out, x, evaluator.problem, file.stem)
    print(f"{out}: {count} samples, {schedule.nfe} network calls each")


@app.command(
    epilog="Examples:  fewstep export FILE --to diffusers my_pipeline/scheduler   |   "
    "fewstep export FILE --to csv tables   |   "
    "fewstep export --cpr runs/mine/cpr.json --nfe 7 --guidance 6 --out nfe07_w6.json"
)
def export(
    file: Annotated[
        Path | None, typer.Argument(help="Schedule file.", metavar="FILE", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder to write into.", metavar="DIR", show_default=False),
    ] = None,
    form: Annotated[
        str | None, typer.Option("--to", help="diffusers, sigmas or csv.", show_default=False)
    ] = None,
    cpr: Annotated[
        Path | None,
        typer.Option("--cpr", help="Instead of FILE: predict with it.", show_default=False),
    ] = None,
    nfe: Annotated[
        int | None, typer.Option("--nfe", min=1, help="With --cpr: calls.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="With --cpr: guidance scale.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="With --cpr: schedule file.", show_default=False),
    ] = None,
    outside: Annotated[
        str, typer.Option(help="Beyond what --cpr was fitted to: refuse, or neutral.")
    ] = "refuse",
) -> None:
    """Write a schedule in the form of another tool, or one that nobody searched."""
    from fewstep.experiments import exporting
    from fewstep.space import load_schedule

    if cpr is not None:
        if file is not None or form is not None:
            raise StudyError("--cpr takes the place of FILE, DIR and --to: give --out FILE")
        for line in exporting.predict(cpr, nfe, guidance, out, outside):
            print(line)
        return
    if nfe is not None or guidance is not None or out is not None:
        raise StudyError("--nfe, --guidance and --out need --cpr FILE")
    if file is None or folder is None or form is None:
        raise StudyError("give FILE --to FORM DIR, or --cpr FILE --nfe N --out FILE")
    for path in exporting.export(load_schedule(file), form, folder, file.stem):
        print(path)


@app.command(
    epilog="Examples:  fewstep baseline dpmpp2m/logsnr --nfe 8 --noise vp_linear "
    "--out dpmpp2m.json   |   fewstep baseline list"
)
def baseline(
    name: Annotated[
        str, typer.Argument(help="solver/grid or solver/grid/low; 'list' names them all.")
    ],
    nfe: Annotated[int, typer.Option("--nfe", min=1, help="Network calls.")] = 8,
    noise: Annotated[
        str,
        typer.Option(
            "--noise",
            help="Noise schedule: its type, or type:key=value,..., or its JSON.",
        ),
    ] = "vp_linear",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Schedule file to write.")
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option("--study", help="Take the noise, and the kind of schedules, of its model."),
    ] = None,
) -> None:
    """Write a named solver, or another named schedule, as a schedule file."""
    from fewstep.experiments.importing import noise_settings
    from fewstep.space import baselines, save_schedule
    from fewstep.space.noise import noise_from_dict

    if study is not None:
        from fewstep.experiments.exporting import write_named

        print(write_named(name, study, nfe, out))
        return
    if name == "list":
        print("solvers:", ", ".join(baselines.SOLVERS))
        print("grids:  ", ", ".join(baselines.GRIDS))
        return
    schedule = baselines.baseline(name, noise_from_dict(noise_settings(noise)), nfe)
    path = save_schedule(schedule, out or Path(f"{name.replace('/', '-')}-nfe{nfe:02d}.json"))
    print(path)


@app.command(
    "import",
    epilog="Example:  fewstep import cifar10_edm_nfe5.pth --v3 identity --out usf05.json",
)
def import_(
    file: Annotated[
        Path, typer.Argument(help="Published schedule.", metavar="FILE", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Schedule file to write.")],
    source: Annotated[str, typer.Option("--from", help="Whose format: usf.")] = "usf",
    v3: Annotated[
        str, typer.Option(help="DPM-Solver-v3 steps: refuse, or identity (data prediction).")
    ] = "refuse",
    family: Annotated[
        str | None, typer.Option(help="Noise schedule of a .pth; default from its name.")
    ] = None,
) -> None:
    """Read a schedule that others published."""
    from fewstep.experiments import explain
    from fewstep.experiments.importing import import_usf
    from fewstep.space import save_schedule

    if source != "usf":
        raise StudyError(f"--from {source}: the formats known are: usf")
    if v3 not in ("refuse", "identity"):
        raise StudyError(f"--v3 {v3}: use refuse or identity")
    schedule = import_usf(file, v3="identity" if v3 == "identity" else "refuse", family=family)
    print(save_schedule(schedule, out))
    if "skip_coefficients" in schedule.provenance:
        print(
            "note: the file also scales the network's skip connections; that edits the network, "
            "not the solver, and is kept in provenance only"
        )
    for note in explain.missing(schedule):
        print(f"note: {note}")


@app.command(
    epilog="Examples:  fewstep report runs/demo   |   "
    "fewstep report nfe05.json --study experiments/digits.toml"
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
) -> None:
    """Say what a search found, and which decisions of its schedules mattered at which step."""
    from fewstep.experiments import explain, reporting
    from fewstep.search import decisions
    from fewstep.search.display import Terminal

    if out is not None and out.is_dir():
        raise StudyError(f"--out {out} is a folder: name a PNG file")
    console = _console()
    folder = what if not what.is_file() else None
    if folder is None:
        found = reporting.of_file(what, study, settings or [], samples, Terminal())
    else:
        if settings:
            raise StudyError("--set goes with a schedule file: a search's settings are its own")
        rows, objective = reporting.rows_of(folder)
        console.print(*explain.closing(rows, objective, folder), sep="\n", highlight=False)
        if not mattered:
            return
        if len({row.guidance for row in rows}) > 1:
            print(f"which decisions mattered: fewstep report {folder}/w{rows[-1].guidance:g}")
            return
        found = reporting.of_folder(folder, rows, study, samples, Terminal())
        if not found:
            return
    for explained in found:
        console.print(decisions.decisions_table(explained))
    picture = decisions.decisions_picture(out or (folder or Path()) / "decisions.png", found)
    if folder is not None:
        decisions.add_section(folder / "report.html", found, picture)
    for explained in found:
        for line in decisions.words(explained):
            console.print(line, highlight=False, soft_wrap=True)
    console.print(str(picture), highlight=False, soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


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
