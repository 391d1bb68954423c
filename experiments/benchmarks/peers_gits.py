"""GITS: a grid by dynamic programming on the teacher's trajectories.

With z = y/alpha at level s = sigma/alpha, a teacher of K steps gives z_0 .. z_K and gradients
d_i = (z_i - D_i)/s_i. One Euler step from i to j lands at z_i + (s_j - s_i) d_i; its cost is how
much farther it lies from the straight line z_0 z_K than z_j does, or how far from z_j, mean over
samples. The grid of N steps is the path 0 = i_0 < ... < i_N = K with the least

    cost(i_0, i_1) + f (cost(i_1, i_2) + f (cost(i_2, i_3) + ...))

f = 1.15 as published. A given solver, iPNDM or DDIM, then runs on it.

References: Chen et al. 2024 (arXiv 2405.11326), section 4; as published: 60 steps of iPNDM on the
polynomial grid of power 7, 256 samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.predictors.gauss_newton import Batch
from fewstep.samplers import Denoiser, sample
from fewstep.samplers.ode import Progress
from fewstep.space import OdeSchedule
from fewstep.space.baselines import grid, in_basis, multistep

FACTORS = (0.9, 1.0, 1.1, 1.15, 1.2, 1.3)
METRICS = ("deviation", "distance")
KINDS = ("edm", "quadratic")
ORDERS = (1, 2, 3, 4)
TEACHER_STEPS = 60


def trajectory(
    denoiser: Denoiser, batch: Batch, kind: str, steps: int = TEACHER_STEPS
) -> tuple[tuple[float, ...], Tensor, Tensor]:
    """Times (K + 1), z_i (K + 1, n, d) and D_i (K, n, d) of iPNDM of order 4 on a grid."""
    noise = denoiser.noise
    times = grid(noise, steps, kind)
    teacher = multistep(noise, times, 4, spec=in_basis("adams"))
    states: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(progress: Progress) -> None:
        states.append(progress.state.flatten(1).double())
        outputs.append(progress.denoised.flatten(1).double())

    with torch.no_grad():
        cond, scale = dict(batch.cond) or None, batch.guidance
        end = sample(teacher, denoiser, batch.x_T, cond=cond, guidance=scale, callback=keep)
    alpha = noise.alpha(torch.tensor(times, dtype=torch.float64))
    z = torch.stack([*states, end.flatten(1).double()]) / alpha[:, None, None]
    return times, z, torch.stack(outputs)


def costs(levels: Tensor, z: Tensor, D: Tensor, metric: str) -> Tensor:
    """Cost of every Euler step, shape (K + 1, K + 1); inf where j <= i.

    Args:
        levels: s_i, shape (K + 1,), decreasing.
        z: states, shape (K + 1, n, d).
        D: data predictions, shape (K, n, d).
        metric: "deviation" from the straight line, beyond the teacher's, or "distance".
    """
    along = z[-1] - z[0]
    along = along / along.norm(dim=-1, keepdim=True)

    def aside(x: Tensor) -> Tensor:
        """Distances (.., n) to the line through z_0 along `along`."""
        away = x - z[0]
        found: Tensor = (away - (away * along).sum(-1, keepdim=True) * along).norm(dim=-1)
        return found

    count = len(levels)
    table = torch.full((count, count), torch.inf, dtype=torch.float64)
    for i in range(count - 1):
        landed = z[i] + (levels[i + 1 :] - levels[i])[:, None, None] * (z[i] - D[i]) / levels[i]
        if metric == "deviation":
            found = aside(landed) - aside(z[i + 1 :])
        else:
            found = (landed - z[i + 1 :]).norm(dim=-1)
        table[i, i + 1 :] = found.mean(-1)
    return table


def cheapest(table: Tensor, steps: int, factor: float) -> list[int]:
    """The path of so many steps from the first to the last point with the least discounted cost.

    Args:
        table: costs, shape (K + 1, K + 1), inf where j <= i.
        steps: N, at most K.
        factor: f of the module docstring.
    """
    value = table[:, -1].clone()  # of the best way from i to the end in one step
    ways: list[Tensor] = []
    for _ in range(steps - 1):
        value, way = (table + factor * value).min(dim=1)
        ways.append(way)
    path = [0]
    for way in reversed(ways):
        path.append(int(way[path[-1]]))
    return [*path, len(table) - 1]


def candidates(denoiser: Denoiser, batch: Batch, calls: int) -> tuple[dict[str, OdeSchedule], int]:
    """Schedules by grid, metric, factor and solver, equal ones once; evaluations spent.

    The published choice is "ipndm4/edm/deviation/1.15".
    """
    noise = denoiser.noise
    found: dict[str, OdeSchedule] = {}
    seen: set[str] = set()
    for kind in KINDS:
        times, z, D = trajectory(denoiser, batch, kind)
        t = torch.tensor(times, dtype=torch.float64)
        levels = noise.sigma(t) / noise.alpha(t)
        for metric in METRICS:
            table = costs(levels, z, D, metric)
            for factor in FACTORS:
                chosen = tuple(times[i] for i in cheapest(table, calls, factor))
                for order in ORDERS:
                    solver = "ddim" if order == 1 else f"ipndm{order}"
                    schedule = multistep(noise, chosen, order, spec=in_basis("adams"))
                    if schedule.digest not in seen:
                        seen.add(schedule.digest)
                        found[f"{solver}/{kind}/{metric}/{factor:g}"] = schedule
    return found, len(KINDS) * TEACHER_STEPS * len(batch)
