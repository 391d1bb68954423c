"""The teacher's states on the way, at exactly the student's times.

A fine grid is put INTO every step of the student, so that its times are among the teacher's and
nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, Denoiser
from fewstep.samplers.ode import Progress, sample
from fewstep.space.baselines import dpm, multistep
from fewstep.space.errors import StudyError
from fewstep.space.noise import NoiseSchedule
from fewstep.space.schedule import OdeSchedule

_PURE, _CLEAN = -7.0, 7.5  # stand for lam = -inf and +inf


def aligned_grid(noise: NoiseSchedule, times: Sequence[float], calls: int) -> list[list[float]]:
    """For every step of the student its inner grid, start included: about `calls` times in all.

    Uniform in lam within a step, at least 4 calls a step. Towards clean data the inner times end
    at the noise schedule's last time (or lam = 7.5), towards pure noise they begin at lam = -7.
    """
    lam = noise.lam(torch.tensor(times, dtype=torch.float64))
    last = float(noise.lam(torch.tensor(noise.t_range[1], dtype=torch.float64)))
    low = lam.clamp(_PURE, min(last, _CLEAN) if torch.isposinf(lam[-1]) else None)
    gaps = low.diff()
    counts = (calls * gaps / gaps.sum()).round().clamp(min=4).int().tolist()
    parts = []
    for i, n in enumerate(counts):
        share = torch.arange(n, dtype=torch.float64) / n
        inner = noise.t_of_lam(low[i] + share * gaps[i])[1:] if gaps[i] > 0 else share[:0]
        parts.append([times[i], *inner.tolist()])
    return parts


def aligned_targets(
    schedule: OdeSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    *,
    calls: int = 200,
    cond: Cond | None = None,
    guidance: float | None = None,
) -> list[Tensor]:
    """The teacher's states at exactly schedule.times.

    Args:
        schedule: the student, for its times.
        denoiser: the model.
        x_T: start states, (B, *shape).
        calls: of the teacher, about; third-order multistep in the data prediction.
        cond: conditioning tensors with leading axis B.
        guidance: guidance scale.

    Returns:
        N + 1 tensors (B, *shape), the state at times[0] first.
    """
    parts = aligned_grid(schedule.noise, schedule.times, calls)
    at = {0}
    for part in parts[:-1]:
        at.add(max(at) + len(part))
    times = [t for part in parts for t in part] + [schedule.times[-1]]
    if len(at) != schedule.n_steps:
        raise StudyError("targets: the teacher's grid misses a time of the schedule")
    teacher = multistep(
        schedule.noise, times, 3, lower_final=True, spec=dpm("data", 3, taylor=True)
    )
    return states_on_the_way(teacher, denoiser, x_T, at, cond, guidance)


def states_on_the_way(
    teacher: OdeSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    at: set[int],
    cond: Cond | None,
    guidance: float | None,
) -> list[Tensor]:
    """States (B, *shape) of a run at the calls `at`, and its end point."""
    states: list[Tensor] = []

    def keep(progress: Progress) -> None:
        if progress.call in at:
            states.append(progress.state)

    end = sample(teacher, denoiser, x_T, cond=cond, guidance=guidance, callback=keep)
    return [*states, end]
