"""The user's model: the factory that a study names, and the noise of every sample.

Only what the study file names by import path is executed. The folder of the study file is put on
the import path only when it holds the factory's module, and never when it is this project's own
checkout, whose bare folder names must not become importable.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers import (
    AnyProblem,
    Denoiser,
    MaskedProblem,
    ParticleProblem,
    Problem,
    start_masked,
)
from fewstep.samplers.categorical import uniforms
from fewstep.space.costs import Prices
from fewstep.space.errors import FewstepError, ModelError, StudyError


@dataclass(frozen=True)
class ModelSpec:
    """How to build the problem anywhere.

    Args:
        factory: "module.path:function".
        arguments: its keyword arguments.
        folder: where its module may lie.
        guidance: scale that replaces the problem's; None keeps it.
        autocast: dtype that the network of a `Problem` runs in; None is its own.
        compile: backend of torch.compile for its calls; None does not compile.
    """

    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    guidance: float | None = None
    autocast: str | None = None
    compile: str | None = None

    def load(self) -> AnyProblem:
        """Import the factory and call it.

        Raises:
            StudyError: the module or function is missing, the arguments do not fit, or something
                else than a problem came back.
        """
        function = import_path(self.factory, self.folder, "model.factory")
        try:
            problem = function(**self.arguments)
        except FewstepError:
            raise
        except TypeError as error:
            raise StudyError(f"model.factory {self.factory}: {error}") from error
        except Exception as error:
            raise StudyError(
                f"model.factory {self.factory} failed: {type(error).__name__}: {_line(error)}"
            ) from error
        if isinstance(problem, Problem) and self.guidance is not None:
            problem = replace(problem, guidance=self.guidance)
        if isinstance(problem, Problem) and (self.autocast or self.compile):
            return replace(problem, denoiser=_Quicker(problem, self.autocast, self.compile))
        if self.autocast or self.compile:
            raise StudyError(
                "search.autocast and compile are a Problem's: set them in its factory"
            )
        if isinstance(problem, Problem | MaskedProblem | ParticleProblem):
            return problem
        raise StudyError(
            f"model.factory {self.factory} returned {type(problem).__name__}: it must return a "
            "Problem, MaskedProblem or ParticleProblem of fewstep.samplers"
        )


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
            line = f"{type(error).__name__}: {_line(error)}"
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


class _Quicker:
    """A denoiser in a lower precision, compiled or both; its attributes are the denoiser's own."""

    def __init__(self, problem: Problem, autocast: str | None, backend: str | None) -> None:
        self._inner: Any = problem.denoiser
        self._device = device_of(problem).type
        self._dtype = None if autocast is None else getattr(torch, autocast)
        self._call: Any = self._inner
        if backend is not None:
            try:
                self._call = torch.compile(self._inner.__call__, backend=backend)
            except Exception as error:
                raise StudyError(f"search.compile = {backend!r}: {_line(error)}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def __call__(
        self, x: Tensor, t: Tensor, *, cond: Any = None, guidance: Any = None, **named: str
    ) -> Tensor:
        with torch.autocast(self._device, self._dtype, enabled=self._dtype is not None):
            found: Tensor = self._call(x, t, cond=cond, guidance=guidance, **named)
        return found.to(x.dtype)


class Counted:
    """A denoiser that counts the images it is asked for, or with prices what they cost."""

    def __init__(self, inner: Denoiser, prices: Prices | None = None) -> None:
        self.inner, self.noise, self._prices, self._paid = inner, inner.noise, prices, 0.0
        self.piece: int | None = getattr(inner, "piece", None)
        self.device = getattr(inner, "device", None)
        self.networks = getattr(inner, "networks", {})

    @property
    def evaluations(self) -> int:
        """So far, a whole number."""
        return round(self._paid)

    def __call__(
        self, x: Tensor, t: Tensor, *, cond: Any = None, guidance: Any = None, **named: str
    ) -> Tensor:
        """See `Denoiser`."""
        each = 1.0
        if self._prices is not None:
            once = guidance is None or (isinstance(guidance, float | int) and guidance == 1)
            each = self._prices.of(guided=not once, network=named.get("network", ""))
        self._paid += each * len(x)
        return self.inner(x, t, cond=cond, guidance=guidance, **named)


