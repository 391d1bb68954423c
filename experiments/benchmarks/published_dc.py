"""DC-Solver's ratio search as its authors released it, for comparison only.

AdamW through the network, unbounded, last iterate, no held-out check; and targets that repeat two
slips: a state of the teacher is filed under the time its step STARTED at, so the one taken for
time t is up to one teacher step past t, and the last step but one is matched to the final image.
What the library does instead: `search.strategies.compensation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, Denoiser
from fewstep.search.strategies.compensation import (
    Compensated,
    RatioSearch,
    Settings,
    StepReport,
    Trace,
    check_targets,
    with_ratios,
)
from fewstep.search.strategies.targets import states_on_the_way
from fewstep.space.baselines import dpm, grid, multistep
from fewstep.space.schedule import OdeSchedule
from fewstep.space.solve import Number


def as_published(
    schedule: OdeSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    targets: Sequence[Tensor],
    *,
    cond: Cond | None = None,
    guidance: float | None = None,
    iterations: int = 40,
    rate: float = 0.1,
    weight_decay: float = 0.01,
) -> Compensated:
    """The original's recipe: AdamW through the network, unbounded, last iterate, no check.

    Args:
        schedule: the base.
        denoiser: the model; gradients must pass through it.
        x_T: start states (the original uses 10).
        targets: N + 1 states; `published_targets` for the original's.
        cond: conditioning tensors.
        guidance: guidance scale where the schedule sets none.
        iterations: AdamW steps per ratio.
        rate: its learning rate.
        weight_decay: its weight decay, a pull of the ratio towards 0.
    """
    check_targets(schedule, targets, x_T)
    trace = Trace(schedule, denoiser, x_T, cond=cond, guidance=guidance)
    ratios, outputs, reports = [1.0] * schedule.n_steps, list[Tensor](), list[StepReport]()
    for i in range(schedule.n_steps):
        calls, landed = trace.plan(ratios)
        with torch.no_grad():
            outputs = trace.ask(calls, outputs, trace.known(landed, i))
        if i < schedule.compensation_order:
            continue
        rho = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.AdamW([rho], lr=rate, weight_decay=weight_decay)
        losses = []
        for _ in range(iterations):
            mixed: list[Number] = [*ratios[:i], rho, *ratios[i + 1 :]]
            calls, landed = trace.plan(mixed)
            vector, n = landed[i]
            x = trace.value(vector, trace.ask(calls, outputs, n))
            loss = (x - targets[i + 1].to(x)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        ratios[i] = float(rho.detach())
        reports.append(StepReport(i, ratios[i], "adamw", losses[0], losses[-1]))
    spent = trace.calls
    everything = slice(None)
    search = RatioSearch(trace, targets, (everything, everything), Settings(held=0.0))
    with torch.no_grad():
        ends = search.endpoint([1.0] * schedule.n_steps)[0], search.endpoint(ratios)[0]
    return Compensated(
        with_ratios(schedule, ratios), tuple(ratios), tuple(reports), *ends, calls=spent
    )


def published_targets(
    schedule: OdeSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    *,
    steps: int = 200,
    cond: Cond | None = None,
    guidance: float | None = None,
) -> list[Tensor]:
    """The original's targets: DDIM of `steps` steps, uniform in time, with both slips."""
    first, last = schedule.times[0], schedule.times[-1]
    times = grid(schedule.noise, steps, "time", t_start=first, t_end=last)
    teacher = multistep(schedule.noise, times, 1, spec=dpm("data", 1))
    states = states_on_the_way(teacher, denoiser, x_T, set(range(steps)), cond, guidance)
    wanted = published_indices(schedule.times, times)
    return [states[0], *(states[k] for k in wanted)]


def published_indices(student: Sequence[float], teacher: Sequence[float]) -> list[int]:
    """Which teacher state the released search takes as the target of every step."""
    n, tolerance = len(student) - 1, 1e-9 * abs(student[0])
    found = []
    for i in range(n):
        t = student[i + 1] if i < n - 2 else student[-1]
        label = max(k for k, s in enumerate(teacher) if s >= t - tolerance)
        found.append(min(label + 1, len(teacher) - 1))
    return found
