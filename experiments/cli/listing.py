"""Lists of times, and scheduler configurations, turned into schedule files.

A list names levels: the labels that the network is told ("timesteps"), levels sigma ("sigmas":
sigma / alpha, of a rectified flow its sigma in 0..1), model times ("times"), or training steps
1000..1 of a rectified flow before its shift ("denoising_step_list", of LightX2V). With a named
solver it is a schedule. A diffusers scheduler's configuration and a number of calls is one, too:
its own scheduler is run once on symbols (`samplers.stock`), so whatever it does is read off, and
where that equals a named solver the file says so step by step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fewstep.samplers.network import NetworkFacts, network_facts
from fewstep.space import OdeSchedule, ProgramSchedule, ScheduleError, StudyError
from fewstep.space.baselines import SOLVERS, on_times
from fewstep.space.noise import EDM, NoiseSchedule, RectifiedFlow, VPDiscrete

LISTS = ("timesteps", "sigmas", "times", "denoising_step_list")


def read_config(path: Path) -> dict[str, Any]:
    """A scheduler's configuration from a pipeline's folder, a scheduler's folder or its file.

    Raises:
        StudyError: none there, or not a JSON object.
    """
    names = ("scheduler/scheduler_config.json", "scheduler_config.json")
    file = path
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise StudyError(f"{path} holds no {names[0]}: name a diffusers pipeline's folder")
        file = found[0]
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:120]
        raise StudyError(f"{file} is no scheduler configuration ({line})") from None
    if not isinstance(data, dict):
        raise StudyError(f"{file} is no scheduler configuration: a JSON object is needed")
    return data


def read_list(path: Path, kind: str | None) -> tuple[str, list[float]]:
    """(kind, numbers) of a list's file: JSON with a key of `LISTS`, or numbers and commas.

    Args:
        path: the file.
        kind: what the numbers are, one of `LISTS`; None takes it from the file.

    Raises:
        ScheduleError: no numbers, or nothing says what they are.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ScheduleError(f"{path} cannot be read ({error})") from None
    data: Any = None
    if text.lstrip()[:1] in ("{", "["):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise ScheduleError(f"{path} is not valid JSON: the list is damaged") from None
    if isinstance(data, dict):
        keys = [key for key in LISTS if key in data]
        if kind not in (None, *keys) or not keys:
            raise ScheduleError(f"{path} holds no {kind or ', '.join(LISTS)}: name the list")
        kind = kind or keys[0]
        data = data[kind]
    values = data if data is not None else text.replace(",", " ").split()
    if kind is None:
        raise ScheduleError(f"{path}: say what the numbers are with --from {', '.join(LISTS)}")
    return kind, _numbers(values, path)


def _numbers(values: object, path: Path) -> list[float]:
    found = []
    if not isinstance(values, list) or not values:
        raise ScheduleError(f"{path} holds no list of numbers")
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ScheduleError(f"{path} holds {value!r}: numbers are needed") from None
        if isinstance(value, bool) or number != number or abs(number) == float("inf"):
            raise ScheduleError(f"{path} holds {value!r}: finite numbers are needed")
        found.append(number)
    return found


def from_list(
    kind: str, values: list[float], solver: str, noise: NoiseSchedule
) -> tuple[OdeSchedule, str]:
    """A list with a named solver as a schedule, and where it ends in words.

    Args:
        kind: one of `LISTS`.
        values: N timesteps, which end at clean data as stock schedulers do; or levels or times
            down to where the sample lands. Levels of a rectified flow that do not end with 0 also
            end at clean data.
        solver: one of `SOLVERS`, or "NAME/low" with the lower-order ending.
        noise: the noise schedule they belong to.

    Raises:
        ScheduleError: levels outside the noise schedule, times that do not decrease, an unknown
            solver.
    """
    if kind not in LISTS:
        raise ScheduleError(f"--from {kind!r}: use one of {', '.join(LISTS)}")
    times = [_time(kind, value, noise) for value in values]
    flow = isinstance(noise, RectifiedFlow)
    if kind == "denoising_step_list" and not flow:
        raise ScheduleError(f"denoising_step_list is a rectified flow's, not {noise.type}'s")
    ends = kind in ("timesteps", "denoising_step_list") or (kind == "sigmas" and flow)
    if ends and times[-1] > noise.t_data:
        times.append(noise.t_data)
    if len(times) < 2:
        raise ScheduleError("one level is no step: give at least two")
    name, _, low = solver.partition("/")
    if low not in ("", "low"):
        raise ScheduleError(f"--solver {solver!r}: write NAME or NAME/low, e.g. dpmpp2m/low")
    schedule = on_times(name, noise, times, low=bool(low))
    left = float(noise.sigma(torch.tensor(times[-1], dtype=torch.float64)))
    where = "clean data" if left == 0 else f"noise level {left:.3g}"
    provenance = {"source": f"list of {kind}", "baseline": solver}
    return schedule.model_copy(update={"provenance": provenance}), where


