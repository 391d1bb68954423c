"""A schedule file in the forms of other tools."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.experiments.cli.explain import Loaded
from fewstep.experiments.cli.listing import recognised
from fewstep.experiments.cli.standalone import standalone
from fewstep.samplers.fits import network_facts, require_fit
from fewstep.samplers.kdiffusion import sigmas_of
from fewstep.samplers.ode import start_scale
from fewstep.space import OdeSchedule, ProgramSchedule, save_schedule
from fewstep.space.errors import FewstepError, StudyError
from fewstep.space.masked import MaskedSchedule
from fewstep.space.noise import RectifiedFlow, VPDiscrete
from fewstep.space.particles import ParticleSchedule

_OF_KIND = {"masked": ("csv",), "particles": ("csv", "sigmas")}
"""The forms of kinds that have no program."""


@dataclass(frozen=True)
class Destination:
    """Where an export goes, and what it is told of the pipeline there.

    Args:
        folder: made if absent.
        stem: name of the files without their ending.
        prediction_type: what the network returns, in diffusers' words; None follows from the
            schedule.
        pipeline: a scheduler's configuration that the schedule must fit.
    """

    folder: Path
    stem: str
    prediction_type: str | None = None
    pipeline: Mapping[str, Any] | None = None

    def write(self, ending: str, text: str) -> list[Path]:
        """Write one file; the list of it."""
        from fewstep.space.files import write_text

        return [write_text(self.folder / f"{self.stem}{ending}", text)]


def export(
    schedule: Loaded,
    form: str,
    folder: Path,
    stem: str,
    prediction_type: str | None = None,
    pipeline: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a schedule into a folder.

    Args:
        schedule: a loaded schedule.
        form: one of `FORMS`.
        folder: made if absent.
        stem: name of the file without its ending.
        prediction_type: for "diffusers": what the network returns; None follows from the schedule.
        pipeline: a scheduler's configuration that the schedule must fit.

    Returns:
        The files written.

    Raises:
        StudyError: an unknown form, a folder that is a file, or a schedule that the form cannot
            say; the reason.
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
    if prediction_type is not None and form != "diffusers":
        raise StudyError(f"--prediction-type goes with --to diffusers, not {form}")
    if pipeline is not None and isinstance(schedule, OdeSchedule | ProgramSchedule):
        require_fit(schedule, network_facts(pipeline))
    target = Destination(folder, stem, prediction_type, pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    return FORMS[form](schedule, target)


def predict(
    cpr: Path, nfe: int | None, guidance: float | None, out: Path | None, outside: str
) -> list[str]:
    """Write the schedule that a regression, or fitted programs on both sides, say for a setting.

    Args:
        cpr: file of a regression (`predictors.cpr`), such as a search's OUT/cpr.json, or folder
            of programs fitted at several guidance scales (`predictors.between`), OUT/cpr.
        nfe: network calls.
        guidance: guidance scale; None where the regression was fitted to one only.
        out: schedule file to write; None is named after the setting, in this folder.
        outside: beyond the fitted box "refuse", or "neutral": the template, with a warning.

    Returns:
        What to tell, a line each; the file first.

    Raises:
        StudyError: no such file, a setting that is missing, or one outside the box.
    """
    from fewstep.space.files import save_schedule

    if outside not in ("refuse", "neutral"):
        raise StudyError(f"--outside {outside}: use refuse or neutral")
    if not cpr.exists():
        raise StudyError(f"--cpr {cpr}: no such file; a search over several settings writes one")
    caught: list[warnings.WarningMessage] = []
    made: OdeSchedule | ProgramSchedule
    if cpr.is_dir():
        made, guidance, origin = _between(cpr, nfe, guidance, outside)
    else:
        made, guidance, origin, caught = _regressed(cpr, nfe, guidance, outside)
    notes: dict[str, object] = {"guidance": guidance}
    notes |= {k: origin[k] for k in ("model", "study") if k in origin}
    made = made.model_copy(update={"provenance": {**made.provenance, **notes}})
    path = save_schedule(made, out or Path(f"nfe{made.nfe:02d}_w{guidance:g}.json"))
    lines = [f"{path}: {made.nfe} network calls, to be sampled with guidance {guidance:g}"]
    return lines + [f"warning: {w.message}" for w in caught]


def _between(
    folder: Path, nfe: int | None, guidance: float | None, outside: str
) -> tuple[ProgramSchedule, float, Mapping[str, Any]]:
    """A program of a folder of them, or one between two: with its scale, and where it is from."""
    from fewstep.predictors.between import Aligned

    if outside != "refuse":
        raise StudyError(f"--outside {outside}: a folder of fitted programs has no neutral one")
    found = Aligned.load(folder)
    if nfe is None:
        known = ", ".join(map(str, sorted(found.programs)))
        raise StudyError(f"--nfe is missing: {folder} knows {known}")
    if guidance is None:
        scales = sorted({w for known in found.programs.values() for w in known})
        raise StudyError(f"--guidance is missing: {folder} knows {scales[0]:g} to {scales[-1]:g}")
    made = found.predict(nfe, guidance)
    origin = next(iter(found.programs[nfe].values())).provenance
    note = {"cpr": {"nfe": nfe, "guidance": guidance}}
    noted = made.model_copy(update={"provenance": {**made.provenance, **note}})
    return noted, guidance, origin


def _regressed(
    cpr: Path, nfe: int | None, guidance: float | None, outside: str
) -> tuple[OdeSchedule, float, Mapping[str, Any], list[warnings.WarningMessage]]:
    """What a regression predicts, as `_between`, and its warnings."""
    from fewstep.predictors.cpr import CPR, OutsideTrustRegion

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
    return made, guidance, model.provenance, caught


def write_named(name: str, study: Path, nfe: int, out: Path | None) -> Path | str:
    """The file of a study's named schedule, or all their names for "list".

    Raises:
        StudyError: a study that cannot be used, or a name unknown at this number of calls.
    """
    from fewstep.search.config import load_study
    from fewstep.search.work import load_problem

    found = load_problem(load_study(study)).named(nfe)
    if name == "list":
        return "\n".join(found)
    if name not in found:
        raise StudyError(f"{name!r} is not named at {nfe} calls: 'list' says what is")
    return save_schedule(found[name], out or Path(f"{name.replace('/', '-')}-nfe{nfe:02d}.json"))


def _sigmas(schedule: Loaded, target: Destination) -> list[Path]:
    """The grid alone: what tools take that bring their own solver."""
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
    return target.write(".sigmas.json", json.dumps(finite, indent=1) + "\n")


def _finite(x: float) -> float | None:
    return x if abs(x) != float("inf") else None


def _csv(schedule: Loaded, target: Destination) -> list[Path]:
    """The program, a line per network call; of other kinds the choices of every call."""
    if isinstance(schedule, MaskedSchedule | ParticleSchedule):
        return target.write(".csv", _choices(schedule))
    program = schedule.program
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ("t", "label", "alpha", "sigma", "r", "e", "k", "g")
    writer.writerow(["call", *names, *(f"b{j}" for j in range(program.nfe))])
    for c in range(program.nfe):
        numbers = [repr(float(getattr(program, name)[c])) for name in names]
        writer.writerow([c, *numbers, *(repr(v) for v in program.b[c].tolist())])
    return target.write(".csv", buffer.getvalue())


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


def _diffusers(schedule: Loaded, target: Destination) -> list[Path]:
    """A folder that a diffusers pipeline loads its scheduler from; it holds the whole schedule."""
    try:
        from fewstep.samplers.diffusers import FewstepScheduler
    except ImportError:
        raise FewstepError(
            "exporting for diffusers needs it: pip install 'fewstep[diffusers]'"
        ) from None
    image = getattr(schedule, "constant", None)
    said: dict[str, Any] = {"schedule": schedule.to_dict()}
    said |= {"constants": None if image is None else [image.tolist()]}
    if target.prediction_type is not None:
        said["prediction_type"] = target.prediction_type
    if target.pipeline is None:
        made = FewstepScheduler(**said)
    else:
        made = FewstepScheduler.from_config(dict(target.pipeline), **said)
    made.save_pretrained(str(target.folder))
    return [target.folder / "scheduler_config.json"]


def assumed_kind(schedule: Loaded) -> str:
    """What a schedule's network is taken to return where nothing says it."""
    flow = isinstance(getattr(schedule, "noise", None), RectifiedFlow)
    return "flow_prediction" if flow else "epsilon"


