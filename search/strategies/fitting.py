"""What refinement fits to: noise with the teacher's end points, the settings, the errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fewstep.samplers import Denoiser, run
from fewstep.search.strategies.knobs import DEFAULT
from fewstep.space import OdeSchedule, Program, stack
from fewstep.space.errors import ScheduleError

MOST = 16.0
"""Medians of the errors per sample that a held-out sample counts for at most."""


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
        constant: the constant image of schedules that start from one.
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
        budget: network evaluations after which Gauss-Newton starts no further round; None is no
            limit.
        history: older outputs with an extra weight.
        every: steps between looks at the held-out noise.
        patience: looks without progress before stopping.
        checkpointed: recompute the network in the backward pass instead of storing it.
        features: samples (m, *shape) -> (m, f): the error is the mean squared difference of
            features; None compares the samples themselves.
    """

    knobs: tuple[str, ...] = DEFAULT
    method: str = "gauss-newton"
    rounds: int = 20
    steps: int = 150
    batch: int = 64
    rate: float = 0.1
    decay: float = 1e-4
    pull: float = 1e-9
    least_gain: float = 0.01
    budget: int | None = None
    history: int = 16
    every: int = 20
    patience: int = 6
    checkpointed: bool = False
    features: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Refined:
    """One refined schedule.

    Args:
        schedule: the result; the start itself if nothing better was found.
        before: held-out error of the start, a `robust_mean` over samples.
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


def robust_mean(each: Tensor) -> Tensor:
    """Means (M,) of errors per sample (M, n), those above `MOST` medians counted as that.

    Inf where a sample diverged. What is fitted is the plain mean; but which of a few hundred held
    out samples end in another mode is chance, and an iterate chosen by them is no better on
    other noise.
    """
    mean = each.clamp(max=MOST * each.median(dim=1, keepdim=True).values).mean(dim=1)
    return torch.where(torch.isfinite(each).all(dim=1), mean, math.inf)


def held_out(
    models: Sequence[Model],
    thetas: Sequence[Tensor],
    denoiser: Denoiser,
    batch: Batch,
    settings: Settings,
) -> list[float]:
    """`robust_mean` error of every candidate; inf where it diverges or does not compile."""
    return _means(robust_mean, models, thetas, denoiser, batch, settings)


def mean_errors(
    models: Sequence[Model],
    thetas: Sequence[Tensor],
    denoiser: Denoiser,
    batch: Batch,
    settings: Settings,
) -> list[float]:
    """Mean error of every candidate; inf where it diverges or does not compile."""

    def mean(each: Tensor) -> Tensor:
        return each.mean(dim=1).nan_to_num(nan=math.inf)

    return _means(mean, models, thetas, denoiser, batch, settings)


@torch.no_grad()
def _means(
    mean: Callable[[Tensor], Tensor],
    models: Sequence[Model],
    thetas: Sequence[Tensor],
    denoiser: Denoiser,
    batch: Batch,
    settings: Settings,
) -> list[float]:
    found = [math.inf] * len(models)
    programs: dict[int, Program] = {}
    for i, (model, theta) in enumerate(zip(models, thetas, strict=True)):
        try:
            programs[i] = model.program(theta)
        except ScheduleError:
            continue
    if not programs:
        return found
    each = per_sample(list(programs.values()), denoiser, batch, settings)
    for i, value in zip(programs, mean(each).tolist(), strict=True):
        found[i] = value
    return found


@torch.no_grad()
def per_sample(
    programs: Sequence[Program], denoiser: Denoiser, batch: Batch, settings: Settings
) -> Tensor:
    """Mean squared residual of every program on every sample, (M, n) in float64."""
    starts = range(0, len(batch), settings.batch)
    parts = [batch.take(slice(at, at + settings.batch)) for at in starts]
    each = [residuals(programs, denoiser, part, settings).square().mean(dim=2) for part in parts]
    return torch.cat(each, dim=1).double()
