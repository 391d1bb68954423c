"""Refinement: the numbers of a schedule fitted end to end to the teacher's samples.

theta (see `knobs`) is fitted on shared noise, held towards theta = 0, and the iterate with the
lowest error on held-out noise is kept, by one of two methods on the same theta:

    gauss-newton  Levenberg-Marquardt on the residuals x(theta) - target; a few dozen unknowns
                  make the Jacobian by finite differences cheap, and its columns run as one batch
                  of candidates. Needs no gradient of the model: ONNX and remote models too.
    adam          back-propagation through compile and loop on sum_k log MSE_k, K schedules in one
                  batch, minibatches of noise, the network checkpointed when memory asks for it.

References: learned times and coefficients by back-propagation through the sampler, LD3 (arXiv
2405.15506), S4S (2502.17423), GAS (2510.17699); here the start is a searched schedule and the
result an ordinary schedule file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.samplers import Denoiser, run
from fewstep.search.strategies.knobs import DEFAULT, Knobs
from fewstep.space import OdeSchedule, Program, compile, stack
from fewstep.space.errors import ScheduleError, StudyError
from fewstep.space.noise import NoiseSchedule


@dataclass(frozen=True)
class Batch:
    """Noise, what the teacher made of it, and conditions.

    Args:
        x_T: start states, (n, *shape).
        target: the teacher's samples, (n, *shape).
        cond: conditioning tensors with leading axis n.
        guidance: guidance scale where the schedules set none.
    """

    x_T: Tensor
    target: Tensor
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    guidance: float | None = None

    def __len__(self) -> int:
        return len(self.x_T)

    def take(self, at: Tensor | slice) -> Batch:
        """A part of it."""
        cond = {name: value[at] for name, value in self.cond.items()}
        return Batch(self.x_T[at], self.target[at], cond, self.guidance)


@dataclass(frozen=True)
class Settings:
    """How long and how carefully.

    Args:
        knobs: which numbers move (`knobs.KNOBS`).
        method: "adam" or "gauss-newton".
        rounds: Gauss-Newton rounds.
        steps: Adam steps.
        batch: training samples in one piece (Gauss-Newton) or one step (Adam).
        rate: Adam's step size at the start; falls to a twentieth by a cosine.
        decay: weight of the squared distance from theta = 0.
        history: older outputs with an extra weight.
        every: steps between looks at the held-out noise.
        patience: looks without progress before stopping.
        checkpointed: recompute the network in the backward pass instead of storing it.
        features: samples (m, *shape) -> (m, f): the error is the mean squared difference of
            features; None compares the samples themselves.
    """

    knobs: tuple[str, ...] = DEFAULT
    method: str = "adam"
    rounds: int = 8
    steps: int = 150
    batch: int = 64
    rate: float = 0.1
    decay: float = 1e-4
    history: int = 3
    every: int = 20
    patience: int = 6
    checkpointed: bool = False
    features: Callable[[Tensor], Tensor] | None = None


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


class _Checkpointed:
    """A Denoiser whose activations are recomputed in the backward pass."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._inner = denoiser
        self.noise: NoiseSchedule = denoiser.noise

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        *,
        cond: Mapping[str, Tensor] | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        def call(x: Tensor, t: Tensor) -> Tensor:
            return self._inner(x, t, cond=cond, guidance=guidance)

        out: Tensor = checkpoint(call, x, t, use_reentrant=False)
        return out


def refine(
    starts: Sequence[OdeSchedule],
    denoiser: Denoiser,
    train: Batch,
    held: Batch,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Refined]:
    """Refine K schedules of equal NFE together.

    Args:
        starts: the schedules, all with the same number of calls.
        denoiser: the model.
        train: noise to fit on.
        held: noise to choose the iterate by; must not overlap `train`.
        settings: see `Settings`. Where "adam" meets a model without gradients, Gauss-Newton runs.
        seed: of Adam's minibatches.
        progress: called with (step, steps).

    Returns:
        One `Refined` per start, in order. The error never exceeds the start's on `held`.

    Raises:
        StudyError: different NFEs, or an unknown knob.
    """
    settings = settings or Settings()
    if len({s.nfe for s in starts}) != 1:
        raise StudyError("refine: schedules of different NFE cannot run as one batch; group them")
    knobs = [
        Knobs(s, settings.knobs, settings.history, guidance=train.guidance or held.guidance)
        for s in starts
    ]
    if settings.method not in ("gauss-newton", "adam"):
        raise StudyError(f"refine: method {settings.method!r} is not gauss-newton or adam")
    if settings.method == "adam" and _has_gradient(knobs[0], denoiser, train.take(slice(0, 1))):
        if settings.checkpointed:
            denoiser = _Checkpointed(denoiser)
        return _by_adam(knobs, denoiser, train, held, settings, seed, progress)
    return [_by_gauss_newton(k, denoiser, train, held, settings, progress) for k in knobs]


