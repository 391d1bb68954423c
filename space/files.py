"""Schedule files: reading and writing any kind, nothing half-loaded or half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.space.errors import ScheduleError
from fewstep.space.program import ProgramSchedule
from fewstep.space.schedule import FORMAT, LOADERS, VERSION


def load_schedule(source: str | os.PathLike[str] | dict[str, Any]) -> Any:
    """Read a schedule file (or its parsed JSON) of any kind.

    Args:
        source: path or dict.

    Returns:
        An `OdeSchedule` (kind "ode"), a `ProgramSchedule` (a file with a program and no steps), or
        what `LOADERS` holds for its kind; with the constant image that lies beside the file.

    Raises:
        ScheduleError: not JSON, another format, an unknown version, NaN, or choices that make no
            sense; nothing is half-loaded.
    """
    if isinstance(source, dict):
        return _load(source)
    path = Path(source)
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        raise ScheduleError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise ScheduleError(
            f"{path}: not valid JSON at line {error.lineno} ({error.msg}): the file is truncated "
            "or edited"
        ) from None
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None
    try:
        schedule = _load(data)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None
    beside = path.with_suffix(".safetensors")
    if getattr(schedule, "uses_constant", False) and beside.exists():
        try:
            return schedule.with_constant(_image(beside))
        except ScheduleError as error:
            raise ScheduleError(f"{beside}: {error}") from None
    return schedule


def _image(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ScheduleError(f"the constant image cannot be read ({error})") from None
    if set(found) != {"constant"}:
        raise ScheduleError(f"holds {sorted(found)}: one tensor named 'constant' is needed")
    return found["constant"]


def _no_constant(name: str) -> float:
    raise ScheduleError(f"the file holds {name}: every number must be finite")


def _load(data: object) -> Any:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ScheduleError(f"format is not {FORMAT!r}: this is not a schedule file")
    if data.get("version") != VERSION:
        raise ScheduleError(
            f"version {data.get('version')!r} is unknown: this fewstep reads version {VERSION}; "
            "upgrade fewstep"
        )
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in LOADERS:
        raise ScheduleError(f"kind {kind!r} is unknown: use one of {', '.join(LOADERS)}")
    if kind == "ode" and "steps" not in data and data.get("program") is not None:
        return ProgramSchedule.from_dict(data)
    return LOADERS[kind](data)


def save_schedule(schedule: Any, path: str | os.PathLike[str]) -> Path:
    """Write a schedule file, and its constant image beside it if it has one.

    Both are written to a temporary name first, then renamed.
    """
    path = Path(path)
    text = json.dumps(schedule.to_dict(), indent=1, allow_nan=False)
    constant = getattr(schedule, "constant", None)
    if constant is not None and schedule.uses_constant:
        from safetensors.torch import save

        image = save({"constant": constant.detach().cpu().contiguous()})
        write_whole(path.with_suffix(".safetensors"), image)
    return write_text(path, text + "\n")


def write_text(path: Path, text: str) -> Path:
    """See `write_whole`."""
    return write_whole(path, text.encode())


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all: to a temporary name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)  # not by `save_file`, which makes files that nobody else may read
    temporary.replace(path)
    return path