def priced(prices: Prices, problem: AnyProblem) -> Prices:
    """The prices, with those of the networks that the problem's denoiser offers."""
    offered = getattr(getattr(problem, "denoiser", None), "networks", {})
    return replace(prices, networks={**offered, **prices.networks})


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


def of_decoded(features: Callable[[Tensor], Tensor], problem: Problem) -> Any:
    """A study's feature function as one of samples: latents are decoded first."""
    decode = problem.decode
    return features if decode is None else lambda x: features(decode(x)).to(x.device)


def device_of(problem: AnyProblem) -> torch.device:
    """Where the network runs, as its denoiser's `device` says; the CPU where it says nothing."""
    denoiser = problem.denoiser if isinstance(problem, Problem) else None
    return torch.device(getattr(denoiser, "device", None) or "cpu")


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
            f"{what} {path}: cannot import {module_name} ({_line(error)}): put it beside the "
            "study file or on PYTHONPATH"
        ) from error
    except Exception as error:
        raise StudyError(
            f"{what} {path}: importing {module_name} failed: {type(error).__name__}: "
            f"{_line(error)}"
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


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def sample_seed(seed: int, stream: str, index: int) -> int:
    """The seed of one sample's noise: no batch size and no worker can change it."""
    digest = hashlib.sha256(f"fewstep/{seed}/{stream}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


PERTURBED, DISTANCE = "~", 0.01
"""The stream "search~1" holds the noise of "search" moved by `DISTANCE` times other unit noise."""


def noise_of(seed: int, stream: str, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Unit noise of the samples `indices` of a stream, shape (B, *shape), float32.

    Args:
        seed: the study's seed.
        stream: "search", "select" or "fresh": streams share no noise.
        indices: sample indices.
        shape: shape of one sample.
    """
    whole, moved, _ = stream.partition(PERTURBED)
    if moved:
        other = noise_of(seed, stream.replace(PERTURBED, "/moved"), indices, shape)
        return noise_of(seed, whole, indices, shape) + DISTANCE * other
    return _drawn(seed, stream, tuple(indices), tuple(shape)).clone()


@functools.lru_cache(maxsize=8)
def _drawn(seed: int, stream: str, indices: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The blocks of a stream come again with every group of candidates."""
    draws = []
    for index in indices:
        generator = torch.Generator().manual_seed(sample_seed(seed, stream, index))
        draws.append(torch.randn(shape, generator=generator))
    return torch.stack(draws)


def prompts(problem: MaskedProblem, indices: range) -> Tensor:
    """The sequences that samples start from, `(B, length)`.

    Raises:
        StudyError: the problem's prompts have another shape.
    """
    if problem.prompt is None:
        return start_masked(problem.denoiser, len(indices), problem.length)
    tokens = problem.prompt(torch.as_tensor(list(indices)))
    if tokens.shape != (len(indices), problem.length):
        raise StudyError(
            f"the prompt returned {tuple(tokens.shape)} for {len(indices)} samples: (B, "
            f"{problem.length}) is needed"
        )
    return tokens


def uniforms_of(seed: int, stream: str, indices: range, shape: tuple[int, int]) -> Tensor:
    """The uniforms of the samples `indices` of a stream, float64 `(B, *shape)`.

    The rows that schedules have in common are the same.
    """
    draws = []
    for index in indices:
        generator = torch.Generator().manual_seed(sample_seed(seed, stream, index))
        draws.append(uniforms(*shape, generator=generator))
    return torch.stack(draws)


def conditions(problem: Problem, indices: Sequence[int]) -> dict[str, Tensor] | None:
    """The conditioning tensors of samples, or None for an unconditional model."""
    return None if problem.cond is None else problem.cond(torch.as_tensor(list(indices)))


def model_key(problem: Problem) -> str:
    """What tells one model from another: its fingerprint and its answer to one probe."""
    z = noise_of(0, "probe", range(2), problem.shape)
    t_start, t_end = problem.denoiser.noise.t_range
    t = torch.full((2,), (t_start + t_end) / 2, dtype=torch.float64)
    guidance = problem.guidance
    with torch.no_grad():
        out = problem.denoiser(z, t, cond=conditions(problem, range(2)), guidance=guidance)
    probe = hashlib.sha256(out.to(torch.float32).cpu().contiguous().numpy().tobytes()).hexdigest()[
        :12
    ]
    return f"{problem.fingerprint}/{probe}/{guidance}"
