"""Adam through the sampler: how the peers' numbers are learned.

A step draws a batch of noise, runs the program of the present numbers, and follows the gradient of
the batch's error to the teacher's end points; a backward pass counts as two forward ones. The step
size warms up over a tenth of the steps and falls to a hundredth by a cosine, the gradient's norm
is clipped at 1 (as DyWeight trains). The numbers with the least loss on held-out noise are kept.

LD3's soft objective lets the sampler answer for another noise within a ball of radius
.001 d / C^2 around its own (d numbers in a sample, C calls): after each step the noise moves along
its own gradient, at rate 12 / C, back onto the ball, and stays there if its error fell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.experiments.benchmarks.peers_forms import Form
from fewstep.predictors.gauss_newton import Batch
from fewstep.samplers import Denoiser, run_candidates
from fewstep.search.display import Display
from fewstep.space import Program
from fewstep.space.errors import ScheduleError

_FLOOR = 1e-12  # of an error under a logarithm


@dataclass(frozen=True)
class Plan:
    """How a form is fitted.

    Args:
        budget: network evaluations of the fit, a backward pass counted as two.
        batch: samples of a step.
        looks: times the held-out noise is looked at, fewer where that takes over an eighth of the
            budget.
        loss: "mean" of the squared errors, or of their "log" (BNS maximises the PSNR).
        soft: LD3's soft objective.
        seed: of the batches.
    """

    budget: int
    batch: int = 64
    looks: int = 16
    loss: str = "mean"
    soft: bool = False
    seed: int = 0


@dataclass(frozen=True)
class AdamFit:
    """What a fit ended with.

    Args:
        program: the program with the least loss on held-out noise; the start if nothing is below.
        before: that loss of the start.
        after: of the program.
        evaluations: network evaluations spent, a backward pass counted as two.
    """

    program: Program
    before: float
    after: float
    evaluations: int


def sample_errors(program: Program, denoiser: Denoiser, batch: Batch, x_T: Tensor) -> Tensor:
    """Mean squared error of every sample to its target, shape (n,)."""
    cond = dict(batch.cond) or None
    y = run_candidates([program], denoiser, x_T, cond=cond, guidance=batch.guidance)[0]
    return (y - batch.target.to(y)).square().flatten(1).mean(1)


def _loss(errors: Tensor, kind: str) -> Tensor:
    return torch.log(errors + _FLOOR).mean() if kind == "log" else errors.mean()


@torch.no_grad()
def _held(program: Program, denoiser: Denoiser, held: Batch, plan: Plan) -> float:
    parts = [held.take(slice(at, at + 256)) for at in range(0, len(held), 256)]
    errors = torch.cat([sample_errors(program, denoiser, p, p.x_T) for p in parts])
    value = float(_loss(errors.double(), plan.loss))
    return value if math.isfinite(value) else math.inf


class _Ball:
    """Noise that may leave its own within a ball."""

    def __init__(self, own: Tensor, calls: int) -> None:
        self.own, self.moved = own, own.clone()
        self.radius = 0.001 * own[0].numel() / calls**2
        self.rate = 12 / calls

    def follow(self, at: Tensor, slope: Tensor) -> Tensor:
        """Samples `at` moved against their slopes and back onto the ball."""
        away = (self.moved[at] - self.rate * slope - self.own[at]).flatten(1)
        size = away.norm(dim=1, keepdim=True).clamp(min=1e-30)
        kept = away * (self.radius / size).clamp(max=1.0)
        found: Tensor = self.own[at] + kept.reshape(slope.shape)
        return found


def step_sizes(steps: int) -> list[float]:
    """Shares of the highest step size: up over a tenth of the steps, down to .01 by a cosine."""
    warm = max(1, steps // 10)
    rising = [0.1 + 0.9 * i / warm for i in range(warm)]
    rest = max(1, steps - warm)
    falling = [0.01 + 0.495 * (1 + math.cos(math.pi * i / rest)) for i in range(steps - warm)]
    return rising + falling


def fit(
    form: Form, denoiser: Denoiser, train: Batch, held: Batch, plan: Plan, display: Display
) -> AdamFit:
    """Fit a form; see the module docstring.

    Args:
        form: what is learned.
        denoiser: the model, differentiable in its input.
        train: noise and the teacher's end points.
        held: other noise, by which the numbers are chosen.
        plan: see `Plan`.
        display: told of the evaluations.

    Raises:
        ScheduleError: the budget does not pay for one step.
    """
    groups = form.groups()
    values = [g.value.detach().clone().requires_grad_() for g in groups]
    optimiser = torch.optim.Adam([{"params": [v], "lr": 0.0} for v in values])
    start = _detached(form, values)
    size = min(plan.batch, len(train))
    each = start.nfe * size * (4 if plan.soft else 3)
    looking = len(held) * start.nfe
    looks = max(2, min(plan.looks, plan.budget // (8 * looking)))
    steps = (plan.budget - (looks + 1) * looking) // each
    if steps < 1:
        raise ScheduleError(f"a budget of {plan.budget} evaluations pays for no step: raise it")
    ball = _Ball(train.x_T, start.nfe) if plan.soft else None
    generator = torch.Generator().manual_seed(plan.seed)
    before = best = _held(start, denoiser, held, plan)
    kept, spent, every = start, looking, -(-steps // looks)
    for step, share in enumerate(step_sizes(steps)):
        at = torch.randint(len(train), (size,), generator=generator)
        for one, group in zip(optimiser.param_groups, groups, strict=True):
            one["lr"] = group.rate * share if step >= group.after * steps else 0.0
        part = train.take(at)
        _step(form, values, optimiser, denoiser, part, at, ball, plan.loss)
        spent += each
        display.advance(each)
        if (step + 1) % every == 0 or step + 1 == steps:
            now = _detached(form, values)
            error = _held(now, denoiser, held, plan)
            spent += looking
            display.advance(looking)
            if error < best:
                best, kept = error, now
    return AdamFit(kept, before, best, spent)


def _step(
    form: Form,
    values: Sequence[Tensor],
    optimiser: torch.optim.Optimizer,
    denoiser: Denoiser,
    part: Batch,
    at: Tensor,
    ball: _Ball | None,
    loss: str,
) -> None:
    """One step of Adam, and of the noise within its ball; one that is not finite is left out."""
    x_T = part.x_T if ball is None else ball.moved[at].requires_grad_()
    optimiser.zero_grad()
    errors = sample_errors(form.program(values), denoiser, part, x_T)
    value = _loss(errors, loss)
    if not bool(torch.isfinite(value)):
        return
    value.backward()
    slopes = [v.grad for v in values if v.grad is not None]
    if not all(bool(torch.isfinite(s).all()) for s in slopes):
        return
    torch.nn.utils.clip_grad_norm_(values, 1.0)
    optimiser.step()
    if ball is None or x_T.grad is None:
        return
    with torch.no_grad():
        tried = ball.follow(at, x_T.grad * len(at))
        lower = sample_errors(form.program(values), denoiser, part, tried) < errors
        ball.moved[at[lower]] = tried[lower]


@torch.no_grad()
def _detached(form: Form, values: Sequence[Tensor]) -> Program:
    return form.program([v.detach() for v in values])
