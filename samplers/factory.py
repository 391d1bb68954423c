"""A study's model: made by the factory that it names, and guarded where it may fail.

Only what is named by import path is executed. The folder of the study file is put on the import
path only when it holds the factory's module, and never when it is this project's own checkout,
whose bare folder names must not become importable.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.samplers.denoiser import Quicker
from fewstep.samplers.problems import (
    AnyProblem,
    MaskedProblem,
    ParticleProblem,
    Problem,
    device_of,
)
from fewstep.space.errors import FewstepError, ModelError, StudyError, one_line


def made_by(
    factory: str,
    arguments: Mapping[str, Any],
    folder: str = "",
    *,
    autocast: str | None = None,
    backend: str | None = None,
) -> AnyProblem:
    """Import a factory, "module.path:function", and call it.

    Args:
        factory: what makes the problem.
        arguments: the factory's own.
        folder: where its module may lie.
        autocast: dtype that a `Problem`'s network runs in; None is its own.
        backend: of torch.compile for its calls; None does not compile.

    Raises:
        StudyError: the module or function is missing, the arguments do not fit, or something else
            than a problem came back.
    """
    function = import_path(factory, folder, "model.factory")
    try:
        problem = function(**arguments)
    except FewstepError:
        raise
    except TypeError as error:
        raise StudyError(f"model.factory {factory}: {error}") from error
    except Exception as error:
        raise StudyError(
            f"model.factory {factory} failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    if isinstance(problem, Problem):
        if not (autocast or backend):
            return problem
        try:
            quicker = Quicker(problem.denoiser, device_of(problem), autocast, backend)
        except Exception as error:
            raise StudyError(f"search.compile = {backend!r}: {one_line(error)}") from None
        return replace(problem, denoiser=quicker)
    if not isinstance(problem, MaskedProblem | ParticleProblem):
        raise StudyError(
            f"model.factory {factory} returned {type(problem).__name__}: it must return a "
            "Problem, MaskedProblem or ParticleProblem of fewstep.samplers"
        )
    if autocast or backend:
        raise StudyError("search.autocast and compile are a Problem's: set them in its factory")
    return problem


def guarded(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A function of the user's whose exceptions become a ModelError; running out of memory stays.

    So a fault of the user's model can be told from one of ours.
    """

    @functools.wraps(function, updated=())
    def called(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except (FewstepError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            line = f"{type(error).__name__}: {one_line(error)}"
            if "out of memory" in line.lower():
                raise MemoryError(line) from error
            raise ModelError(f"{what} raised {line}") from error

    return called


class _Watched:
    """A denoiser of the user's, `guarded`; its attributes are the denoiser's own.

    `asked` counts the images it was asked for; `on_asked` is called with every number of them.
    """

    def __init__(self, inner: Any) -> None:
        self._inner, self._call = inner, guarded(inner, "the model")
        self.piece: int | None = getattr(inner, "piece", None)
        self.asked, self.on_asked = 0, _nothing

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        made = self._call(*arguments, **named)
        self.asked += len(arguments[0])
        self.on_asked(len(arguments[0]))
        return made


def _nothing(images: int) -> None:
    """Nobody looks."""


def watched(problem: AnyProblem) -> AnyProblem:
    """The problem with everything that is the user's own code `guarded`."""

    def safe(function: Any, what: str) -> Any:
        return None if function is None else guarded(function, what)

    if isinstance(problem, Problem):
        return replace(
            problem,
            denoiser=_Watched(problem.denoiser),
            cond=safe(problem.cond, "Problem.cond"),
            features=safe(problem.features, "Problem.features"),
        )
    if isinstance(problem, MaskedProblem):
        law = problem.target
        return replace(
            problem,
            denoiser=_Watched(problem.denoiser),
            measure=safe(problem.measure, "MaskedProblem.measure"),
            prompt=safe(problem.prompt, "MaskedProblem.prompt"),
            target=law and replace(law, reward=safe(law.reward, "the reward")),
        )
    target = problem.target
    factors = tuple(
        replace(f, denoiser=_Watched(f.denoiser), log_density=safe(f.log_density, "log_density"))
        for f in target.factors
    )
    prize = target.reward
    if prize is not None:
        prize = replace(prize, value=safe(prize.value, "the reward"))
    return replace(
        problem,
        target=replace(target, factors=factors, reward=prize),
        measure=safe(problem.measure, "ParticleProblem.measure"),
    )


def import_path(path: str, folder: str, what: str) -> Callable[..., Any]:
    """The function at "module.path:function".

    Raises:
        StudyError: there is no such module or function; `what` names the setting.
    """
    module_name, _, name = path.partition(":")
    if not name:
        raise StudyError(f"{what} {path!r} is not of the form module.path:function")
    add_folder(folder, module_name)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise StudyError(
            f"{what} {path}: cannot import {module_name} ({one_line(error)}): put it beside the "
            "study file or on PYTHONPATH"
        ) from error
    except Exception as error:
        raise StudyError(
            f"{what} {path}: importing {module_name} failed: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise StudyError(f"{what} {path}: {module_name} has no function {name}")
    return function  # type: ignore[no-any-return]


def add_folder(folder: str, module_name: str) -> None:
    """Put `folder` first on the import path if it holds the module; never a checkout of ours."""
    top = module_name.split(".")[0]
    place = Path(folder) if folder else None
    if place is None or not ((place / f"{top}.py").is_file() or (place / top).is_dir()):
        return
    if is_checkout(place):
        raise StudyError(
            f"model.factory {module_name}: move it out of {place}, whose folder names would "
            "become imports"
        )
    if folder not in sys.path:
        sys.path.insert(0, folder)


def leave_checkout() -> None:
    """Drop a checkout of ours from the import path (workers inherit their driver's folder)."""
    sys.path[:] = [entry for entry in sys.path if not is_checkout(Path(entry or "."))]


def is_checkout(folder: Path) -> bool:
    """Whether a folder is a checkout of this project."""
    return (folder / "space" / "program.py").is_file() and (
        folder / "samplers" / "ode.py"
    ).is_file()
