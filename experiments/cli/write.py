"""Commands that make things of schedules: sample, export, baseline, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.experiments.cli.app import Settings, app
from fewstep.space.errors import StudyError


@app.command(
    epilog="Example:  fewstep sample runs/demo/schedules/nfe05.json "
    "--study experiments/studies/digits.toml --n 16 --out digits.png"
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
    from fewstep.experiments.cli import drawing
    from fewstep.search.config import load_study
    from fewstep.search.work import Evaluator
    from fewstep.space import load_schedule

    if out.is_dir():
        raise StudyError(f"--out {out} is a folder: name a PNG file")
    schedule = load_schedule(file)
    evaluator = Evaluator.of(load_study(study, settings or []))
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
        str | None,
        typer.Option(
            "--to",
            help="diffusers, comfy, python, timesteps, sigma_list, denoising_step_list, sigmas "
            "or csv.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--prediction-type",
            help="With --to diffusers: what the network returns, if the file does not say.",
            show_default=False,
        ),
    ] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(
            "--pipeline",
            help="Folder of the diffusers pipeline it is for: refused if it does not fit.",
            show_default=False,
        ),
    ] = None,
    cpr: Annotated[
        Path | None,
        typer.Option(
            "--cpr",
            help="Instead of FILE: predict with it, a regression's file or a folder of programs "
            "fitted at several guidance scales.",
            show_default=False,
        ),
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
    from fewstep.experiments.cli import exporting
    from fewstep.experiments.cli.listing import read_config
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
    config = None if pipeline is None else read_config(pipeline)
    schedule = load_schedule(file)
    for path in exporting.export(schedule, form, folder, file.stem, kind, config):
        print(path)
    if form == "diffusers" and kind is None and config is None:
        print(
            f"note: for a network that returns {exporting.assumed_kind(schedule)}; "
            "--prediction-type or --pipeline says otherwise"
        )
    if form == "sigmas":
        print("note: the times only: another solver on them is another sampler")


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
    from fewstep.experiments.cli.importing import noise_settings
    from fewstep.space import baselines, save_schedule
    from fewstep.space.noise import noise_from_dict

    if study is not None:
        from fewstep.experiments.cli.exporting import write_named

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
    epilog="Examples:  fewstep import list.txt --from timesteps --solver dpmpp2m --out own.json   "
    "|   fewstep import my_pipeline --nfe 8 --out stock.json   |   "
    "fewstep import cifar10_edm_nfe5.pth --v3 identity --out usf05.json",
)
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            help="A list of levels, a diffusers pipeline or scheduler_config.json, or a published "
            "schedule.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Schedule file to write.")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            help="What FILE is: timesteps, sigmas, times, denoising_step_list, diffusers or usf; "
            "auto asks the file.",
        ),
    ] = "auto",
    solver: Annotated[
        str, typer.Option("--solver", help="Of a list: its solver, or NAME/low.")
    ] = "dpmpp2m",
    noise: Annotated[
        str | None,
        typer.Option(
            "--noise",
            help="Of a list: noise schedule (type:key=value,...), or a pipeline's folder; default "
            "Stable Diffusion's.",
            show_default=False,
        ),
    ] = None,
    nfe: Annotated[
        int, typer.Option("--nfe", min=1, help="Of a diffusers scheduler: network calls.")
    ] = 8,
    mu: Annotated[
        float | None,
        typer.Option("--mu", help="Of a scheduler that shifts dynamically.", show_default=False),
    ] = None,
    v3: Annotated[
        str, typer.Option(help="DPM-Solver-v3 steps: refuse, or identity (data prediction).")
    ] = "refuse",
    family: Annotated[
        str | None, typer.Option(help="Noise schedule of a .pth; default from its name.")
    ] = None,
) -> None:
    """Turn a list of levels, a diffusers scheduler or a published schedule into a file."""
    from fewstep.experiments.cli import listing

    known = ("auto", "diffusers", "usf", *listing.LISTS)
    if source not in known:
        raise StudyError(f"--from {source}: the formats known are: {', '.join(known)}")
    if not file.exists():
        raise StudyError(f"{file}: no such file")
    kind = listing.kind_of(file) if source == "auto" else source
    if kind == "usf":
        _import_usf(file, out, v3, family)
    elif kind == "diffusers":
        _import_config(file, out, nfe, mu)
    else:
        _import_list(file, out, None if source == "auto" else source, solver, noise)


def _import_list(file: Path, out: Path, kind: str | None, solver: str, noise: str | None) -> None:
    from fewstep.experiments.cli import listing
    from fewstep.experiments.cli.importing import noise_settings
    from fewstep.samplers.network import network_facts
    from fewstep.space import save_schedule
    from fewstep.space.noise import noise_from_dict

    kind, values = listing.read_list(file, kind)
    if noise is not None and Path(noise).exists():
        schedule_of = network_facts(listing.read_config(Path(noise))).noise
    else:
        said = listing.list_noise(file) if noise is None else noise_settings(noise)
        schedule_of = noise_from_dict(said)
    made, where = listing.from_list(kind, values, solver, schedule_of)
    path = save_schedule(made, out)
    print(
        f"{path}: {made.nfe} network calls of {solver} on these {kind}, noise schedule "
        f"{schedule_of.type}, ending at {where}"
    )


def _import_config(file: Path, out: Path, nfe: int, mu: float | None) -> None:
    from fewstep.experiments.cli import listing
    from fewstep.space import save_schedule

    config = listing.read_config(file)
    made = listing.from_config(config, nfe, mu)
    path = save_schedule(made, out)
    like = made.provenance.get("baseline")
    what = f"named solver {like}" if like else "a program without named steps"
    print(f"{path}: {made.nfe} network calls of {config.get('_class_name')}, {what}")


def _import_usf(file: Path, out: Path, v3: str, family: str | None) -> None:
    from fewstep.experiments.cli import explain
    from fewstep.experiments.cli.importing import import_usf
    from fewstep.space import save_schedule

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
