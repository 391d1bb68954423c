"""What S3 searches: points with features, and how children are made of good ones.

Three kinds of space, best first:

    OdeSpace        an `OdeDomain`: features are the tokens of a schedule's program, read by the
                    quality predictor; a round takes a few step patterns (parents' own, mutated or
                    crossed) and for each moves all times at once in lam, by Gaussian steps of
                    log-uniform size or along differences of good schedules (differential
                    evolution). A pattern's moves share one symbolic compilation.
    DomainSpace     any other domain: its flat encoding, its mutation and crossover, a Gaussian
                    process.
    ParameterSpace  any Optuna distributions: coordinates in [0, 1] (in log or by steps where the
                    distribution says so; choices one-hot), a Gaussian process.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution, CategoricalDistribution
from torch import Tensor

from fewstep.predictors.quality import LEAST_ROWS, QualityPredictor, ScoreProcess
from fewstep.search.strategies import Evaluated
from fewstep.space.choices import table
from fewstep.space.domain import OdeDomain
from fewstep.space.moves import moved_times
from fewstep.space.plans import PlanDomain
from fewstep.space.protocol import Domain
from fewstep.space.schedule import OdeSchedule
from fewstep.space.tokens import tokens

PATTERNS, MOVES = 10, 64  # step patterns of a round, choices of times per pattern
ADOPTED = 3  # results of another NFE that are made members of this one
ELITE = 20  # parents
_NOISE = 1e-2  # share of noise in scores of drawn samples, which jump between near schedules
_LOOK = 64  # random members that tell which features vary in a space


@dataclass(frozen=True)
class Individual:
    """A place in a space: genes, from which children are made, and features x.

    Points of one `key` share a niche; None is a niche of its own. `mean` and `std` are predicted.
    """

    genes: Any
    x: Tensor
    source: str
    key: Hashable = None
    mean: float = math.nan
    std: float = math.nan


class DomainSpace:
    """Members of a domain, by its encoding and moves; `earlier` are of other numbers of calls."""

    rounds, children = 6, 100
    crossover, scale = 0.3, 0.1

    def __init__(self, domain: Domain, earlier: Sequence[Evaluated]) -> None:
        self.domain, self.earlier = domain, list(earlier)
        self._points: dict[Hashable, Individual] = {}

    def point(self, params: Mapping[str, Any], source: str = "parent") -> Individual | None:
        """The point of a trial's parameters; None if it is none of this space."""
        key = frozenset(params.items())
        if key not in self._points:
            if not params:
                return None
            self._points[key] = self.of(self.domain.from_params(params), source)
        return self._points[key]

    def of(self, schedule: Any, source: str) -> Individual:
        """The point of a member."""
        return Individual(schedule, torch.from_numpy(self.domain.encode(schedule)), source)

    def params(self, point: Individual) -> dict[str, Any]:
        """The parameters of a point."""
        return dict(self.domain.params(point.genes))

    def guests(self) -> list[Individual]:
        """Points made from the best at every other number of calls; plans, of the best rivals."""
        found = []
        if isinstance(self.domain, PlanDomain):
            scored = sorted((e for e in self.earlier if e.status == "ok"), key=lambda e: e.score)
            plans = [m for e in scored for m in self.domain.adopt(e.schedule)]
            if scored:  # the neutral one second
                plans.insert(1, self.domain.from_params({}))
            members = {m.digest: m for m in plans}
            return [self.of(m, "adopted") for m in list(members.values())[: 1 + ADOPTED]]
        for nfe in self._calls():
            for best in self._best(nfe):
                found += [self.of(s, "adopted") for s in self.domain.adopt(best.schedule)]
        return found

    def _calls(self) -> list[int]:
        return sorted({e.schedule.nfe for e in self.earlier} - {self.domain.nfe})

    def _best(self, nfe: int, limit: int | None = ADOPTED) -> list[Evaluated]:
        """The finite results at a number of calls that lie in the space, best first."""
        other = self.domain.with_nfe(nfe)
        usable = [
            (e.score, i)
            for i, e in enumerate(self.earlier)
            if e.schedule.nfe == nfe and e.status == "ok" and math.isfinite(e.score)
        ]
        found: list[Evaluated] = []
        for _, i in sorted(usable):
            if len(found) == limit:
                break
            if other.contains(self.earlier[i].schedule) is None:
                found.append(self.earlier[i])
        return found

    def ready(self, known: Sequence[Individual], scores: Sequence[float]) -> bool:
        """Whether enough is known to predict: not while a feature has never been varied.

        The named schedules often leave choices untouched (no named count has a temperature), and a
        process that has never seen a feature vary takes it for harmless.
        """
        if len(set(scores)) < LEAST_ROWS:
            return False
        rng = np.random.default_rng(0)
        drawn = np.stack([self.domain.encode(self.domain.sample(rng)) for _ in range(_LOOK)])
        x = torch.stack([p.x for p in known]).numpy()
        return not bool((np.ptp(x, axis=0) == 0)[np.ptp(drawn, axis=0) > 0].any())

    def explore(self, best: Sequence[Individual], rng: np.random.Generator) -> Individual:
        """A point while too little is known: a mutation of one of the best, or random."""
        if not best:
            return self.of(self.domain.sample(rng), "random")
        parent = best[min(int(rng.exponential(2.0)), len(best) - 1)].genes
        return self.of(self.domain.mutate(parent, rng, scale=self.scale), "mutation")

    def model(
        self, known: Sequence[Individual], scores: Sequence[float], newest: int, seed: int
    ) -> Model:
        """A model of the scores; the last `newest` are the last generation's."""
        return ScoreProcess(torch.stack([p.x for p in known]), scores, _NOISE, 20)

    def breed(self, alive: Sequence[Individual], rng: np.random.Generator) -> list[Individual]:
        """A round of children: mutations of scales of their own, some of two parents."""
        made = []
        for _ in range(self.children):
            pick = min(int(rng.exponential(len(alive) / 3)), len(alive) - 1)
            schedule, source = alive[pick].genes, "mutation"
            if rng.random() < self.crossover:
                other = alive[int(rng.integers(len(alive)))].genes
                schedule, source = self.domain.crossover(schedule, other, rng), "crossover"
            scale = self.scale * rng.uniform(0.2, 1.0)
            made.append(self.of(self.domain.mutate(schedule, rng, scale=scale), source))
        return made


