"""The output folder of a search: held by one process, written whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fewstep.space.errors import StudyError

_LEFT = (
    "study.journal",
    "results.json",
    "samples.png",
    "curves.png",
    "pareto.png",
    "report.html",
    "study.json",
    "cpr.json",
    "decisions.json",
    "decisions.png",
)


def write_text(path: Path, text: str) -> Path:
    """Write a file whole: to a temporary name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


@contextlib.contextmanager
def held(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Make the output folder and hold it, for as long as the block runs.

    Raises:
        StudyError: it is a file, cannot be written, another search holds it, or it has a search
            and neither `resume` nor `overwrite` is set.
    """
    if out.exists() and not out.is_dir():
        raise StudyError(f"--out {out} is a file: name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"--out {out} cannot be made: {error.strerror or error}") from None
    if not os.access(out, os.W_OK):
        raise StudyError(f"--out {out} cannot be written to")
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(
                f"{out}: another search is writing there: wait for it, or choose another --out"
            ) from None
        begun = any((out / name).exists() for name in ("study.journal", "study.json"))
        if begun and overwrite:
            _clear(out)
        elif begun and not resume:
            raise StudyError(
                f"--out {out} already holds a search: add --resume to go on, --overwrite to "
                "start anew, or name another folder"
            )
        yield out
    finally:
        os.close(folder)


def _clear(out: Path) -> None:
    for name in _LEFT:
        (out / name).unlink(missing_ok=True)
    for path in (out / "schedules").glob("*"):
        if path.suffix in (".json", ".safetensors"):
            path.unlink()