def _time(kind: str, value: float, noise: NoiseSchedule) -> float:
    """The model time of one number of a list."""
    if kind in ("times", "denoising_step_list"):
        return value if kind == "times" else value / 1000
    if kind == "timesteps":
        if isinstance(noise, VPDiscrete):
            return value
        if not isinstance(noise, RectifiedFlow):
            scale = float(getattr(noise, "label_scale", 1.0))
            if isinstance(noise, EDM) and noise.labels != "sigma":
                _, sigma = NetworkFacts(noise, "eps").level(value)
                return float(sigma)
            return value / scale
        value = value / noise.label_scale
    if value < 0:
        raise ScheduleError(f"level {value:g} is below 0: levels are positive, 0 is clean data")
    if value == 0:
        return noise.t_data
    if isinstance(noise, RectifiedFlow):
        if value > 1:
            raise ScheduleError(f"level {value:g} of a rectified flow is above 1, pure noise")
        return value / (noise.shift - (noise.shift - 1) * value)
    return float(noise.t_of_lam(-torch.log(torch.tensor(value, dtype=torch.float64))))


def kind_of(path: Path) -> str:
    """What a file to import is: "usf", "diffusers" or "list"; a guess from its form."""
    if path.is_dir():
        return "diffusers"
    if path.suffix in (".pth", ".pt"):
        return "usf"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "usf" if path.suffix == ".json" else "list"
    if not isinstance(data, dict):
        return "list"
    if "_class_name" in data:
        return "diffusers"
    listed = any(key in data for key in LISTS)
    return "list" if listed and "prediction_types" not in data else "usf"


def list_noise(path: Path) -> dict[str, Any]:
    """The noise schedule of a list that does not say one: Stable Diffusion's, or its own shift.

    A JSON object may hold "noise" (a noise schedule's JSON form) or LightX2V's "sample_shift".
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        data = None
    if isinstance(data, dict) and isinstance(data.get("noise"), dict):
        return dict(data["noise"])
    if isinstance(data, dict) and "denoising_step_list" in data:
        shift = data.get("sample_shift", 1.0)
        return {"type": "rectified_flow", "shift": shift, "label_scale": 1000.0, "t_end": 0.0}
    return {"type": "vp_discrete"}


def from_config(
    config: dict[str, Any], nfe: int, mu: float | None
) -> OdeSchedule | ProgramSchedule:
    """What a diffusers scheduler does in `nfe` calls.

    Args:
        config: its configuration, which names its class.
        nfe: network calls.
        mu: the shift of a scheduler with dynamic shifting.

    Raises:
        ScheduleError: an unknown class, or steps that no schedule says; one line.
        StudyError: diffusers is not installed.
    """
    try:
        import diffusers

        from fewstep.samplers.stock import stock_schedule
    except ImportError:
        raise StudyError(
            "reading a scheduler needs diffusers: pip install 'fewstep[diffusers]'"
        ) from None
    network = network_facts(config, mu=mu)
    cls = getattr(diffusers, network.origin, None)
    if cls is None or not hasattr(cls, "set_timesteps"):
        raise ScheduleError(
            f"_class_name {config.get('_class_name')!r} is no scheduler of diffusers: name one"
        )
    if config.get("use_dynamic_shifting") and mu is None:
        raise ScheduleError("the scheduler shifts its levels with the resolution: give --mu")
    try:
        scheduler = cls.from_config(config)
    except Exception as error:
        line = " ".join(str(error).split())[:160]
        raise ScheduleError(f"{network.origin} refuses its configuration: {line}") from None
    extra = {} if mu is None else {"mu": mu}
    program = stock_schedule(scheduler, network, nfe, lambda n: {"num_inference_steps": n} | extra)
    if network.clip is not None:
        program = program.model_copy(update={"options": {"threshold": dict(network.clip)}})
    return named_like(program) or program


def named_like(schedule: OdeSchedule | ProgramSchedule, tolerance: float = 1e-4) -> Any:
    """The named solver on the same times that does the same, with its steps; None if none does.

    Args:
        schedule: what to recognise.
        tolerance: allowed difference of two coefficients, relative to 1 + their size.
    """
    found = recognised(schedule, tolerance)
    if found is None:
        return None
    name, made = found
    provenance = {**schedule.provenance, "baseline": name}
    return made.model_copy(update={"options": schedule.options, "provenance": provenance})


def recognised(
    schedule: OdeSchedule | ProgramSchedule, tolerance: float = 1e-9
) -> tuple[str, OdeSchedule] | None:
    """(solver or solver/low, its schedule on these times) whose program this is, or None."""
    program = schedule.program
    for name, made in _candidates(schedule):
        other = made.program
        if other.nfe != program.nfe:
            continue
        pairs = ((getattr(program, f), getattr(other, f)) for f in ("t", "r", "e", "k", "b", "g"))
        far = max(float(((a - b).abs() / (1 + b.abs())).max()) for a, b in pairs)
        plain = float((program.init - other.init).abs().max()) <= tolerance
        if far <= tolerance and plain:
            return name, made
    return None


def _candidates(schedule: OdeSchedule | ProgramSchedule) -> Iterator[tuple[str, OdeSchedule]]:
    """Named solvers on the schedule's own times, ending where it may end."""
    noise = schedule.noise
    if isinstance(schedule, OdeSchedule):
        grids = [schedule.times]
    else:
        t = list(dict.fromkeys(schedule.program.t.tolist()))
        ends = dict.fromkeys((schedule.end, noise.t_data, noise.t_range[1]))
        grids = [(*t, end) for end in ends if end < t[-1]]
    for times in grids:
        for solver in SOLVERS:
            for name in (solver, f"{solver}/low"):
                try:
                    made = on_times(solver, noise, times, low=name != solver)
                    made.program  # noqa: B018 (compiled here, where it may be refused)
                except ScheduleError:
                    continue
                yield name, made
