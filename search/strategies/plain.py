"""S3 on any search space: a Gaussian process on its flat encoding, evolution, improvement.

The stages are those of `strategies.s3` (fit on everything scored, evolve on the prediction, score
the chosen few), with the space's own mutation and crossover as moves: what `s3` gains from moving
all times of an ODE schedule in one compilation has no counterpart in other spaces.

The named schedules often leave choices untouched (no named count has a temperature). A process
that has never seen a feature vary takes it for harmless, so while there is such a feature
candidates are mutations of the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewstep.predictors.gaussian import GaussianProcess
from fewstep.predictors.quality import LEAST_ROWS, targets
from fewstep.search.strategies import Evaluated, Proposal
from fewstep.search.strategies.common import Member, members
from fewstep.search.strategies.s3 import expected_improvement
from fewstep.space.protocol import Domain

_NOISE = 1e-2
"""Share of noise expected in the scores: what is drawn jumps where a schedule changes a little."""

_DRAWN = 64
"""Random members that tell which features vary in a space."""


@dataclass(frozen=True)
class _Candidate:
    """A member, its place in the encoding, and what is predicted there."""

    schedule: Any
    x: np.ndarray
    mean: float
    std: float
    source: str


@dataclass(frozen=True)
class PlainS3:
    """Stages of predict, evolve, score.

    Args:
        domain: the search space.
        rounds: rounds of evolution on the prediction per stage.
        children: children of a round.
        crossover: probability that a child has two parents.
        scale: size of mutations; each child draws its own between a fifth of it and it.
        beta: weight of the uncertainty.
        elite: parents.
        trust: largest uncertainty of a candidate, as a share of the spread of the targets, while
            there are enough of them (as in `s3`: far from all data the prediction is an average).
        adopted: best results of every other NFE whose likenesses at this one are scored first.
    """

    domain: Domain
    rounds: int = 6
    children: int = 100
    crossover: float = 0.3
    scale: float = 0.1
    beta: float = 1.5
    elite: int = 20
    trust: float = 0.25
    adopted: int = 3
    name: str = "s3"

    def propose(
        self, known: Sequence[Evaluated], generation: int, size: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """See `Strategy`; mutations of the best while too little is known to predict."""
        pool = members(self.domain, known)
        guests = self._guests(known)[:size]
        if guests:
            return [*guests, *self._chosen(pool, size - len(guests), rng)]
        return self._chosen(pool, size, rng)

    def _guests(self, known: Sequence[Evaluated]) -> list[Proposal]:
        """Members made from the best of the other NFEs, less those already told."""
        told = {r.schedule.digest for r in known}
        made: dict[str, Proposal] = {}
        for nfe in sorted({r.schedule.nfe for r in known} - {self.domain.nfe}):
            for best in members(self.domain.with_nfe(nfe), known, self.adopted):
                for guest in self.domain.adopt(best.schedule):
                    if guest.digest not in told:
                        made.setdefault(guest.digest, Proposal(guest, "adopted"))
        return list(made.values())

    def _chosen(
        self, pool: Sequence[Member], size: int, rng: np.random.Generator
    ) -> list[Proposal]:
        if len({m.score for m in pool}) < LEAST_ROWS:
            return self._mutations(pool, size, rng)
        x = np.stack([self.domain.encode(m.schedule) for m in pool])
        if self._unseen(x, rng):
            return self._mutations(pool, size, rng)
        y = targets(torch.tensor([m.score for m in pool], dtype=torch.float64))
        process = GaussianProcess(noise=_NOISE).fit(torch.from_numpy(x), y)
        met = self._evolve(process, pool, x, self.trust * float(y.std()), rng)
        return self._choose(process, float(y.min()), met, pool, size, rng)

    def _unseen(self, x: np.ndarray, rng: np.random.Generator) -> bool:
        """Whether some feature varies in the space and not among the known, (n, features)."""
        drawn = np.stack([self.domain.encode(self.domain.sample(rng)) for _ in range(_DRAWN)])
        return bool((np.ptp(x, axis=0) == 0)[np.ptp(drawn, axis=0) > 0].any())

    def _mutations(
        self, pool: Sequence[Member], size: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Distinct members near the best known ones; random where none is known."""
        told = {m.schedule.digest for m in pool}
        made: dict[str, Proposal] = {}
        for _ in range(20 * size if pool else 0):
            parent = pool[min(int(rng.exponential(2.0)), len(pool) - 1)].schedule
            child = self.domain.mutate(parent, rng, scale=self.scale)
            if child.digest not in told and len(made) < size:
                made.setdefault(child.digest, Proposal(child, "mutation"))
        rest = range(size - len(made))
        return [*made.values(), *(Proposal(self.domain.sample(rng), "random") for _ in rest)]

    def _evolve(
        self,
        process: GaussianProcess,
        pool: Sequence[Member],
        x: np.ndarray,
        limit: float,
        rng: np.random.Generator,
    ) -> list[_Candidate]:
        """Those met during the rounds whose uncertainty is below the limit, or is least."""
        count = 2 * self.elite
        alive = self._predicted(process, [(m.schedule, "parent") for m in pool[:count]], x[:count])
        met: list[_Candidate] = []
        for _ in range(self.rounds):
            made = [self._child(alive, rng) for _ in range(self.children)]
            encoded = np.stack([self.domain.encode(schedule) for schedule, _ in made])
            met += self._predicted(process, made, encoded)
            near = self._trusted([*alive, *met], limit)
            bound = sorted(near, key=lambda c: c.mean - self.beta * c.std)
            mean = sorted(near, key=lambda c: c.mean)
            alive = list({id(c): c for c in [*bound[: self.elite], *mean[: self.elite]]}.values())
        return self._trusted(met, limit)

    def _trusted(self, met: Sequence[_Candidate], limit: float) -> list[_Candidate]:
        near = [c for c in met if c.std <= limit]
        enough = len(near) >= 2 * self.elite
        return near if enough else sorted(met, key=lambda c: c.std)[: 4 * self.elite]

    def _child(self, alive: Sequence[_Candidate], rng: np.random.Generator) -> tuple[Any, str]:
        pick = min(int(rng.exponential(len(alive) / 3)), len(alive) - 1)
        schedule, source = alive[pick].schedule, "mutation"
        if rng.random() < self.crossover:
            other = alive[int(rng.integers(len(alive)))].schedule
            schedule, source = self.domain.crossover(schedule, other, rng), "crossover"
        scale = self.scale * rng.uniform(0.2, 1.0)
        return self.domain.mutate(schedule, rng, scale=scale), source

    def _predicted(
        self, process: GaussianProcess, made: Sequence[tuple[Any, str]], x: np.ndarray
    ) -> list[_Candidate]:
        with torch.no_grad():
            mean, std = process.predict(torch.from_numpy(x))
        return [
            _Candidate(schedule, x[i], float(mean[i]), float(std[i]), source)
            for i, (schedule, source) in enumerate(made)
        ]

    def _choose(
        self,
        process: GaussianProcess,
        best: float,
        met: Sequence[_Candidate],
        pool: Sequence[Member],
        size: int,
        rng: np.random.Generator,
    ) -> list[Proposal]:
        """Expected improvement, one after the other; what is known is not proposed again."""
        told = {m.schedule.digest for m in pool}
        fresh = {c.schedule.digest: c for c in met if c.schedule.digest not in told}
        by_bound = sorted(fresh.values(), key=lambda c: c.mean - self.beta * c.std)
        by_mean = sorted(fresh.values(), key=lambda c: c.mean)
        listed = [*by_bound[: 8 * size], *by_mean[: 4 * size]]
        short = list({c.schedule.digest: c for c in listed}.values())
        chosen: list[Proposal] = []
        if short:
            with torch.no_grad():
                mean_, cov_ = process.posterior(torch.from_numpy(np.stack([c.x for c in short])))
            mean, cov = mean_.numpy(), cov_.numpy()
            free = np.ones(len(short), dtype=bool)
            while len(chosen) < size and free.any():
                std = np.sqrt(cov.diagonal().clip(1e-12))
                gain = np.where(free, expected_improvement(best - mean, std), -1.0)
                i = int(np.argmax(gain))
                free[i] = False
                note = {"predicted": float(mean[i]), "std": short[i].std}
                chosen.append(Proposal(short[i].schedule, short[i].source, note))
                cov = cov - np.outer(cov[:, i], cov[:, i]) / (cov[i, i] + 1e-9)
        rest = size - len(chosen)
        return chosen + [Proposal(self.domain.sample(rng), "random") for _ in range(rest)]