def _comfy(schedule: Loaded, target: Destination) -> list[Path]:
    """A ComfyUI custom node, the schedule it loads, and its list of sigmas."""
    ode = _ode(schedule)
    if ode.program.guidance is not None:
        raise StudyError(
            "--to comfy: the schedule sets the guidance scale of every call, which ComfyUI's "
            "models do not take: use one without guidance of its own"
        )
    if ode.program.network is not None:
        raise StudyError("--to comfy: the schedule asks several networks, and a node has one")
    if "time_shift" in ode.options:
        raise StudyError("--to comfy: options.time_shift runs with fewstep.samplers.sample only")
    saved = save_schedule(ode, target.folder / f"{target.stem}.json")
    names = "NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS"
    node = f'"""Copy into custom_nodes."""\n\nfrom fewstep.samplers.comfy import {names}\n\n'
    node += f"__all__ = {[name.strip() for name in names.split(',')]}\n"
    files = Destination(target.folder, "fewstep_node").write(".py", node)
    files += target.write(".sigmas.txt", _joined(sigmas_of(ode).double().tolist()))
    return [saved, *files]


def _sigma_list(schedule: Loaded, target: Destination) -> list[Path]:
    """A comma-separated list for Euler samplers that take sigmas; exact for DDIM programs."""
    ode = _ode(schedule)
    _only(ode, ("ddim",), "sigma_list", "a list of sigmas is run by Euler samplers")
    return target.write(".sigmas.txt", _joined(sigmas_of(ode).double().tolist()))