def residuals(
    programs: Sequence[Program], denoiser: Denoiser, batch: Batch, settings: Settings
) -> Tensor:
    """Differences to the target (of features, if the settings name some), (M, n, numbers)."""
    cond = dict(batch.cond) or None
    x = run(stack(programs), denoiser, batch.x_T, cond=cond, guidance=batch.guidance, check=False)
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
    knobs: Sequence[Knobs],
    thetas: Sequence[Tensor],
    denoiser: Denoiser,
    batch: Batch,
    settings: Settings,
) -> list[float]:
    """Error of every candidate on `batch`; inf where it diverges or does not compile."""
    found = [math.inf] * len(knobs)
    programs: dict[int, Program] = {}
    for i, (k, theta) in enumerate(zip(knobs, thetas, strict=True)):
        try:
            programs[i] = compile(k.base, k.values(theta))
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


def _has_gradient(knobs: Knobs, denoiser: Denoiser, batch: Batch) -> bool:
    x = batch.x_T.detach().clone().float().requires_grad_()
    t = torch.full((len(x),), knobs.schedule.times[0], dtype=torch.float64)
    try:
        return bool(
            denoiser(x, t, cond=dict(batch.cond) or None, guidance=batch.guidance).requires_grad
        )
    except RuntimeError:
        return False


