"""Weighted particles, measured on Gaussian mixtures whose annealed laws are known.

    python -m fewstep.experiments.bench_particles table        # 40 components in the plane
    python -m fewstep.experiments.bench_particles search       # searched schedules in 8 dimensions
    python -m fewstep.experiments.bench_particles replay FILE  # its verdict again, from a file
    python -m fewstep.experiments.bench_particles dimensions   # weights as the dimension grows

`table` follows the mixture table of Skreta et al. 2503.02819 (annealing to temperature 1/3 by
the authors' policies). `search` evolves zeta, resampling, weights and times of every step at
equal particles and calls, and compares the winner with the best named policy on fresh seeds.
`dimensions` prints effective sample size and surviving ancestors for d = 2, 8, 32, 64, with
best-of-K beside them. The truth q^b comes by resampling 200,000 draws of the modes, narrowed to
variance v/b, in proportion to q^b over their density.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, bcast
from fewstep.samplers.particles import Particles, sample_particles, start_particles
from fewstep.samplers.resampling import effective, systematic
from fewstep.samplers.targets import Target, anneal
from fewstep.search.strategies import Evaluated, Proposal
from fewstep.space import FewstepError, load_schedule, save_schedule
from fewstep.space.baselines import grid
from fewstep.space.noise import EDM, NoiseSchedule
from fewstep.space.particles import POLICIES, ParticleSchedule, policy


@dataclass
class Isotropic:
    """x0 ~ sum_k w_k N(m_k, v I) as a Denoiser.

    Args:
        noise: the noise schedule, alpha = 1.
        log_w: log weights, shape (M,), normalised.
        means: shape (M, d).
        v: variance of every component.
    """

    noise: NoiseSchedule
    log_w: Tensor
    means: Tensor
    v: float

    def _logits(self, x: Tensor, spread: Tensor) -> Tensor:
        cross = x @ self.means.to(x).T
        square = (x**2).sum(1, keepdim=True) - 2 * cross + (self.means.to(x) ** 2).sum(1)
        return self.log_w.to(x) - square / (2 * spread)

    def __call__(
        self, x: Tensor, t: Tensor, *, cond: Cond | None = None, guidance: Any = None
    ) -> Tensor:
        """The posterior mean."""
        s2 = bcast(t, x) ** 2
        r = torch.softmax(self._logits(x, s2 + self.v), dim=1)
        return (self.v * x + s2 * (r @ self.means.to(x))) / (s2 + self.v)

    def log_density(self, x: Tensor) -> Tensor:
        """log q(x) of clean data, shape (B,)."""
        logits = self._logits(x, torch.tensor(self.v).to(x))
        d = x.shape[1]
        return torch.logsumexp(logits, 1) - d / 2 * math.log(2 * math.pi * self.v)

    def modes(self, x: Tensor) -> Tensor:
        """The most responsible component of each point, shape (B,)."""
        return self._logits(x, torch.tensor(self.v).to(x)).argmax(1)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact samples of q, shape (n, d)."""
        k = torch.multinomial(self.log_w.exp(), n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + math.sqrt(self.v) * z

    def draw_annealed(self, b: float, n: int, generator: torch.Generator) -> Tensor:
        """Samples of q^b, shape (n, d): each mode narrowed, then resampled to the exact law."""
        x = self.means[torch.randint(len(self.means), (200_000,), generator=generator)]
        x = x + math.sqrt(self.v / b) * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        narrow = Isotropic(self.noise, torch.full_like(self.log_w, -math.log(len(self.log_w))),
                           self.means, self.v / b)  # fmt: skip
        log_w = b * self.log_density(x) - narrow.log_density(x)
        w = torch.softmax(log_w, 0)[None]
        return x[systematic(w, generator, count=n)[0]]


def forty(d: int = 2, scale: float = 40.0, seed: int = 0) -> Isotropic:
    """The 40-component mixture: equal weights, means uniform in a cube, deviation softplus(1)."""
    g = torch.Generator().manual_seed(seed)
    means = (torch.rand(40, d, generator=g, dtype=torch.float64) - 0.5) * 2 * scale
    v = math.log1p(math.e) ** 2
    log_w = torch.full((40,), -math.log(40.0), dtype=torch.float64)
    return Isotropic(EDM(sigma_max=10.0, sigma_min=0.01), log_w, means, v)


def uneven(d: int, seed: int = 0) -> Isotropic:
    """40 components in d dimensions, uneven weights, about the same overlap for every d.

    Means are N(0, I), deviation .25, log-weights N(0, 1/4).
    """
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(40, d, generator=g, dtype=torch.float64)
    log_w = torch.log_softmax(0.5 * torch.randn(40, generator=g, dtype=torch.float64), 0)
    return Isotropic(EDM(sigma_max=8.0, sigma_min=0.02), log_w, means, 0.0625)


def simulate(
    schedule: ParticleSchedule, target: Target, d: int, P: int, K: int, seed: int
) -> Particles:
    """One run from a seed; float32 states."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(P, K, d, generator=generator)
    return sample_particles(
        schedule, target, start_particles(schedule, target, z), generator=generator
    )


def energy_distance(x: Tensor, w: Tensor, y: Tensor, yy: float) -> Tensor:
    """2E|X-Y| - E|X-X'| - E|Y-Y'| of weighted x (P, K, d) and samples y (n, d); shape (P,)."""
    found = []
    for points, weights in zip(x.to(y), w, strict=True):
        cross = (weights @ torch.cdist(points, y)).mean()
        own = weights @ torch.cdist(points, points) @ weights
        found.append(2 * cross - own - yy)
    return torch.stack(found)


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


# --- search --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParticleEvolution:
    """Evolution of particle schedules, by the contract of `search.strategies`; stateless.

    A child takes each step's choices from one of two of the best, then moves some: zeta by a
    factor, the time within its gap, the rule of resampling, its threshold, the weight rule.

    Args:
        parents: the best schedules that have children.
        rate: chance that a step's number moves.
    """

    parents: int = 10
    rate: float = 0.2
    name: str = "particle-evolution"

    def propose(
        self, known: Sequence[Evaluated], generation: int, size: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """See `fewstep.search.strategies.Strategy`."""
        best = sorted((r.score, i) for i, r in enumerate(known) if math.isfinite(r.score))
        elite = [known[i].schedule for _, i in best[: self.parents]]
        made = []
        for _ in range(size):
            one, two = (elite[int(rng.integers(len(elite)))] for _ in range(2))
            made.append(Proposal(self._child(one, two, rng), "evolution"))
        return made

    def _child(
        self, one: ParticleSchedule, two: ParticleSchedule, rng: np.random.Generator
    ) -> ParticleSchedule:
        n = one.n_steps
        lam = [-math.log(t) for t in (one if rng.random() < 0.5 else two).times]
        cut = int(rng.integers(n + 1)) if rng.random() < 0.5 else n
        steps = [*one.steps[:cut], *two.steps[cut:]]
        reach = 10 ** rng.uniform(-2, 0)
        swell = math.exp(reach * rng.normal()) if rng.random() < 0.4 else 1.0
        span = sorted(rng.integers(0, n + 1, 2))
        for i, step in enumerate(steps):
            zeta = step.zeta * (swell if span[0] <= i < span[1] else 1.0)
            zeta *= math.exp(reach * rng.normal()) if rng.random() < self.rate else 1.0
            new: dict[str, Any] = {"zeta": float(np.clip(zeta, 0.02, 8))}
            if rng.random() < self.rate / 2:
                new["resample"] = str(rng.choice(["never", "always", "ess"]))
            if rng.random() < self.rate:
                new["ess"] = float(np.clip(step.ess + 0.2 * rng.normal(), 0.05, 1))
            if rng.random() < self.rate / 4:
                new["weight"] = str(rng.choice(["left", "trapezoid", "none"]))
            steps[i] = step.model_copy(update=new)
        if rng.random() < 0.5:
            gaps = np.diff(lam) * np.exp(0.3 * reach * rng.normal(size=n))
            lam = list(lam[0] + np.cumsum([0, *gaps * (lam[-1] - lam[0]) / gaps.sum()]))
        times = [math.exp(-x) for x in lam[1:-1]]
        ends = one.times[0], one.times[-1]
        whole = (ends[0], *times, ends[1])
        if any(s <= t for s, t in pairwise(whole)):
            whole = one.times
        return one.model_copy(
            update={"times": whole, "steps": tuple(steps), "provenance": {},
                    "integrator": (one if rng.random() < 0.9 else two).integrator}
        )  # fmt: skip


def named(model: Isotropic, steps: int, b: float) -> dict[str, ParticleSchedule]:
    """Every named policy with both integrators on three grids, and resampling at ESS < .5."""
    found = {}
    for kind in ("logsnr", "edm", "time"):
        times = grid(model.noise, steps, kind)
        for integrator in ("euler", "exponential"):
            for name in POLICIES:
                s = policy(name, model.noise, times, b=b, integrator=integrator)
                found[f"{name} {kind} {integrator}"] = s
                if name.endswith("systematic"):
                    half = [x.model_copy(update={"resample": "ess"}) for x in s.steps]
                    s = s.model_copy(update={"steps": tuple(half)})
                    found[f"{name.split('/')[0]}/ess.5 {kind} {integrator}"] = s
    return found


def scorer(
    model: Isotropic, b: float, P: int, K: int, seed: int
) -> Callable[[ParticleSchedule], Tensor]:
    """schedule -> energy distance to the truth of P populations; inf where it fails."""
    truth = model.draw_annealed(b, 2000, torch.Generator().manual_seed(seed + 77)).float()
    yy, target = float(torch.cdist(truth, truth).mean()), anneal(model, b)

    def score(schedule: ParticleSchedule) -> Tensor:
        try:
            r = simulate(schedule, target, model.means.shape[1], P, K, seed)
        except FewstepError:
            return torch.full((P,), math.inf)
        return energy_distance(r.x, r.weights.float(), truth, yy)

    return score


def search(a: argparse.Namespace) -> None:
    """Evolve, then score the best on fresh seeds against the best named policy."""
    model = uneven(a.dimension)
    score = scorer(model, a.b, a.populations, a.particles, a.seed + 1)
    known = [
        Evaluated(s, float(score(s).mean()), source=name)
        for name, s in named(model, a.steps, a.b).items()
    ]
    print("| named policy, grid, integrator | energy distance (search seeds) |\n|---|---|")
    for r in sorted(known, key=lambda r: r.score)[:8]:
        print(f"| {r.source} | {r.score:.4g} |")
    first = len(known)
    usable = [i for i, r in enumerate(known) if "clocks" not in r.source]
    strategy, pool = ParticleEvolution(), [known[i] for i in usable]
    if a.start is not None:
        given = load_schedule(a.start)
        pool.append(Evaluated(given, float(score(given).mean()), source=str(a.start)))
    for generation in range(a.generations):
        rng = np.random.default_rng([a.seed, generation])
        for p in strategy.propose(pool, generation, a.size, rng):
            pool.append(Evaluated(p.schedule, float(score(p.schedule).mean()), source=p.source))
        if generation % 5 == 4:
            print(f"generation {generation + 1}: {min(r.score for r in pool):.4g}", flush=True)
    again = scorer(model, a.b, a.populations, a.particles, a.seed + 2)
    top = sorted(pool, key=lambda r: r.score)[:10]
    winner = min(top, key=lambda r: float(again(r.schedule).mean()) + r.score).schedule
    best = sorted(known[:first], key=lambda r: r.score)[:5]
    if a.out is not None:
        origin = {"command": "bench_particles search", "seed": a.seed, "start": str(a.start)}
        save_schedule(winner.model_copy(update={"provenance": origin}), a.out)
    compare(winner, {r.source: r.schedule for r in best}, model, a)


def replay(a: argparse.Namespace) -> None:
    """A schedule on file against every named policy's best five, on fresh seeds."""
    winner, model = load_schedule(a.file), uneven(a.dimension)
    score = scorer(model, a.b, a.populations, a.particles, a.seed + 1)
    every = named(model, winner.n_steps, a.b)
    rank = sorted(every, key=lambda name: float(score(every[name]).mean()))
    compare(winner, {name: every[name] for name in rank[:5]}, model, a)


def compare(
    winner: ParticleSchedule,
    best: dict[str, ParticleSchedule],
    model: Isotropic,
    a: argparse.Namespace,
) -> None:
    """Blocks of fresh populations, each block with its own exact samples; ratio with interval."""
    rows: dict[str, list[Tensor]] = {name: [] for name in (*best, "searched", "exact samples")}
    for block in range(a.blocks):
        seed = a.seed + 1000 + block
        score = scorer(model, a.b, a.fresh // a.blocks, a.particles, seed)
        for name, schedule in (*best.items(), ("searched", winner)):
            rows[name].append(score(schedule))
        rows["exact samples"].append(floor_of(model, a.b, len(score(winner)), a.particles, seed))
    means = {name: torch.stack([v.mean() for v in values]) for name, values in rows.items()}
    print(f"\n{a.blocks} blocks of {a.fresh // a.blocks} fresh populations, K {a.particles}, "
          f"{winner.n_steps} calls, d {a.dimension}")  # fmt: skip
    for name, value in means.items():
        print(f"| {name} | {interval(value)} |")
    name = min(best, key=lambda k: float(means[k].mean()))
    found, other, floor = means["searched"], means[name], means["exact samples"].mean()
    g = torch.Generator().manual_seed(a.seed)
    draws = torch.randint(a.blocks, (4000, a.blocks), generator=g)
    ratio = found[draws].mean(1) / other[draws].mean(1)
    low, high = ratio.quantile(torch.tensor([0.025, 0.975], dtype=ratio.dtype)).tolist()
    print(f"searched / {name}: {float(found.mean() / other.mean()):.3f} [{low:.3f}, {high:.3f}]")
    above = float((found.mean() - floor) / (other.mean() - floor))
    print(f"the same above the floor of exact samples: {above:.3f}")


def floor_of(model: Isotropic, b: float, P: int, K: int, seed: int) -> Tensor:
    """Energy distance of K exact samples, P times."""
    truth = model.draw_annealed(b, 2000, torch.Generator().manual_seed(seed + 77)).float()
    g = torch.Generator().manual_seed(seed + 5)
    own = model.draw_annealed(b, 20000, g)
    x = torch.stack([own[torch.randperm(len(own), generator=g)[:K]] for _ in range(P)]).float()
    yy = float(torch.cdist(truth, truth).mean())
    return energy_distance(x, torch.full((P, K), 1 / K), truth, yy)


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


def main() -> None:
    """The command line."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sub = parser.add_subparsers(dest="what", required=True)
    one, two, three, four = map(sub.add_parser, ("table", "search", "dimensions", "replay"))
    for p, run, b, steps, particles in (
        (one, table, 3.0, 1000, 2000),
        (two, search, 2.0, 24, 256),
        (three, dimensions, 2.0, 100, 256),
        (four, replay, 2.0, 24, 256),
    ):
        p.add_argument("--b", type=float, default=b)
        p.add_argument("--steps", type=int, default=steps)
        p.add_argument("--particles", type=int, default=particles)
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--runs", type=int, default=5 if p is one else 16)
        p.set_defaults(run=run)
    one.add_argument("--sigma-max", type=float, default=10.0)
    for p in (two, four):
        p.add_argument("--dimension", type=int, default=8)
        p.add_argument("--populations", type=int, default=16)
        p.add_argument("--fresh", type=int, default=256)
        p.add_argument("--blocks", type=int, default=8)
    four.add_argument("file", type=Path)
    two.add_argument("--generations", type=int, default=40)
    two.add_argument("--size", type=int, default=24)
    two.add_argument("--start", type=Path, help="a schedule file the search starts from, too")
    two.add_argument("--out", type=Path)
    a = parser.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
