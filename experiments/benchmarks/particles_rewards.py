"""Rewards on weighted particles: weights by gradient and by path, guides, ramps, constraints.

    python -m fewstep.experiments.benchmarks.particles_rewards

The mixture `uneven(d)` tilted by exp(b x_1) is a mixture again, and the mass above an edge of x_1
a sum of Gaussian tails, so the mean reward and the normaliser are known. Every row costs the same
calls. Errors are means over populations with 95 % intervals; a single-ancestor population says
little however small its error looks.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from fewstep.experiments.models.mixtures import uneven
from fewstep.samplers import sample_particles, start_particles
from fewstep.samplers.targets import Target, reward
from fewstep.space.baselines import grid
from fewstep.space.particles import ParticleSchedule


def interval(values: Tensor) -> str:
    """Mean and 95 % interval of the mean."""
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    return f"{float(values.mean()):.3g} ± {half:.2g}"


def first(x: Tensor) -> Tensor:
    """The reward: the first coordinate, a black box unless differentiated."""
    return x[:, 0]


def row(name: str, schedule: ParticleSchedule, target: Target, a: argparse.Namespace,
        truth: tuple[float, float]) -> str:  # fmt: skip
    """One method's line: least ESS and ancestors, errors of E x_1 and of log Z."""
    g = torch.Generator().manual_seed(a.seed)
    z = torch.randn(a.runs, a.particles, a.dimension, generator=g)
    start = start_particles(schedule, target, z)
    r = sample_particles(schedule, target, start, generator=g, warn_ess=0.0)
    alive = float(r.unique_ancestors.double().mean())
    return (
        f"| {name} | {float(r.ess.amin(0).mean()):.3f} | {alive:.0f} | "
        f"{interval(r.mean(r.x[..., 0]) - truth[0])} | "
        f"{interval(r.log_normalizer - truth[1])} |"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--b", type=float, default=4.0)
    parser.add_argument("--edge", type=float, default=1.5)
    parser.add_argument("--dimension", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--runs", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """The tables of all rewards."""
    torch.set_num_threads(1)
    a = arguments()
    model = uneven(a.dimension)
    mean, v = model.means[:, 0], model.v + float(model.noise.t_range[1]) ** 2
    log_w = model.log_w + a.b * mean + a.b**2 * v / 2
    tilted = (float((log_w.softmax(0) * (mean + a.b * v)).sum()), float(log_w.logsumexp(0)))
    high = (a.edge - mean) / math.sqrt(v)
    tail = 0.5 * torch.erfc(high / math.sqrt(2))
    hazard = torch.exp(-(high**2) / 2) / math.sqrt(2 * math.pi)
    mass = float((model.log_w.exp() * tail).sum())
    above = float((model.log_w.exp() * (mean * tail + math.sqrt(v) * hazard)).sum()) / mass
    ruled = (above, math.log(mass))
    plain = ParticleSchedule.uniform(
        model.noise, grid(model.noise, a.steps, "logsnr"), zeta=1.0, resample="ess",
        weight="trapezoid",
    )  # fmt: skip
    path = plain.model_copy(update={"reward_weight": "path"})
    end = plain.late(plain.times[-1] * 1.001)
    print(f"d {a.dimension}, {a.steps} calls, {a.runs} populations of {a.particles}, ESS < .5")
    head = "| least ESS | ancestors | error of E x_1 | error of log Z |\n|---|---|---|---|---|"
    print(f"\n| exp({a.b:g} x_1), E x_1 = {tilted[0]:.3f} {head}")
    held = {"ramp": math.inf}
    soft: tuple[tuple[str, ParticleSchedule, dict[str, Any]], ...] = (
        ("by gradient, b held", plain, held),
        ("by gradient, ramp", plain, {}),
        ("by path, guided, b held", path, held),
        ("by path, guided, ramp", path, {}),
        ("by path, black box on the state, ramp", path, {"guide": False}),
        ("by path, black box on the prediction", path, {"at": "data"}),
        ("by path, prediction, guided", path, {"at": "data", "guide": True}),
        ("at the end alone", end, {"at": "data"}),
    )
    for name, schedule, options in soft:
        target = reward(model, first, a.b, **options)
        print(row(name, schedule, target, a, tilted), flush=True)

    def hard(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > a.edge, 0.0, -math.inf)

    def towards(x: Tensor) -> Tensor:
        push = torch.zeros_like(x)
        push[:, 0] = (a.edge - x[:, 0]).clamp(min=0)
        return push

    print(f"\n| x_1 > {a.edge:g} (mass {mass:.4f}), E x_1 = {ruled[0]:.3f} {head}")
    late = plain.late(plain.times[int(0.8 * a.steps)])
    for name, schedule, options in (
        ("at the end alone", end, {}),
        ("in the last fifth of the steps", late, {}),
        ("in the last fifth, floor -4", late, {"floor": -4.0}),
        ("from the start, floor -4", plain, {"floor": -4.0}),
        ("from the start, floor -4, guided", plain, {"floor": -4.0, "guide": towards}),
    ):
        target = reward(model, hard, at="data", **options)
        print(row(name, schedule, target, a, ruled), flush=True)


if __name__ == "__main__":
    main()