_MULTISTEP = {"ddim": 1, "dpmpp2m": 2, "dpmpp3m": 3}


def _timesteps(schedule: Loaded, target: Destination) -> list[Path]:
    """Timesteps for diffusers' DPMSolverMultistepScheduler, with the settings that make it equal.

    That scheduler takes whole labels of a table of betas and appends the end.
    """
    ode, form = _ode(schedule), "timesteps"
    why = "stock schedulers that take timesteps run DPM-Solver++"
    solver, _, low = _only(ode, tuple(_MULTISTEP), form, why).partition("/")
    if not isinstance(ode.noise, VPDiscrete):
        raise StudyError(
            f"--to {form}: stock schedulers take timesteps of a table of betas, and this noise "
            f"schedule is {ode.noise.type}: use --to sigma_list, comfy or diffusers"
        )
    labels = ode.program.label.tolist()
    off = next((x for x in labels if abs(x - round(x)) > 1e-6), None)
    if off is not None:
        raise StudyError(
            f"--to {form}: label {off:.6g} is no whole number, and stock schedulers cut it off: "
            "use --to diffusers"
        )
    if ode.end not in (-1.0, 0.0):
        raise StudyError(
            f"--to {form}: the schedule ends at time {ode.end:g}, stock schedulers at 0 or at "
            "clean data: use --to diffusers"
        )
    if "threshold" in ode.options:
        raise StudyError(f"--to {form}: options.threshold is not in the list: use --to diffusers")
    final = "zero" if ode.end < 0 else "sigma_min"
    options = {"solver_order": _MULTISTEP[solver], "algorithm_type": "dpmsolver++"}
    options |= {"lower_order_final": bool(low) or final == "zero", "final_sigmas_type": final}
    said = {
        "scheduler": "DPMSolverMultistepScheduler",
        "options": options,
        "timesteps": [round(x) for x in labels],
    }
    return target.write(".timesteps.json", json.dumps(said, indent=1) + "\n")


def _step_list(schedule: Loaded, target: Destination) -> list[Path]:
    """LightX2V's denoising_step_list with its sample_shift: Euler on 1000 training steps."""
    ode, form = _ode(schedule), "denoising_step_list"
    if not isinstance(ode.noise, RectifiedFlow):
        raise StudyError(
            f"--to {form}: it lists training steps of a rectified flow, and this noise schedule "
            f"is {ode.noise.type}: use --to diffusers"
        )
    _only(ode, ("ddim",), form, "its steps are run by Euler")
    steps = [1000 * t for t in ode.times[: ode.nfe]]
    off = next((x for x in steps if abs(x - round(x)) > 1e-6), None)
    if off is not None:
        raise StudyError(
            f"--to {form}: training step {off:.6g} is no whole number: use --to diffusers"
        )
    if ode.end != 0:
        raise StudyError(f"--to {form}: the schedule ends at time {ode.end:g}, the list at 0")
    said = {
        "infer_steps": ode.nfe,
        "sample_shift": ode.noise.shift,
        "denoising_step_list": [round(x) for x in steps],
    }
    return target.write(".steps.json", json.dumps(said, indent=1) + "\n")


def _python(schedule: Loaded, target: Destination) -> list[Path]:
    """One Python file that needs torch only, and its constant image beside it."""
    ode = _ode(schedule)
    files = target.write(".py", standalone(ode, start_scale(ode)))
    if ode.program.uses_constant:
        if ode.constant is None:
            raise StudyError("the constant image is missing: put the .safetensors beside the file")
        from safetensors.torch import save

        image = target.folder / f"{target.stem}.safetensors"
        image.write_bytes(save({"constant": ode.constant.contiguous()}))
        files.append(image)
    return files


def _ode(schedule: Loaded) -> OdeSchedule | ProgramSchedule:
    assert isinstance(schedule, OdeSchedule | ProgramSchedule)  # by _OF_KIND
    return schedule


def _only(
    schedule: OdeSchedule | ProgramSchedule, solvers: tuple[str, ...], form: str, why: str
) -> str:
    """The named solver that the program is, one of `solvers`; refused otherwise."""
    program = schedule.program
    if program.guidance is not None or program.network is not None:
        raise StudyError(f"--to {form}: the list cannot set the guidance of every call")
    found = recognised(schedule)
    if found is None or found[0].partition("/")[0] not in solvers:
        own = f"{found[0]}" if found else "no named solver"
        raise StudyError(
            f"--to {form}: {why}, and this program is {own}: the list alone would be another "
            "sampler; use --to diffusers, comfy or python"
        )
    return found[0]


def _joined(values: list[float]) -> str:
    return ", ".join(f"{value:.8g}" for value in values) + "\n"


FORMS: dict[str, Callable[[Loaded, Destination], list[Path]]] = {
    "diffusers": _diffusers,
    "comfy": _comfy,
    "python": _python,
    "timesteps": _timesteps,
    "sigma_list": _sigma_list,
    "denoising_step_list": _step_list,
    "sigmas": _sigmas,
    "csv": _csv,
}
