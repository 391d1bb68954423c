"""A Ray cluster: the connection, and what is sent to its machines.

A cluster has its own Python with torch, Ray and the rest; a search sends fewstep itself (a copy of
the package that runs here), the study and the files that it names, as Ray's working directory.
Nothing is installed there. Versions that differ are said (`differing`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fewstep.samplers.factory import is_checkout
from fewstep.search.config import StudyConfig
from fewstep.space.errors import StudyError

_QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
_LAYERS = ("space", "samplers", "predictors", "search", "experiments")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "benchmarks", "results", ".*")
LIMIT = 90 * 2**20
"""Bytes that can be sent: a job server takes 100 MiB."""


def cpus() -> int:
    """CPU cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def in_job() -> bool:
    """Whether this process is the driver of a submitted job."""
    return bool({"RAY_JOB_CONFIG_JSON_ENV_VAR", "FEWSTEP_JOB"} & set(os.environ))


def sent_already() -> bool:
    """Whether Ray put this process into a working directory that its workers have too."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


# --- the connection --------------------------------------------------------------------------


def start_local(workers: int) -> None:
    """Start Ray on this machine, for this process alone and without its dashboard."""
    import ray

    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        _node_ip_address="127.0.0.1",
        **_QUIET,
    )


def connect(address: str | None, workers: int, folder: Path | None = None) -> tuple[Any, bool]:
    """Ray, and whether it was connected here, which then is to be shut down here.

    It joins the cluster at an address, whose machines get `folder` as their working directory, or
    starts one on loopback with CPUs for so many workers at least.

    Raises:
        StudyError: Ray is not installed, or the cluster does not let us in.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # what it prints about dead workers
    try:
        import ray
    except ImportError:
        raise StudyError(
            "workers need Ray: pip install 'fewstep[search]', or set search.workers = 0"
        ) from None
    if ray.is_initialized():
        return ray, False
    with _signals_kept():
        if address is None:
            start_local(max(workers, cpus()))
            return ray, True
        environment = {"working_dir": str(folder)} if folder is not None else None
        try:
            ray.init(address=address, runtime_env=environment, **_QUIET)
        except Exception as error:  # also whatever a client of another version raises
            raise StudyError(f"--address {address}: cannot join: {first_line(error)}") from None
    return ray, True


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM by one that leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def address_of(address: str | None) -> str | None:
    """The address to join, by default RAY_ADDRESS; None where a cluster is to be started."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def versions() -> dict[str, str]:
    """What scores may depend on."""
    import torch

    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("fewstep", "numpy", "safetensors", "pydantic"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def differing(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """What differs between the versions of two machines, in one line; "" if nothing does."""
    return ", ".join(
        f"{name} {there.get(name, 'missing')} (here {value})"
        for name, value in here.items()
        if there.get(name) != value
    )


def first_line(error: BaseException) -> str:
    """The first line of a foreign exception that says something; of an actor's start the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    return lines[-1 if "in its creation task" in lines[0] else 0][:300]


# --- what is sent ----------------------------------------------------------------------------


def pack(
    config: StudyConfig, folder: Path, say: Callable[[str], None] = lambda line: None
) -> StudyConfig:
    """Put into an empty folder what other machines need, and nothing else.

    `say` is called with a line on what stays where it is. Returns the study as it reads there,
    paths relative to the folder.

    Raises:
        StudyError: a file that is not there, or too much to send; the setting is named.
    """
    _copy_package(folder)
    base, model = Path(config.folder or "."), config.model
    changes: dict[str, Any] = {"folder": "."}
    if model.factory is not None or config.objective.features is not None:
        _copy_modules(base, folder)
    taken = _Taker(base, folder, say)
    for name in config.search.files:
        taken.beside(name)
    extra = dict(model.model_extra or {})
    if model.factory is not None:
        for value in extra.values():  # the module finds its files beside itself
            if isinstance(value, str) and value and (base / value).exists():
                taken.beside(value)
    else:
        extra["pipeline"] = taken.file(str(model.pipeline), "model.pipeline")
        if "prompts" in extra:
            extra["prompts"] = taken.file(extra["prompts"], "model.prompts")
        extra["call"] = {
            k: taken.file(v, f"model.call.{k}") if "image" in k and isinstance(v, str) else v
            for k, v in extra.get("call", {}).items()
        }
        changes["model"] = type(model)(**extra)
    warm = tuple(taken.file(name, "search.warm") for name in config.search.warm)
    changes["search"] = config.search.model_copy(update={"warm": warm})
    taken.copy()
    return config.model_copy(update=changes)


def _copy_package(folder: Path) -> None:
    """The fewstep that runs here, as it would lie in site-packages."""
    for layer in _LAYERS:
        spec = importlib.util.find_spec(f"fewstep.{layer}")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        source = next(iter(spec.submodule_search_locations))
        shutil.copytree(source, folder / "fewstep" / layer, ignore=_LEFT_OUT)
    number = version("fewstep")
    info = folder / f"fewstep-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fewstep\nVersion: {number}\n")


def _copy_modules(base: Path, folder: Path) -> None:
    """Python files beside the study: its module imports them at home too."""
    if is_checkout(base):
        return
    for path in base.iterdir():
        if path.suffix == ".py" and path.is_file():
            shutil.copy(path, folder)
        elif (path / "__init__.py").is_file() and path.name != "fewstep":
            shutil.copytree(path, folder / path.name, ignore=_LEFT_OUT)


class _Taker:
    """Takes files of a study to a folder."""

    def __init__(self, base: Path, folder: Path, say: Callable[[str], None]) -> None:
        self._base, self._folder, self._say = base, folder, say
        self._found: dict[Path, Path] = {}  # sources by target
        self._count = 0

    def beside(self, name: str) -> None:
        """A file that keeps its place beside the study."""
        if not (self._base / name).exists():
            raise StudyError(f"search.files: {self._base / name}: no such file")
        inside = (self._base / name).resolve().is_relative_to(self._base.resolve())
        if not Path(name).is_absolute() and inside:
            self._found[Path(name)] = self._base / name

    def file(self, name: str, what: str) -> str:
        """A file or folder that the study names; where it will lie."""
        source = self._base / name
        if not source.exists():
            raise StudyError(f"{what}: {source}: no such file")
        if Path(name).is_absolute() and _bytes(source) > LIMIT:
            self._say(f"{what}: {name} is too large to send: every machine must have it there")
            return name
        self._count += 1
        target = Path("files") / f"{self._count}" / source.name
        self._found[target] = source
        image = source.with_suffix(".safetensors")
        if source.suffix == ".json" and image.is_file():
            self._found[target.with_suffix(".safetensors")] = image
        return str(target)

    def copy(self) -> None:
        """Copy what was taken, if it can be sent."""
        sizes = {source: _bytes(source) for source in self._found.values()}
        if sum(sizes.values()) > LIMIT:
            raise StudyError(
                f"the study's files are {sum(sizes.values()) / 2**20:.0f} MiB, and "
                f"{LIMIT / 2**20:.0f} can be sent ({max(sizes, key=sizes.__getitem__)} is the "
                "largest): put it where every machine sees it, and name its absolute path"
            )
        for target, source in self._found.items():
            place = self._folder / target
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, place) if source.is_dir() else shutil.copy(source, place)


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())
