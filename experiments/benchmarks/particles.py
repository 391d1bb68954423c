"""Weighted particles, measured on Gaussian mixtures whose annealed laws are known.

    python -m fewstep.experiments.benchmarks.particles table        # 40 components in the plane
    python -m fewstep.experiments.benchmarks.particles dimensions  # weights as it grows
    python -m fewstep.experiments.benchmarks.particles floor       # the score of exact samples

`table` follows the mixture table of Skreta et al. 2503.02819 (annealing to temperature 1/3 by
the authors' policies). `dimensions` prints effective sample size and surviving ancestors for
d = 2, 8, 32, 64, with best-of-K beside them. `floor` is what K exact samples of the 8-dimensional
target score, the least that a schedule of `studies/particles.toml` can reach on average.
The mixtures are in `experiments/models/mixtures.py`.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from fewstep.experiments.models.mixtures import Isotropic, energy_distance, forty, uneven
from fewstep.samplers.particles import Particles, sample_particles, start_particles
from fewstep.samplers.resampling import effective
from fewstep.samplers.targets import Target, anneal
from fewstep.space.baselines import grid
from fewstep.space.noise import EDM
from fewstep.space.particle_policies import POLICIES, policy
from fewstep.space.particles import ParticleSchedule


def simulate(
    schedule: ParticleSchedule, target: Target, d: int, P: int, K: int, seed: int
) -> Particles:
    """One run from a seed; float32 states."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(P, K, d, generator=generator)
    return sample_particles(
        schedule, target, start_particles(schedule, target, z), generator=generator
    )


def interval(values: Tensor) -> str:
    """Mean and 95 % interval of the mean."""
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    return f"{float(values.mean()):.4g} ± {half:.2g}"


def mode_error(model: Isotropic, x: Tensor, w: Tensor, truth: Tensor) -> Tensor:
    """Total variation between the masses of the modes, of weighted x (P, K, d); shape (P,)."""
    m = len(model.means)
    exact = torch.bincount(model.modes(truth), minlength=m) / len(truth)
    found = [
        0.5 * (torch.zeros(m, dtype=w.dtype).index_add(0, model.modes(p.double()), u) - exact)
        .abs().sum()
        for p, u in zip(x, w, strict=True)
    ]  # fmt: skip
    return torch.stack(found)


# --- table ---------------------------------------------------------------------------------------


def wasserstein(x: Tensor, y: Tensor, power: int) -> float:
    """W_power of two samples of equal size, by assignment."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(x, y).numpy() ** power
    return float(cost[linear_sum_assignment(cost)].mean() ** (1 / power))


def table(a: argparse.Namespace) -> None:
    """The authors' policies, annealing to temperature 1/b."""
    model = forty(seed=a.seed)
    model.noise = EDM(sigma_max=a.sigma_max, sigma_min=0.01)
    times = grid(model.noise, a.steps, "logsnr")
    g = torch.Generator().manual_seed(a.seed + 1)
    truth = model.draw_annealed(a.b, 4000, g)
    print(f"b {a.b}, {a.steps} steps, K {a.particles}, {a.runs} runs, sigma_max {a.sigma_max}")
    print("| policy | W1 | W2 | TV of modes | ancestors |\n|---|---|---|---|---|")
    for name in POLICIES:
        schedule = policy(name, model.noise, times, b=a.b)
        r = simulate(schedule, anneal(model, a.b), 2, a.runs, a.particles, a.seed)
        drawn = r.draw(1000, g).double()
        pick = [truth[torch.randperm(len(truth), generator=g)[:1000]] for _ in drawn]
        w = [torch.tensor([wasserstein(x, y, p) for x, y in zip(drawn, pick)]) for p in (1, 2)]  # noqa: B905
        tv = mode_error(model, r.x, r.weights, truth)
        cells = [f"{float(v.mean()):.3f} ± {float(v.std()):.3f}" for v in (*w, tv)]
        alive = float(r.unique_ancestors.double().mean())
        print(f"| {name} | {' | '.join(cells)} | {alive:.0f} |", flush=True)


