"""Read schedules that others published; nothing that is read can execute code.

USF (arXiv 2312.07243) released its schedules as torch pickles: they are read with
`weights_only=True`, NumPy's scalars and dtypes being the only extra types allowed. The JSON form
of the same dictionaries is read as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from fewstep.experiments.cli.usf import from_usf
from fewstep.space import OdeSchedule, ScheduleError, StudyError

# What the released files say nothing of: each family's noise schedule, from its sampler code.
FAMILIES: dict[str, dict[str, Any]] = {
    "cifar10_edm": {"kind": "edm"},
    "cifar10_sde": {
        "kind": "vp_linear_continuous",
        "beta_0": 0.1,
        "beta_1": 20.0,
        "label": "999*t",
    },
    "imagenet256": {"betas": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "lsun": {"betas": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    "stable_diffusion": {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
_TABLE = {"kind": "vp_discrete_interp", "num_train_timesteps": 1000}


def import_usf(
    path: Path, *, v3: Literal["refuse", "identity"] = "refuse", family: str | None = None
) -> OdeSchedule:
    """Read one published USF schedule.

    Args:
        path: a released .pth file, or the JSON form.
        v3: see `from_usf`.
        family: one of `FAMILIES`; None reads it off the file's name. JSON files hold their own.

    Raises:
        ScheduleError: not a USF schedule, an unknown family, or steps that no program can hold.
    """
    if not path.is_file():
        raise ScheduleError(f"{path}: no such file")
    try:
        data = _json(path) if path.suffix == ".json" else _pth(path)
    except Exception as error:  # whatever a damaged file makes the readers raise
        line = " ".join(str(error).split())[:120]
        raise ScheduleError(f"{path}: not a published USF schedule ({line})") from None
    if "noise_schedule" not in data:
        name = family or next((f for f in FAMILIES if path.stem.startswith(f)), None)
        if name not in FAMILIES:
            raise ScheduleError(
                f"{path}: the file does not say its noise schedule: name --family, one of "
                f"{', '.join(FAMILIES)}"
            )
        settings = FAMILIES[name]
        data = data | {"noise_schedule": settings if "kind" in settings else _TABLE | settings}
    try:
        return from_usf(data | {"name": data.get("name") or path.stem}, v3=v3)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None
    except (KeyError, TypeError, IndexError) as error:
        raise ScheduleError(f"{path}: not a published USF schedule: {error} is missing") from None


def _json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _pth(path: Path) -> dict[str, Any]:
    """The dictionary of a released file: [decision, score] for latent models, or the decision."""
    import numpy as np
    import torch

    scalar = np.float64(0).__reduce__()[0]  # NumPy's own name for how a scalar is rebuilt
    allowed: list[Any] = [np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar")]
    allowed += [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4")]
    with torch.serialization.safe_globals(allowed):
        held = torch.load(path, map_location="cpu", weights_only=True)
    decision = held[0] if isinstance(held, list | tuple) else held
    return {str(key): _plain(value) for key, value in decision.items()}


def _plain(value: Any) -> Any:
    """Tensors and NumPy values as plain Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def noise_settings(text: str) -> dict[str, Any]:
    """{"type": ..., ...} from JSON or from type:key=value,key=value.

    Raises:
        StudyError: neither.
    """
    if text.lstrip().startswith("{"):
        try:
            data: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise StudyError(f"--noise is not valid JSON: {error}") from None
        return data
    kind, _, rest = text.partition(":")
    values: dict[str, Any] = {"type": kind}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        try:
            values[key.strip()] = float(value) if equals else None
        except ValueError:
            values[key.strip()] = value.strip()
        if not equals:
            raise StudyError(f"--noise {text!r}: write type:key=value,key=value")
    return values
