"""The teacher's states on the way: at exactly the student's times, or as DC-Solver has them.

`aligned_targets` puts a fine grid INTO every step of the student, so that its times are among the
teacher's and nothing is interpolated. `published_targets` repeats two slips of the released search
(kept for comparison only): a state of the teacher is filed under the time its step STARTED at, so
the one taken for time t is up to one teacher step past t; and the last step but one is matched to
the final image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, Denoiser
from fewstep.samplers.ode import Progress, sample
from fewstep.space.baselines import dpm, grid, multistep
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
    return _record(teacher, denoiser, x_T, at, cond, guidance)


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
    states = _record(teacher, denoiser, x_T, set(range(steps)), cond, guidance)
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


def _record(
    teacher: OdeSchedule,
    denoiser: Denoiser,
    x_T: Tensor,
    at: set[int],
    cond: Cond | None,
    guidance: float | None,
) -> list[Tensor]:
    states: list[Tensor] = []

    def keep(progress: Progress) -> None:
        if progress.call in at:
            states.append(progress.state)

    end = sample(teacher, denoiser, x_T, cond=cond, guidance=guidance, callback=keep)
    return [*states, end]
