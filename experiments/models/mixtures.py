"""Gaussian mixtures whose annealed laws are known, as models and as a problem to search.

q^b is no mixture for a real b, but its samples are at hand: draws of the modes, narrowed to
variance v/b, resampled in proportion to q^b over their density. `problem` is the 8-dimensional
mixture that `experiments/studies/particles.toml` searches particle schedules for: a population is
scored by its energy distance to samples of q^b, its own for every population, so that populations
are independent and the score's interval holds the truth's sampling error too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers import ParticleProblem, Particles
from fewstep.samplers.denoiser import Cond, bcast
from fewstep.samplers.resampling import systematic
from fewstep.samplers.targets import anneal
from fewstep.space.noise import EDM, NoiseSchedule

__all__ = ["Isotropic", "energy_distance", "forty", "problem", "uneven"]


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


def energy_distance(x: Tensor, w: Tensor, y: Tensor, yy: float) -> Tensor:
    """2E|X-Y| - E|X-X'| - E|Y-Y'| of weighted x (P, K, d) and samples y (n, d); shape (P,)."""
    found = []
    for points, weights in zip(x.to(y), w, strict=True):
        weights = weights.to(y)
        cross = (weights @ torch.cdist(points, y)).mean()
        own = weights @ torch.cdist(points, points) @ weights
        found.append(2 * cross - own - yy)
    return torch.stack(found)


def problem(
    dimension: int = 8, b: float = 2.0, particles: int = 256, truth: int = 2000
) -> ParticleProblem:
    """The study factory: `uneven(dimension)` annealed to q^b.

    Args:
        dimension: d.
        b: exponent of the target.
        particles: K, particles of a population.
        truth: samples of q^b that a population is compared with.
    """
    model = uneven(dimension)
    pool = model.draw_annealed(b, 200_000, torch.Generator().manual_seed(1)).float()

    @functools.lru_cache(maxsize=1024)
    def exact(seed: int) -> tuple[Tensor, float]:
        """Samples of q^b and their mean distance to each other."""
        g = torch.Generator().manual_seed(seed)
        y = pool[torch.randint(len(pool), (truth,), generator=g)]
        return y, float(torch.cdist(y, y).mean())

    def measure(found: Particles, seeds: Sequence[int]) -> Tensor:
        """Energy distance, least effective sample size, starting particles with descendants."""
        rows = []
        for p, seed in enumerate(seeds):
            y, yy = exact(seed)
            rows.append(energy_distance(found.x[p : p + 1], found.weights[p : p + 1], y, yy))
        ess = found.ess.amin(0).float()
        return torch.stack([torch.cat(rows).float(), ess, found.unique_ancestors.float()], dim=1)

    return ParticleProblem(
        target=anneal(model, b),
        shape=(dimension,),
        particles=particles,
        objective="energy_distance",
        measure=measure,
        facts=lambda m: {"least_ess": float(m[:, 1].mean()), "ancestors": float(m[:, 2].mean())},
        fingerprint=f"uneven{dimension}^{b:g}",
        picture=_picture,
    )


def _picture(x: Tensor) -> Tensor:
    """Populations (P, K, d) as histograms (P, 40, 40) of the first two coordinates in +-3."""
    pictures = []
    for points in x.double().numpy():
        counts, _, _ = np.histogram2d(
            points[:, 0], points[:, 1 % points.shape[1]], bins=40, range=[[-3, 3]] * 2
        )
        pictures.append(1 - (counts / max(counts.max(), 1)) ** 0.5)
    return torch.from_numpy(np.stack(pictures))
