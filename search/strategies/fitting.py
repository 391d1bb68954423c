"""What refinement fits to: noise with the teacher's end points, the settings, the errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.samplers import Denoiser, run
from fewstep.search.strategies.knobs import DEFAULT
from fewstep.space import OdeSchedule, Program, stack
from fewstep.space.errors import ScheduleError


class Model(Protocol):
    """Numbers theta and the program they mean."""

    def scale(self) -> Tensor:
        """How far each number may usefully move."""
        ...

    def program(self, theta: Tensor) -> Program:
        """The program at theta, differentiable."""
        ...


@dataclass(frozen=True)
class Batch:
    """Noise, what the teacher made of it, and conditions.

    Args:
        x_T: start states, (n, *shape).
        target: the teacher's samples, (n, *shape).
        cond: conditioning tensors with leading axis n.
        guidance: guidance scale where the schedules set none.
        constant: the constant image m that schedules may start from; Gauss-Newton then fits its
            weights as well.
    """

    x_T: Tensor
    target: Tensor
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    guidance: float | None = None
    constant: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_T)

    def take(self, at: Tensor | slice) -> Batch:
        """A part of it."""
        cond = {name: value[at] for name, value in self.cond.items()}
        return dataclasses.replace(self, x_T=self.x_T[at], target=self.target[at], cond=cond)


@dataclass(frozen=True)
class Settings:
    """How long and how carefully.

    Args:
        knobs: which numbers move (`knobs.KNOBS`).
        method: "adam" or "gauss-newton".
        rounds: Gauss-Newton rounds on few samples, at most; on all of them half as many.
        steps: Adam steps.
        batch: training samples in one Adam step, or in Gauss-Newton's rounds on few; also what
            runs as one piece.
        rate: Adam's step size at the start; falls to a twentieth by a cosine.
        decay: Adam: weight of the squared distance from theta = 0, beside the log error.
        pull: Gauss-Newton: the same, relative to the mean curvature.
        least_gain: two Gauss-Newton rounds that lower the error by a smaller share end a fit.
            Small, as a call of weight 0 (`space.growing`) begins a fit on a plateau.
        budget: network evaluations after which Gauss-Newton starts no further round; None is no
            limit.
        history: older outputs with an extra weight.
        every: steps between looks at the held-out noise.
        patience: looks without progress before stopping.
        checkpointed: recompute the network in the backward pass instead of storing it.
        features: samples (m, *shape) -> (m, f): the error is the mean squared difference of
            features; None compares the samples themselves.
        options: run-time options that the schedules run with (`OdeSchedule.options`).
    """

    knobs: tuple[str, ...] = DEFAULT
    method: str = "gauss-newton"
    rounds: int = 20
    steps: int = 150
    batch: int = 64
    rate: float = 0.1
    decay: float = 1e-4
    pull: float = 1e-9
    least_gain: float = 0.003
    budget: int | None = None
    history: int = 16
    every: int = 20
    patience: int = 6
    checkpointed: bool = False
    features: Callable[[Tensor], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refined:
    """One refined schedule.

    Args:
        schedule: the result; the start itself if nothing better was found.
        before: held-out error of the start.
        after: held-out error of the result.
        curve: (step, held-out error) pairs.
        calls: network evaluations spent on this candidate, a backward pass counted as two.
        method: the method that ran.
    """

    schedule: OdeSchedule
    before: float
    after: float
    curve: tuple[tuple[int, float], ...]
    calls: int
    method: str


def residuals(
    programs: Sequence[Program],
    denoiser: Denoiser,
    batch: Batch,
    settings: Settings,
    *,
    share: bool = False,
) -> Tensor:
    """Differences to the target (of features, if the settings name some), (M, n, numbers)."""
    x = run(
        stack(programs),
        denoiser,
        batch.x_T,
        cond=dict(batch.cond) or None,
        guidance=batch.guidance,
        m=batch.constant,
        options=dict(settings.options),
        check=False,
        share=share,
    )
    target = batch.target.to(x.dtype)
    if settings.features is not None:
        found = settings.features(x.flatten(0, 1)).reshape(len(programs), len(batch), -1)
        return found - settings.features(target).reshape(1, len(batch), -1)
    return (x - target).flatten(2)


def errors(
    programs: Sequence[Program], denoiser: Denoiser, batch: Batch, settings: Settings
) -> Tensor:
    """Mean squared residual of every program, shape (M,)."""
    return residuals(programs, denoiser, batch, settings).square().mean(dim=(1, 2))


@torch.no_grad()
def held_out(
    models: Sequence[Model],
    thetas: Sequence[Tensor],
    denoiser: Denoiser,
    batch: Batch,
    settings: Settings,
) -> list[float]:
    """Error of every candidate on `batch`; inf where it diverges or does not compile."""
    found = [math.inf] * len(models)
    programs: dict[int, Program] = {}
    for i, (model, theta) in enumerate(zip(models, thetas, strict=True)):
        try:
            programs[i] = model.program(theta)
        except ScheduleError:
            continue
    sums = torch.zeros(len(programs), dtype=torch.float64)
    for at in range(0, len(batch), settings.batch):
        part = batch.take(slice(at, at + settings.batch))
        if programs:
            sums += errors(list(programs.values()), denoiser, part, settings).double() * len(part)
    for i, total in zip(programs, sums.tolist(), strict=True):
        found[i] = total / len(batch) if math.isfinite(total) else math.inf
    return found
