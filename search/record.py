"""Where a search is kept: an output folder that one process holds, and a storage of trials."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fewstep.space.errors import FewstepError, StudyError, one_line

_LEFT = (
    *("study.journal", "study.json", "results.json", "report.html", "cpr.json"),
    *("samples.png", "curves.png", "pareto.png", "decisions.json", "decisions.png"),
)

_MADE_AT_ONCE = ("already exists", "UNIQUE constraint", "duplicate key")


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
    for path in (*(out / "schedules").glob("*"), *(out / "cpr").glob("*")):
        if path.suffix in (".json", ".safetensors"):
            path.unlink()


def open_storage(url: str | None, out: Path) -> Any:
    """The storage a study asks for: an Optuna URL, or the journal in the output folder.

    Raises:
        StudyError: Optuna is not installed, or the storage cannot be opened; a damaged journal,
            with the number of the line.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise StudyError("searching needs Optuna: pip install 'fewstep[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        if url is not None:
            return _of_url(optuna.storages.get_storage, _with_driver(url))
        path = out / "study.journal"
        _mend(path)

        class Journal(JournalFileBackend):
            def append_logs(self, logs: list[dict[str, Any]]) -> None:
                """Append without Optuna's lock (the folder's is ours) and wait for the disk."""
                lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
                with path.open("ab") as file:  # in one write: whole, or torn at its end
                    file.write("".join(lines).encode())

        return JournalStorage(Journal(str(path)))
    except StudyError:
        raise
    except Exception as error:
        line = one_line(error.__cause__ or error, 200)
        raise StudyError(f"search.storage {shown_url(url or str(out))}: {line}") from None


def _of_url(opened: Callable[[str], Any], url: str) -> Any:
    """The storage; tried again where another search makes its tables just now."""
    for wait in (0.2, 0.5, 1.0, 2.0):
        try:
            return opened(url)
        except Exception as error:
            if not any(sign in str(error) for sign in _MADE_AT_ONCE):
                raise
        time.sleep(wait)
    return opened(url)


def shown_url(url: str) -> str:
    """A URL without its password."""
    return re.sub(r"(//[^:/@]*):[^@/]*@", r"\1:***@", url)


def _with_driver(url: str) -> str:
    """A PostgreSQL URL with a driver that is installed."""
    scheme, colon, rest = url.partition("://")
    if scheme not in ("postgresql", "postgres") or not colon:
        return url
    for driver in ("psycopg", "psycopg2"):
        if importlib.util.find_spec(driver) is not None:
            return f"postgresql+{driver}://{rest}"
    raise StudyError(
        f"search.storage {shown_url(url)} needs a driver for PostgreSQL: pip install "
        "'fewstep[postgres]'"
    )


def _mend(path: Path) -> None:
    """Cut a line torn by a kill, and check the rest."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError:
            raise StudyError(
                f"{path}: line {number} is damaged: the journal was edited; put the line right, "
                "or start anew with --overwrite"
            ) from None


@contextlib.contextmanager
def reached(name: str) -> Iterator[None]:
    """Turn what a storage raises into one line.

    Raises:
        StudyError: it is away, or full.
    """
    try:
        yield
    except FewstepError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        line = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
        raise StudyError(
            f"the storage of {name} cannot be written ({line}): everything before is kept; put "
            "it right, and go on with --resume"
        ) from error