@dataclass(frozen=True)
class _Genes:
    """A step pattern (a schedule and its parameters), and lam of all N+1 times."""

    pattern: OdeSchedule
    params: dict[str, Any]
    lam: np.ndarray


class OdeSpace(DomainSpace):
    """Members of an `OdeDomain`, by the tokens of their programs.

    The predictor ("auto", "sequence" or "gaussian", see `predictors.quality`) learns from results
    at other numbers of calls, too.
    """

    rounds, children = 12, PATTERNS * MOVES
    domain: OdeDomain

    def __init__(
        self, domain: OdeDomain, earlier: Sequence[Evaluated], predictor: str = "auto"
    ) -> None:
        super().__init__(domain, earlier)
        self._predictor = predictor
        self._others: list[tuple[Tensor, float]] | None = None

    def of(self, schedule: OdeSchedule, source: str) -> Individual:
        """See `DomainSpace`."""
        lam = np.array(self.domain.lam(schedule.times))
        genes = _Genes(schedule, dict(self.domain.params(schedule)), lam)
        return Individual(genes, tokens(schedule)[0], source, hash(schedule.steps))

    def params(self, point: Individual) -> dict[str, Any]:
        """See `DomainSpace`."""
        return dict(self.domain.params(self._built(point)))

    def _built(self, point: Individual) -> OdeSchedule:
        """The member a point stands for."""
        genes, lam = point.genes, point.genes.lam
        values = genes.params | {f"lam_{i}": float(lam[i]) for i in range(1, len(lam) - 1)}
        ends = {"lam_start": float(lam[0]), "lam_end": float(lam[-1])}
        return self.domain.from_params(values | ends)

    def _calls(self) -> list[int]:
        return [n for n in (self.domain.nfe - 1, self.domain.nfe + 1) if n >= 1]

    def ready(self, known: Sequence[Individual], scores: Sequence[float]) -> bool:
        """See `DomainSpace`."""
        return len(known) >= LEAST_ROWS

    def explore(self, best: Sequence[Individual], rng: np.random.Generator) -> Individual:
        """See `DomainSpace`: a random member."""
        return self.of(self.domain.sample(rng), "random")

    def model(
        self, known: Sequence[Individual], scores: Sequence[float], newest: int, seed: int
    ) -> Model:
        """See `DomainSpace`: the quality predictor, of every number of calls."""
        if self._others is None:
            self._others = []
            if self._predictor != "gaussian":
                for nfe in sorted({e.schedule.nfe for e in self.earlier} - {self.domain.nfe}):
                    for e in self._best(nfe, None):
                        self._others.append((tokens(e.schedule)[0], e.score))
        x = [p.x for p in known] + [x for x, _ in self._others]
        y = [*scores, *(score for _, score in self._others)]
        return QualityPredictor(self._predictor, seed).fit(x, y, self.domain.nfe, newest)

    def breed(self, alive: Sequence[Individual], rng: np.random.Generator) -> list[Individual]:
        """See `DomainSpace`."""
        moves = max(2, self.children // PATTERNS)
        made: list[Individual] = []
        for _ in range(PATTERNS):
            parent = alive[min(int(rng.exponential(len(alive) / 4)), len(alive) - 1)]
            pattern, params, source = self._pattern(parent, alive, rng)
            others = [p.genes.lam for p in alive]
            lam = moved_times(self.domain, self.domain.lam(pattern.times), others, moves, rng)
            if len(lam):
                made += self._points_of(pattern, params, lam, source)
        return made

    def _points_of(
        self, pattern: OdeSchedule, params: dict[str, Any], lam: np.ndarray, source: str
    ) -> list[Individual]:
        times = self.domain.noise.t_of_lam(torch.from_numpy(lam))
        if self.domain.start_band is None:
            times[:, 0] = pattern.times[0]
        if self.domain.end_band is None:
            times[:, -1] = pattern.times[-1]
        x, key = tokens(pattern, times), hash(pattern.steps)
        return [
            Individual(_Genes(pattern, params, row), x[i], source, key)
            for i, row in enumerate(lam)
        ]

    def _pattern(
        self, parent: Individual, alive: Sequence[Individual], rng: np.random.Generator
    ) -> tuple[OdeSchedule, dict[str, Any], str]:
        """A parent's steps as they are, or changed in a decision or two."""
        domain, schedule = self.domain, self._built(parent)
        if rng.random() < 0.5:
            return schedule, dict(domain.params(schedule)), "times"
        source = "steps"
        if rng.random() < 0.3:
            other = self._built(alive[int(rng.integers(min(len(alive), ELITE)))])
            schedule, source = domain.crossover(schedule, other, rng), "crossover"
        rate = float(rng.choice([0.03, 0.1]))
        rates = dict.fromkeys(table(domain.choices), rate)
        rates |= {"lam": 0.0, "relocate": 0.0, "first": rate}
        schedule = domain.mutate(schedule, rng, rates=rates)
        return schedule, dict(domain.params(schedule)), source


class ParameterSpace:
    """Any Optuna distributions; genes are Optuna's own transform of the parameters, in [0, 1]."""

    rounds, children = 6, 144

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        self._names = set(space)
        self._transform = _SearchSpaceTransform(dict(space), transform_0_1=True)
        self._columns = list(
            zip(space.values(), self._transform.column_to_encoded_columns, strict=True)
        )

    def point(self, params: Mapping[str, Any], source: str = "parent") -> Individual | None:
        """See `DomainSpace`."""
        if not self._names <= set(params):
            return None
        genes = self._transform.transform({name: params[name] for name in self._names})
        return Individual(genes, torch.from_numpy(genes), source)

    def params(self, point: Individual) -> dict[str, Any]:
        """See `DomainSpace`."""
        return self._transform.untransform(point.genes)

    def guests(self) -> list[Individual]:
        """None."""
        return []

    def ready(self, known: Sequence[Individual], scores: Sequence[float]) -> bool:
        """See `DomainSpace`."""
        return len(known) >= LEAST_ROWS

    def explore(self, best: Sequence[Individual], rng: np.random.Generator) -> Individual:
        """See `DomainSpace`: uniform."""
        return self._settled(rng.random(len(self._transform.bounds)), "random")

    def model(
        self, known: Sequence[Individual], scores: Sequence[float], newest: int, seed: int
    ) -> ScoreProcess:
        """See `DomainSpace`."""
        return ScoreProcess(torch.stack([p.x for p in known]), scores, 1e-5, 10)

    def breed(self, alive: Sequence[Individual], rng: np.random.Generator) -> list[Individual]:
        """See `DomainSpace`: parents moved, and one random point in nine."""
        random = self.children // 9
        made = [self._child(alive, rng) for _ in range(self.children - random)]
        return made + [self.explore((), rng) for _ in range(random)]

    def _settled(self, genes: np.ndarray, source: str) -> Individual:
        """The point of the parameters that genes mean: integers, steps and choices have few."""
        point = self.point(self._transform.untransform(genes.clip(0.0, 1.0)), source)
        assert point is not None
        return point

    def _child(self, alive: Sequence[Individual], rng: np.random.Generator) -> Individual:
        """A parent moved by a Gaussian step of log-uniform size, or along a difference."""
        parent = alive[min(int(rng.exponential(len(alive) / 4)), len(alive) - 1)].genes
        a, b = (alive[int(k)].genes for k in rng.integers(len(alive), size=2))
        difference, child = rng.random() < 0.4, parent.copy()
        scale, share = 10 ** rng.uniform(-2.5, -0.5), float(rng.choice([0.3, 1.0]))
        for distribution, columns in self._columns:
            if isinstance(distribution, CategoricalDistribution):
                if rng.random() < 0.5 / len(self._columns) + 0.05:
                    child[columns] = rng.random(len(columns))
                elif difference and rng.random() < 0.3:
                    child[columns] = a[columns]
            elif difference:
                child[columns] += 0.7 * (a - b)[columns]
            elif rng.random() < share:
                child[columns] += rng.normal(0, scale)
        return self._settled(child, "mutation")


Space = DomainSpace | ParameterSpace
Model = ScoreProcess | QualityPredictor


def predicted(model: Model, points: Sequence[Individual]) -> list[Individual]:
    """Points with what a model expects of them."""
    if not points:
        return []
    mean, std = model.predict(torch.stack([p.x for p in points]))
    return [replace(p, mean=float(mean[i]), std=float(std[i])) for i, p in enumerate(points)]