def _by_adam(
    knobs: Sequence[Knobs],
    denoiser: Denoiser,
    train: Batch,
    held: Batch,
    settings: Settings,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> list[Refined]:
    thetas = [k.zeros().requires_grad_() for k in knobs]
    scales = [k.scale() for k in knobs]
    optimiser = torch.optim.Adam(
        [{"params": [th], "lr": settings.rate} for th in thetas], betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, settings.steps, eta_min=settings.rate / 20
    )
    generator = torch.Generator().manual_seed(seed)
    before = held_out(knobs, thetas, denoiser, held, settings)
    best, best_theta = list(before), [th.detach().clone() for th in thetas]
    curves: list[list[tuple[int, float]]] = [[(0, b)] for b in before]
    stale = taken = 0
    looks = 1
    for step in range(1, settings.steps + 1):
        at = torch.randint(len(train), (min(settings.batch, len(train)),), generator=generator)
        programs = [
            compile(k.base, k.values(th * s))
            for k, th, s in zip(knobs, thetas, scales, strict=True)
        ]
        loss = torch.log(errors(programs, denoiser, train.take(at), settings).double() + 1e-12)
        away = torch.stack([th.square().sum() for th in thetas])
        optimiser.zero_grad()
        torch.where(
            torch.isfinite(loss), loss + settings.decay * away, torch.zeros_like(loss)
        ).sum().backward()
        for th in thetas:
            if th.grad is not None:
                th.grad.nan_to_num_(0.0, 0.0, 0.0).clamp_(-5.0, 5.0)
        optimiser.step()
        schedule.step()
        taken = step
        if progress is not None:
            progress(step, settings.steps)
        if step % settings.every and step != settings.steps:
            continue
        looks += 1
        now = held_out(
            knobs, [th * s for th, s in zip(thetas, scales, strict=True)], denoiser, held, settings
        )
        stale += 1
        for k, (error, th) in enumerate(zip(now, thetas, strict=True)):
            curves[k].append((step, error))
            if error < best[k]:
                stale = 0
                best[k], best_theta[k] = error, (th * scales[k]).detach().clone()
        if stale >= settings.patience:
            break
    nfe = knobs[0].schedule.nfe
    calls = nfe * (3 * taken * min(settings.batch, len(train)) + looks * len(held))
    found = []
    for one, start, end, th, curve in zip(knobs, before, best, best_theta, curves, strict=True):
        result = one.apply(th) if end < start else one.schedule
        found.append(Refined(result, start, end, tuple(curve), calls, "adam"))
    return found


def _by_gauss_newton(
    knobs: Knobs,
    denoiser: Denoiser,
    train: Batch,
    held: Batch,
    settings: Settings,
    progress: Callable[[int, int], None] | None,
) -> Refined:
    """Levenberg-Marquardt; the Jacobian by forward differences, its columns one candidate batch.

    The first rounds look at a quarter of the noise: far from the optimum that is enough.
    """
    scale, theta = knobs.scale(), knobs.zeros()
    [before] = held_out([knobs], [theta], denoiser, held, settings)
    best, best_theta, curve = before, theta, [(0, before)]
    damping, used, stale = 1e-2, len(held), 0
    steps = torch.cat([theta[None], _DIFFERENCE * torch.eye(knobs.size, dtype=torch.float64)])
    for turn in range(1, settings.rounds + 1):
        few = max(settings.batch, len(train) // 4)
        batch = train.take(slice(0, few)) if turn <= settings.rounds // 2 else train
        normal, slope, now = _normal_equations(
            knobs, theta, steps, scale, denoiser, batch, settings
        )
        used += (len(steps) + len(_DAMPINGS)) * len(batch) + len(held)
        options, scores = [], [math.inf]
        for _ in range(4):
            options = [_move(theta, normal, slope, damping * m, settings) for m in _DAMPINGS]
            trial = [o * scale for o in options]
            scores = held_out([knobs] * len(trial), trial, denoiser, batch, settings)
            if min(scores) < now:
                break
            damping *= 1e4
        if min(scores) < now:
            at = int(np.argmin(scores))
            theta, damping = options[at], max(damping * _DAMPINGS[at], 1e-6)
        [error] = held_out([knobs], [theta * scale], denoiser, held, settings)
        curve.append((turn, error))
        stale = 0 if error < 0.99 * best else stale + 1
        if error < best:
            best, best_theta = error, theta
        if progress is not None:
            progress(turn, settings.rounds)
        if stale >= 3 and turn > settings.rounds // 2:
            break
    result = knobs.apply(best_theta * scale) if best < before else knobs.schedule
    return Refined(result, before, best, tuple(curve), used * knobs.schedule.nfe, "gauss-newton")


_DIFFERENCE = 2e-3  # far above float32 rounding of the samples, far below where theta bends
_DAMPINGS = (0.1, 1.0, 10.0)


def _move(theta: Tensor, normal: Tensor, slope: Tensor, damping: float, s: Settings) -> Tensor:
    """One damped step, held towards theta = 0 by `decay` (relative to the mean curvature)."""
    diagonal = normal.diagonal()
    pull = s.decay * diagonal.mean()
    matrix = normal + torch.diag(damping * diagonal + pull + 1e-12)
    step: Tensor = torch.linalg.solve(matrix, slope + pull * theta)
    return theta - step


@torch.no_grad()
def _normal_equations(
    knobs: Knobs,
    theta: Tensor,
    steps: Tensor,
    scale: Tensor,
    denoiser: Denoiser,
    batch: Batch,
    settings: Settings,
) -> tuple[Tensor, Tensor, float]:
    """J J^T, J r and the error at theta; sums over samples, so they do not grow with the batch."""
    programs = [compile(knobs.base, knobs.values((theta + d) * scale)) for d in steps]
    size = knobs.size
    normal, slope = torch.zeros(size, size).double(), torch.zeros(size).double()
    total = 0.0
    for at in range(0, len(batch), settings.batch):
        part = batch.take(slice(at, at + settings.batch))
        r = residuals(programs, denoiser, part, settings).flatten(1).double()
        J = (r[1:] - r[0]) / _DIFFERENCE
        J = J * torch.isfinite(J).all(dim=1, keepdim=True)  # a column that diverges stays put
        normal += J.nan_to_num(0.0) @ J.nan_to_num(0.0).T
        slope += J.nan_to_num(0.0) @ r[0]
        total += float(r[0].square().sum())
    count = len(batch) * r.shape[1] / len(part)
    return normal / count, slope / count, total / count
