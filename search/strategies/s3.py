"""S3: train on everything scored, evolve on the prediction, score the chosen few.

The paper (USF, arXiv 2312.07243, section 4) gives the stages; its code is not released. Each
generation here is one stage:

1. Fit the quality predictor on every result so far, of every NFE (`predictors.quality`); its
   uncertainty is widened by how far off it was on the last generation.
2. Evolve: parents are the best schedules known, and members made from a neighbouring NFE by
   inserting or deleting a step. Each round takes a few step patterns (parents' own, mutated or
   crossed) and for each moves all inner times at once in lam, by Gaussian steps of log-uniform
   size or along differences of good schedules (differential evolution). A pattern's moves share
   one symbolic compilation. Survivors are the best by mean and by the lower confidence bound mean
   - beta * std, few of each pattern, and none where the predictor knows next to nothing.
3. Choose distinct candidates one after the other by expected improvement; each choice removes the
   uncertainty it will remove when scored (the batch rule of Desautels et al. 2014, "Parallelizing
   exploration-exploitation tradeoffs"), and a pattern has its share, so the batch spreads.

Continuous times matter most: they are what the moves spend their number on. While too little is
known to predict, candidates come from the warm start and at random.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.predictors.quality import LEAST_ROWS, QualityPredictor
from fewstep.search.strategies import Evaluated, Proposal
from fewstep.search.strategies.common import Member, members
from fewstep.search.strategies.sampler import S3Sampler
from fewstep.space.domain import OdeDomain
from fewstep.space.schedule import OdeSchedule
from fewstep.space.step_choices import Value
from fewstep.space.tokens import tokens

__all__ = ["S3", "S3Sampler"]

_MEMO: dict[int, tuple[OdeSchedule, Tensor]] = {}
_MEMO_SIZE = 8192
_KEEP = 5  # survivors of one step pattern
_STEPS = (
    "order",
    "formulation",
    "basis",
    "relaxation",
    "coefficient",
    "slope",
    "start",
    "corrector",
    "corrector_order",
    "corrector_slope",
    "corrector_relaxation",
)


def tokens_of(schedule: OdeSchedule) -> Tensor:
    """Tokens of a schedule, (nfe, F), computed once per object."""
    if id(schedule) not in _MEMO:
        if len(_MEMO) >= _MEMO_SIZE:
            _MEMO.clear()
        _MEMO[id(schedule)] = (schedule, tokens(schedule)[0])
    return _MEMO[id(schedule)][1]


@dataclass(frozen=True)
class Individual:
    """A step pattern (a schedule and its parameters), lam of all N+1 times, and predictions."""

    pattern: OdeSchedule
    params: dict[str, Value]
    lam: np.ndarray
    tokens: Tensor
    mean: float
    std: float
    source: str
    key: int


def niches(ranked: Sequence[Individual], most: int, count: int) -> list[Individual]:
    """The first `count` of a ranking with at most `most` of one step pattern."""
    seen: Counter[int] = Counter()
    kept: list[Individual] = []
    for i in ranked:
        if seen[i.key] < most:
            seen[i.key] += 1
            kept.append(i)
            if len(kept) == count:
                break
    return kept


@dataclass(frozen=True)
class S3:
    """Stages of predict, evolve, score.

    Args:
        domain: the search space.
        predictor: "auto", "sequence" or "gaussian" (see `predictors.quality`).
        rounds: rounds of evolution on the prediction per stage.
        patterns: step patterns per round.
        moves: choices of times per pattern.
        beta: weight of the uncertainty.
        elite: parents taken from what is known.
        trust: largest uncertainty of a candidate, as a share of the spread of the targets.
        niche: largest share of a generation with the same steps.
        adopted: results of each neighbouring NFE whose insertions and deletions join the parents.
    """

    domain: OdeDomain
    predictor: str = "auto"
    rounds: int = 12
    patterns: int = 10
    moves: int = 64
    beta: float = 1.5
    elite: int = 20
    adopted: int = 3
    trust: float = 0.25
    niche: float = 0.2
    name: str = field(default="s3")

    def propose(
        self, known: Sequence[Evaluated], generation: int, size: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """See `Strategy`; notes hold the prediction, its uncertainty, the model and its tau."""
        pool = members(self.domain, known)
        guests = self._guests(known)
        if len(pool) < LEAST_ROWS:
            warm = [Proposal(g, "adopted") for g in guests[:size]]
            return warm + [
                Proposal(self.domain.sample(rng), "random") for _ in range(size - len(warm))
            ]
        predictor = self._fit(known, pool, size, int(rng.integers(2**31)))
        everyone = self._evolve(predictor, pool, guests, rng)
        return self._choose(predictor, everyone, pool, size, rng)

    def _guests(self, known: Sequence[Evaluated]) -> list[OdeSchedule]:
        """Members made from the best results of the neighbouring NFE."""
        found: list[OdeSchedule] = []
        for nfe in (self.domain.nfe - 1, self.domain.nfe + 1):
            if nfe >= 1:
                for best in members(self.domain.with_nfe(nfe), known, self.adopted):
                    found += self.domain.adopt(best.schedule)
        return found

    def _fit(
        self, known: Sequence[Evaluated], pool: Sequence[Member], newest: int, seed: int
    ) -> QualityPredictor:
        pool = sorted(pool, key=lambda m: m.told)
        rows = [(known[m.told].schedule, m.score) for m in pool]
        if self.predictor != "gaussian":
            for nfe in sorted({r.schedule.nfe for r in known} - {self.domain.nfe}):
                others = members(self.domain.with_nfe(nfe), known)
                rows += [(known[m.told].schedule, m.score) for m in others]
        x = [tokens_of(s) for s, _ in rows]
        return QualityPredictor(self.predictor, seed).fit(
            x, [score for _, score in rows], self.domain.nfe, newest
        )

    def _evolve(
        self,
        predictor: QualityPredictor,
        pool: Sequence[Member],
        guests: Sequence[OdeSchedule],
        rng: np.random.Generator,
    ) -> list[Individual]:
        """Everyone met during the rounds."""
        domain = self.domain
        told = [(m.schedule, m.params, "parent") for m in pool[: 5 * self.elite]]
        told += [(g, domain.params(g), "adopted") for g in guests]
        parents = self._individuals(predictor, told)
        adopted = [i for i in parents if i.source == "adopted"]
        everyone = list(adopted)
        alive = niches([i for i in parents if i.source != "adopted"], _KEEP, self.elite) + adopted
        for _ in range(self.rounds):
            for _ in range(self.patterns):
                parent = alive[min(int(rng.exponential(len(alive) / 4)), len(alive) - 1)]
                pattern, params, source = self._pattern(parent, alive, rng)
                lam = np.array(domain.lam(pattern.times))
                everyone += self._score(
                    predictor, pattern, params, self._moved(lam, alive, rng), source
                )
            near = self._trusted(predictor, everyone)
            bound = sorted(near, key=lambda i: i.mean - self.beta * i.std)
            mean = sorted(near, key=lambda i: i.mean)
            alive = list(
                itertools.chain.from_iterable(
                    zip(
                        niches(bound, _KEEP, 2 * self.elite),
                        niches(mean, _KEEP, 2 * self.elite),
                        strict=False,
                    )
                )
            )
        return everyone

    def _trusted(
        self, predictor: QualityPredictor, everyone: Sequence[Individual]
    ) -> list[Individual]:
        """Those whose uncertainty is small beside the spread of the scores; all if they are few.

        Far from all data a predictor returns the average of what it has seen, and late in a search
        that average is good: without a limit the search would leave for where it knows nothing.
        """
        near = [i for i in everyone if i.std <= self.trust * predictor.spread]
        enough = len(near) >= 2 * self.elite
        return near if enough else sorted(everyone, key=lambda i: i.std)[: 4 * self.elite]

    def _individuals(
        self,
        predictor: QualityPredictor,
        told: Sequence[tuple[OdeSchedule, dict[str, Value], str]],
    ) -> list[Individual]:
        """Members as individuals."""
        x = torch.stack([tokens_of(schedule) for schedule, _, _ in told])
        mean, std = predictor.predict(x)
        return [
            Individual(
                schedule,
                params,
                np.array(self.domain.lam(schedule.times)),
                x[i],
                float(mean[i]),
                float(std[i]),
                source,
                hash(schedule.steps),
            )
            for i, (schedule, params, source) in enumerate(told)
        ]

    def _pattern(
        self, parent: Individual, alive: Sequence[Individual], rng: np.random.Generator
    ) -> tuple[OdeSchedule, dict[str, Value], str]:
        """A parent's steps as they are, or changed in a decision or two."""
        domain, schedule = self.domain, self._built(parent)
        if rng.random() < 0.5:
            return schedule, domain.params(schedule), "times"
        source = "steps"
        if rng.random() < 0.3:
            schedule = domain.crossover(
                schedule, self._built(alive[int(rng.integers(min(len(alive), self.elite)))]), rng
            )
            source = "crossover"
        rate = float(rng.choice([0.03, 0.1]))
        rates = dict.fromkeys([*_STEPS, *(name for name, _, _ in domain.choices.extras)], rate)
        schedule = domain.mutate(
            schedule, rng, rates=rates | {"lam": 0.0, "relocate": 0.0, "first": rate}
        )
        return schedule, domain.params(schedule), source

    def _moved(
        self, lam: np.ndarray, alive: Sequence[Individual], rng: np.random.Generator
    ) -> np.ndarray:
        """Up to `moves` vectors of N+1 lam around one, itself the first; all keep the gaps."""
        domain = self.domain
        low, high = domain.lam_range
        free = slice(0 if domain.start_band else 1, len(lam) - (0 if domain.end_band else 1))
        same = [i.lam for i in alive if len(i.lam) == len(lam)]
        out = np.tile(lam, (self.moves, 1))
        for row in out[1:]:
            v = row[free]
            if rng.random() < 0.6 or len(same) < 3:
                touched = rng.random(len(v)) < rng.choice([0.3, 1.0])
                v += touched * rng.normal(0, (high - low) * 10 ** rng.uniform(-3, -1.2), len(v))
            else:
                a, b = rng.integers(len(same), size=2)
                v += rng.uniform(0.2, 1.0) * (same[a] - same[b])[free] + rng.normal(
                    0, 1e-3 * (high - low), len(v)
                )
        out[:, free].sort(axis=1)
        inside = (np.diff(out, axis=1) >= domain.min_gap).all(1)
        for band, column, bounds in (
            (domain.start_band, 0, domain.start_lam),
            (domain.end_band, -1, domain.end_lam),
        ):
            if band is not None:
                inside &= (out[:, column] >= bounds[0]) & (out[:, column] <= bounds[1])
        moved: np.ndarray = out[inside]
        return moved

    def _score(
        self,
        predictor: QualityPredictor,
        pattern: OdeSchedule,
        params: dict[str, Value],
        lam: np.ndarray,
        source: str,
    ) -> list[Individual]:
        if not len(lam):
            return []
        times = self.domain.noise.t_of_lam(torch.from_numpy(lam))
        if self.domain.start_band is None:
            times[:, 0] = pattern.times[0]
        if self.domain.end_band is None:
            times[:, -1] = pattern.times[-1]
        x = tokens(pattern, times)
        mean, std = predictor.predict(x)
        key = hash(pattern.steps)
        return [
            Individual(pattern, params, lam[i], x[i], float(mean[i]), float(std[i]), source, key)
            for i in range(len(lam))
        ]

    def _built(self, individual: Individual) -> OdeSchedule:
        """The member an individual stands for."""
        lam = individual.lam
        values: dict[str, Any] = dict(individual.params) | {
            f"lam_{i}": float(lam[i]) for i in range(1, len(lam) - 1)
        }
        return self.domain.from_params(
            values | {"lam_start": float(lam[0]), "lam_end": float(lam[-1])}
        )

    def _choose(
        self,
        predictor: QualityPredictor,
        everyone: Sequence[Individual],
        pool: Sequence[Member],
        size: int,
        rng: np.random.Generator,
    ) -> list[Proposal]:
        """Expected improvement, one after the other; what is known is not proposed again."""
        best, everyone = predictor.best, self._trusted(predictor, everyone)
        most = max(1, int(self.niche * size))  # of one pattern in the generation
        bound = sorted(everyone, key=lambda i: i.mean - self.beta * i.std)
        exploit = sorted(everyone, key=lambda i: i.mean)
        listed = niches(bound, 4 * most, 12 * size) + niches(exploit, 2 * most, 4 * size)
        short = list({id(i): i for i in listed}.values())
        mean, cov = predictor.posterior(torch.stack([i.tokens for i in short]))
        params = [m.params for m in pool]
        free = np.ones(len(short), dtype=bool)
        patterns: Counter[int] = Counter()
        chosen: list[Proposal] = []
        while len(chosen) < size and free.any():
            std = np.sqrt(cov.diagonal().clip(1e-12))
            gain = np.where(free, expected_improvement(best - mean, std), -1.0)
            i = int(np.argmax(gain))
            free[i] = False
            schedule = self._built(short[i])
            values = self.domain.params(schedule)
            if values in params or patterns[short[i].key] >= most:
                continue
            patterns[short[i].key] += 1
            params.append(values)
            note: dict[str, Any] = {"predicted": float(mean[i]), "std": float(short[i].std)}
            note["predictor"] = predictor.chosen
            note |= {f"tau_{name}": value for name, value in predictor.tau.items()}
            chosen.append(Proposal(schedule, short[i].source, note))
            cov = cov - np.outer(cov[:, i], cov[:, i]) / (cov[i, i] + 1e-9)
        return chosen + [
            Proposal(self.domain.sample(rng), "random") for _ in range(size - len(chosen))
        ]


def expected_improvement(gain: np.ndarray, std: np.ndarray) -> np.ndarray:
    """E max(0, gain + std * z) of a standard normal z; Jones et al. 1998, eq. 15."""
    z = torch.from_numpy(gain / std)
    density = torch.exp(-0.5 * z**2) / (2 * math.pi) ** 0.5
    value: np.ndarray = std * (z * torch.special.ndtr(z) + density).numpy()
    return value
