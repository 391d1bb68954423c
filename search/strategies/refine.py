"""Refinement: the numbers of a schedule fitted end to end to the teacher's samples.

theta (see `knobs`) is fitted on shared noise, held towards theta = 0, and the iterate with the
lowest error on held-out noise is kept, by one of two methods on the same theta:

    gauss-newton  Levenberg-Marquardt on the residuals x(theta) - target (see `gauss_newton`); a
                  few dozen unknowns make the Jacobian by finite differences cheap. Needs no
                  gradient of the model: ONNX and remote models too.
    adam          back-propagation through compile and loop on sum_k log MSE_k, K schedules in one
                  batch, minibatches of noise, the network checkpointed when memory asks for it.

References: learned times and coefficients by back-propagation through the sampler, LD3 (arXiv
2405.15506), S4S (2502.17423), GAS (2510.17699); here the start is a searched schedule and the
result an ordinary schedule file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.samplers import Denoiser
from fewstep.search.strategies.fitting import Batch, Refined, Settings, errors, held_out
from fewstep.search.strategies.gauss_newton import by_gauss_newton
from fewstep.search.strategies.knobs import Knobs
from fewstep.space import OdeSchedule
from fewstep.space.errors import StudyError
from fewstep.space.noise import NoiseSchedule

__all__ = [
    "Batch",
    "Refined",
    "Settings",
    "errors",
    "held_out",
    "refine",
    "refine_best",
]


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
        StudyError: different NFEs or run-time options, the time shift among these, or an unknown
            knob.
    """
    if len({s.nfe for s in starts}) != 1:
        raise StudyError("refine: schedules of different NFE cannot run as one batch; group them")
    options = starts[0].options
    if any(s.options != options for s in starts) or "time_shift" in options:
        raise StudyError(
            "refine: schedules with other run-time options cannot run as one batch, and one with "
            "options.time_shift has no program to fit: leave them out"
        )
    settings = dataclasses.replace(settings or Settings(), options=options)
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
    return [by_gauss_newton(k, denoiser, train, held, settings, progress) for k in knobs]


def refine_best(
    starts: Sequence[OdeSchedule],
    denoiser: Denoiser,
    train: Batch,
    held: Batch,
    settings: Settings | None = None,
    *,
    seed: int = 0,
) -> tuple[int, Refined]:
    """Refine every start cheaply, then the one that got furthest to the end.

    Cheaply is, by Gauss-Newton, on the first `settings.batch` samples until that gains no more; by
    Adam, a fifth of the steps.

    Returns:
        Which start it was, and its `Refined`, with the calls of all and `before` of this start.
    """
    settings = settings or Settings()
    if len(starts) == 1:
        return 0, refine(starts, denoiser, train, held, settings, seed=seed)[0]
    short = dataclasses.replace(settings, steps=max(1, settings.steps // 5))
    part = train.take(slice(0, settings.batch)) if settings.method == "gauss-newton" else train
    tried = refine(starts, denoiser, part, held, short, seed=seed)
    at = min(range(len(tried)), key=lambda i: tried[i].after)
    [found] = refine([tried[at].schedule], denoiser, train, held, settings, seed=seed + 1)
    calls = found.calls + sum(one.calls for one in tried)
    return at, dataclasses.replace(found, before=tried[at].before, calls=calls)


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
        programs = [k.program(th * s) for k, th, s in zip(knobs, thetas, scales, strict=True)]
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
