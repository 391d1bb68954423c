"""A schedule file in the forms of other tools."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from fewstep.experiments.cli.explain import Loaded
from fewstep.space import save_schedule
from fewstep.space.errors import FewstepError, StudyError
from fewstep.space.masked import MaskedSchedule
from fewstep.space.particles import ParticleSchedule

_OF_KIND = {"masked": ("csv",), "particles": ("csv", "sigmas")}
"""The forms of kinds that have no program."""


def export(schedule: Loaded, form: str, folder: Path, stem: str) -> list[Path]:
    """Write a schedule into a folder.

    Args:
        schedule: a loaded schedule.
        form: one of `FORMS`.
        folder: made if absent.
        stem: name of the file without its ending.

    Returns:
        The files written.

    Raises:
        StudyError: an unknown form, or a folder that is a file.
    """
    if form not in FORMS:
        raise StudyError(f"--to {form!r} is unknown: use one of {', '.join(FORMS)}")
    if form not in _OF_KIND.get(schedule.kind, FORMS):
        raise StudyError(
            f"--to {form}: a schedule of kind {schedule.kind!r} has no such form: use "
            f"{' or '.join(_OF_KIND[schedule.kind])}"
        )
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"{folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return FORMS[form](schedule, folder, stem)


def predict(
    cpr: Path, nfe: int | None, guidance: float | None, out: Path | None, outside: str
) -> list[str]:
    """Write the schedule that a regression predicts for a setting.

    Args:
        cpr: file of a regression (`predictors.cpr`), such as a search's OUT/cpr.json.
        nfe: network calls.
        guidance: guidance scale; None where the regression was fitted to one only.
        out: schedule file to write; None is named after the setting, in this folder.
        outside: beyond the fitted box "refuse", or "neutral": the template, with a warning.

    Returns:
        What to tell, a line each; the file first.

    Raises:
        StudyError: no such file, a setting that is missing, or one outside the box.
    """
    from fewstep.predictors.cpr import CPR, OutsideTrustRegion
    from fewstep.space.files import save_schedule

    if outside not in ("refuse", "neutral"):
        raise StudyError(f"--outside {outside}: use refuse or neutral")
    if not cpr.is_file():
        raise StudyError(f"--cpr {cpr}: no such file; a search over several settings writes one")
    model = CPR.load(cpr)
    if nfe is None:
        raise StudyError(f"--nfe is missing: {cpr} knows {model.nfe[0]} to {model.nfe[1]}")
    low, high = model.guidance
    if guidance is None:
        if low != high:
            raise StudyError(f"--guidance is missing: {cpr} knows {low:g} to {high:g}")
        guidance = low
    how: Literal["refuse", "neutral"] = "neutral" if outside == "neutral" else "refuse"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", OutsideTrustRegion)
        made = model.predict(nfe, guidance, outside=how)
    notes: dict[str, object] = {"guidance": guidance}
    notes |= {k: model.provenance[k] for k in ("model", "study") if k in model.provenance}
    made = made.model_copy(update={"provenance": {**made.provenance, **notes}})
    path = save_schedule(made, out or Path(f"nfe{nfe:02d}_w{guidance:g}.json"))
    lines = [f"{path}: {nfe} network calls, to be sampled with guidance {guidance:g}"]
    return lines + [f"warning: {w.message}" for w in caught]


def write_named(name: str, study: Path, nfe: int, out: Path | None) -> Path | str:
    """The file of a study's named schedule, or all their names for "list".

    Raises:
        StudyError: a study that cannot be used, or a name unknown at this number of calls.
    """
    from fewstep.search.config import load_study
    from fewstep.search.family import family_of
    from fewstep.search.preparing import evaluator_spec

    found = family_of(evaluator_spec(load_study(study)).model.load()).named(nfe)
    if name == "list":
        return "\n".join(found)
    if name not in found:
        raise StudyError(f"{name!r} is not named at {nfe} calls: 'list' says what is")
    return save_schedule(found[name], out or Path(f"{name.replace('/', '-')}-nfe{nfe:02d}.json"))


def _sigmas(schedule: Loaded, folder: Path, stem: str) -> list[Path]:
    """The grid alone: what tools take that bring their own solver."""
    from fewstep.search.record import write_text

    assert not isinstance(schedule, MaskedSchedule)
    noise = schedule.noise
    t = torch.tensor(schedule.times, dtype=torch.float64)
    columns: dict[str, list[float]] = {
        "times": list(schedule.times),
        "edm_sigmas": (noise.sigma(t) / noise.alpha(t)).tolist(),
        "lam": noise.lam(t).tolist(),
        "labels": noise.label(t).tolist(),
    }
    finite: dict[str, object] = {
        "what": "the time grid only; without the steps this is another sampler"
    }
    finite |= {name: [_finite(x) for x in column] for name, column in columns.items()}
    return [write_text(folder / f"{stem}.sigmas.json", json.dumps(finite, indent=1) + "\n")]


def _finite(x: float) -> float | None:
    return x if abs(x) != float("inf") else None


def _csv(schedule: Loaded, folder: Path, stem: str) -> list[Path]:
    """The program, a line per network call; of other kinds the choices of every call."""
    from fewstep.search.record import write_text

    if isinstance(schedule, MaskedSchedule | ParticleSchedule):
        return [write_text(folder / f"{stem}.csv", _choices(schedule))]
    program = schedule.program
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ("t", "label", "alpha", "sigma", "r", "e", "k", "g")
    writer.writerow(["call", *names, *(f"b{j}" for j in range(program.nfe))])
    for c in range(program.nfe):
        numbers = [repr(float(getattr(program, name)[c])) for name in names]
        writer.writerow([c, *numbers, *(repr(v) for v in program.b[c].tolist())])
    return [write_text(folder / f"{stem}.csv", buffer.getvalue())]


def _choices(schedule: MaskedSchedule | ParticleSchedule) -> str:
    masked = isinstance(schedule, MaskedSchedule)
    parts = schedule.calls if isinstance(schedule, MaskedSchedule) else schedule.steps
    names = list(type(parts[0]).model_fields)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["call", *names] if masked else ["step", "t", "t_next", *names])
    for i, part in enumerate(parts):
        times = [] if isinstance(schedule, MaskedSchedule) else list(schedule.times[i : i + 2])
        writer.writerow([i, *times, *(getattr(part, name) for name in names)])
    return buffer.getvalue()


def _diffusers(schedule: Loaded, folder: Path, stem: str) -> list[Path]:
    """A folder that a diffusers pipeline loads its scheduler from; it holds the whole schedule."""
    try:
        from fewstep.samplers.diffusers import FewstepScheduler
    except ImportError:
        raise FewstepError(
            "exporting for diffusers needs it: pip install 'fewstep[diffusers]'"
        ) from None
    image = getattr(schedule, "constant", None)
    constants = None if image is None else [image.tolist()]
    FewstepScheduler(schedule=schedule.to_dict(), constants=constants).save_pretrained(str(folder))
    return [folder / "scheduler_config.json"]


FORMS: dict[str, Callable[[Loaded, Path, str], list[Path]]] = {
    "diffusers": _diffusers,
    "sigmas": _sigmas,
    "csv": _csv,
}
