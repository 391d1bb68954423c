"""Weights in closed form: a small ridge regression per step, no optimiser, no back-propagation.

With the teacher's trajectory at exactly the schedule's times, step i's result is linear in the
extra weights of its history,

    x_{i+1}(w) = x_{i+1}(0) + sum_k w_k G_k,     G_k = A_0 (F_{i-k} - F_i),

so the w that brings it closest to the teacher's state is a ridge regression centred on the
solver's own weights (w = 0); constants stay exact for every w. Steps are fitted in sampling order,
each on the states the earlier ones lead to, half of the noise is held out, and a step's weights
are kept only if the held-out error falls. It needs one student pass per step and one teacher
solve, and is the start for `refine` or a result of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.samplers import Denoiser, run
from fewstep.samplers.ode import Progress
from fewstep.search.strategies.fitting import Batch, Refined, Settings, errors
from fewstep.space import OdeSchedule, StepSpec, compile
from fewstep.space.noise import NoiseSchedule


@dataclass(frozen=True)
class StepFit:
    """What the regression found for one step: held-out errors and the weights."""

    step: int
    before: float
    after: float
    weights: tuple[float, ...]


@torch.no_grad()
def teacher_states(
    denoiser: Denoiser,
    noise: NoiseSchedule,
    times: Sequence[float],
    batch: Batch,
    *,
    substeps: int = 8,
    tableau: str = "kutta3",
) -> list[Tensor]:
    """The teacher's states at exactly `times`, from batch.x_T at times[0].

    Args:
        denoiser: the model.
        noise: its noise schedule.
        times: decreasing times; the last may be clean data.
        batch: start states and conditions.
        substeps: Runge-Kutta steps in each interval, uniform in lam.
        tableau: the Runge-Kutta method.

    Returns:
        len(times) tensors of batch.x_T's shape, the first being x_T.
    """
    states = [batch.x_T]
    for t, t_next in pairwise(times):
        ends = torch.tensor([t, t_next], dtype=torch.float64)
        lam = noise.lam(ends).clamp(-9.0, 9.0)
        share = torch.linspace(0, 1, substeps + 1, dtype=torch.float64)
        inner = noise.t_of_lam(lam[0] + share * (lam[1] - lam[0])).tolist()[1:-1]
        rk = StepSpec(formulation="noise", basis="rho", tableau=tableau)
        last = rk if t_next > noise.t_data else StepSpec()
        steps = (*(rk,) * (substeps - 1), last)
        piece = OdeSchedule(noise=noise, times=(t, *inner, t_next), steps=steps)
        cond = dict(batch.cond) or None
        states.append(run(piece.program, denoiser, states[-1], cond=cond, guidance=batch.guidance))
    return states


@torch.no_grad()
def fit_weights(
    schedule: OdeSchedule,
    denoiser: Denoiser,
    batch: Batch,
    targets: Sequence[Tensor],
    *,
    history: int = 3,
    ridge: float = 1e-3,
) -> tuple[OdeSchedule, list[StepFit]]:
    """Closed-form extra weights for every step that has history.

    Args:
        schedule: the schedule to improve; tableau steps and fresh noise are left alone.
        denoiser: the model.
        batch: noise and conditions; the second half is held out.
        targets: the teacher's states at schedule.times (`teacher_states`).
        history: older outputs that get a weight, per step at most.
        ridge: penalty, relative to the mean square of the directions.

    Returns:
        The schedule with the weights that helped, and one `StepFit` for each step tried.
    """
    half = len(batch) // 2
    found: list[StepFit] = []
    for i in range(1, schedule.n_steps):
        step = schedule.steps[i]
        count = min(history, i)
        if step.tableau is not None or step.eta != 0:
            continue
        prefix = _prefix(schedule, i, count)
        outputs: list[Tensor] = []

        def keep(progress: Progress, into: list[Tensor] = outputs) -> None:
            into.append(progress.denoised)

        cond = dict(batch.cond) or None
        x = run(
            prefix.program,
            denoiser,
            batch.x_T,
            cond=cond,
            guidance=batch.guidance,
            m=schedule.constant,
            callback=keep,
        )
        directions = _directions(prefix, i, count, outputs, batch.x_T)
        missing = targets[i + 1].to(x.dtype) - x
        weights = _ridge(directions[:, :half], missing[:half], ridge)
        moved = missing[half:] - torch.tensordot(weights.to(x), directions[:, half:], dims=1)
        before, after = float(missing[half:].square().mean()), float(moved.square().mean())
        if after < before:
            old = (*step.weights, *(0.0,) * (count - len(step.weights)))
            new = tuple(a + b for a, b in zip(old, weights.tolist(), strict=False))
            steps = list(schedule.steps)
            steps[i] = step.model_copy(update={"weights": new})
            schedule = schedule.model_copy(update={"steps": tuple(steps)})
        found.append(StepFit(i, before, min(before, after), schedule.steps[i].weights))
    return schedule, found


@torch.no_grad()
def by_closed_form(
    schedule: OdeSchedule, denoiser: Denoiser, train: Batch, held: Batch, settings: Settings
) -> Refined:
    """The closed form as a refinement: fitted on `train`, kept if the error on `held` falls."""
    substeps, stages = 8, 3
    noise, n = schedule.noise, schedule.n_steps
    targets = teacher_states(denoiser, noise, schedule.times, train, substeps=substeps)
    better, _ = fit_weights(schedule, denoiser, train, targets, history=settings.history)
    before, after = errors([schedule.program, better.program], denoiser, held, settings).tolist()
    kept = better if after < before else schedule
    calls = len(train) * (n * substeps * stages + n * (n + 1) // 2) + 2 * len(held) * n
    return Refined(kept, before, min(before, after), ((0, before),), calls, "closed-form")


def _prefix(schedule: OdeSchedule, i: int, count: int) -> OdeSchedule:
    """Steps 0..i, the last without a corrector (its predictor is what is fitted)."""
    step = schedule.steps[i]
    old = (*step.weights[:count], *(0.0,) * (count - len(step.weights)))
    none = {
        "corrector": "none",
        "corrector_order": None,
        "corrector_relaxation": "none",
        "corrector_slope_points": None,
    }
    last = step.model_copy(update={"weights": old} | none)
    steps = (*schedule.steps[:i], last)
    return schedule.model_copy(update={"steps": steps, "times": schedule.times[: i + 2]})


def _directions(
    prefix: OdeSchedule, i: int, count: int, outputs: list[Tensor], x_T: Tensor
) -> Tensor:
    """G_k, shape (count, n, *shape): how the last row changes with the k-th extra weight."""
    base = prefix.program
    found = []
    for k in range(count):
        weights = torch.zeros(i + 1, max(count, 1), dtype=torch.float64)
        for j, step in enumerate(prefix.steps):
            weights[j, : len(step.weights[:count])] = torch.tensor(
                step.weights[:count], dtype=torch.float64
            )
        weights[i, k] += 1.0
        row = compile(prefix, {"weights": weights})
        g = (row.e[-1] - base.e[-1]).to(x_T) * x_T
        for j, D in enumerate(outputs):
            g = g + (row.b[-1, j] - base.b[-1, j]).to(D) * D
        found.append(g)
    return torch.stack(found)


def _ridge(directions: Tensor, missing: Tensor, ridge: float) -> Tensor:
    G = directions.flatten(1).double()
    r = missing.flatten().double()
    normal = G @ G.T
    penalty = ridge * float(normal.diagonal().mean()) * torch.eye(len(G), dtype=torch.float64)
    weights: Tensor = torch.linalg.solve(normal + penalty, G @ r)
    return weights