# --- dimensions ----------------------------------------------------------------------------------


def dimensions(a: argparse.Namespace) -> None:
    """Weights, survivors and the error of log q as d grows."""
    print(f"b {a.b}, K {a.particles}, {a.steps} steps, {a.runs} populations, seed {a.seed}\n")
    print("| d | method | least ESS | ancestors | error of E log q / d | TV of modes |")
    print("|---|---|---|---|---|---|")
    for d in (2, 8, 32, 64):
        model = uneven(d)
        g = torch.Generator().manual_seed(a.seed + d)
        truth = model.draw_annealed(a.b, 4000, g)
        exact = float(model.log_density(truth).mean())
        times = grid(model.noise, a.steps, "logsnr")
        for label, b, fields in (
            ("weights, never resampled", a.b, {"zeta": 1.0}),
            ("weights, zeta 3", a.b, {"zeta": 3.0}),
            ("systematic, every step", a.b, {"zeta": 1.0, "resample": "always"}),
            ("systematic, ESS < .5", a.b, {"zeta": 1.0, "resample": "ess"}),
            ("systematic, ESS < .5, zeta 3", a.b, {"zeta": 3.0, "resample": "ess"}),
            ("drift only", a.b, {"zeta": 1.0, "weight": "none"}),
            ("q reweighted at the end", 1.0, {"zeta": 1.0}),
            ("best of K by log q", 1.0, {"zeta": 1.0}),
        ):
            s = ParticleSchedule.uniform(model.noise, times, **({"weight": "trapezoid"} | fields))
            r = simulate(s, anneal(model, b), d, a.runs, a.particles, a.seed)
            x, w, ess = r.x.double(), r.weights, float(r.ess.amin(0).mean())
            log_q = model.log_density(x.flatten(0, 1)).reshape(a.runs, -1)
            if label.startswith("q reweighted"):
                w = torch.softmax((a.b - 1) * log_q, 1)
                ess = float(effective((a.b - 1) * log_q).mean())
            if label.startswith("best"):
                w, ess = (log_q == log_q.amax(1, keepdim=True)).double(), math.nan
            error = ((w * log_q).sum(1) - exact) / d
            tv = mode_error(model, x, w, truth) if not label.startswith("best") else None
            modes = "–" if tv is None else f"{float(tv.mean()):.3f}"
            alive = float(r.unique_ancestors.double().mean())
            print(f"| {d} | {label} | {ess:.4f} | {alive:.0f} | {interval(error)} | {modes} |",
                  flush=True)  # fmt: skip


# --- floor ---------------------------------------------------------------------------------------


def floor(a: argparse.Namespace) -> None:
    """Energy distance of K exact samples to 2000 others, over many populations."""
    model, g = uneven(8), torch.Generator().manual_seed(a.seed)
    pool = model.draw_annealed(a.b, 200_000, g).float()
    found = []
    for _ in range(a.runs):
        x, y = (pool[torch.randint(len(pool), (n,), generator=g)] for n in (a.particles, 2000))
        even, yy = torch.full((1, a.particles), 1 / a.particles), float(torch.cdist(y, y).mean())
        found.append(energy_distance(x[None], even, y, yy))
    print(f"b {a.b}, K {a.particles}, {a.runs} populations: {interval(torch.cat(found))}")


def main() -> None:
    """The command line."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sub = parser.add_subparsers(dest="what", required=True)
    one, two, three = map(sub.add_parser, ("table", "dimensions", "floor"))
    for p, run, b, steps, particles, runs in (
        (one, table, 3.0, 1000, 2000, 5),
        (two, dimensions, 2.0, 100, 256, 16),
        (three, floor, 2.0, 0, 256, 256),
    ):
        p.add_argument("--b", type=float, default=b)
        p.add_argument("--steps", type=int, default=steps)
        p.add_argument("--particles", type=int, default=particles)
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--runs", type=int, default=runs)
        p.set_defaults(run=run)
    one.add_argument("--sigma-max", type=float, default=10.0)
    a = parser.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
