"""S3 as an Optuna sampler: train on everything scored, evolve on the prediction, score a few.

    study = optuna.create_study(sampler=S3Sampler(seed=0))             # any search space
    sampler = S3Sampler(domain=OdeDomain(noise, 5), batch=32)          # schedules: `suggest`

The paper (USF, arXiv 2312.07243, section 4) gives the stages; its code is not released. Each
batch here is one stage:

1. Fit a model on every result so far (`strategies.spaces` says which, and from which features).
2. Evolve: parents are the best known, and members made from other numbers of calls. Survivors of a
   round are the best by mean and by the lower confidence bound mean - BETA * std, few of each step
   pattern, and none where the model knows next to nothing.
3. Choose distinct candidates one after the other by expected improvement; each choice, and each
   trial that is still running, removes the uncertainty it will remove when scored (the batch rule
   of Desautels et al. 2014, "Parallelizing exploration-exploitation tradeoffs"), and a step
   pattern has its share, so the batch spreads.

While too little is known to predict, candidates come from other numbers of calls and at random.
A batch is a function of the study's trials, the seed and the number of its first trial: a resumed
study goes on as it would have.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fewstep.predictors.gaussian import expected_improvement
from fewstep.search.strategies import NOTE, SOURCE, Evaluated
from fewstep.search.strategies.spaces import (
    ELITE,
    DomainSpace,
    Individual,
    Model,
    OdeSpace,
    ParameterSpace,
    Space,
    predicted,
)
from fewstep.space.domain import OdeDomain
from fewstep.space.errors import StudyError
from fewstep.space.protocol import Domain

BETA = 1.5  # weight of the uncertainty
TRUST = 0.25  # largest uncertainty of a candidate, as a share of the spread of the targets
NICHE = 0.2  # largest share of a batch with the same steps
_KEEP = 5  # survivors of one step pattern


class S3Sampler(BaseSampler):
    """Quality-predictor search over any single-objective study.

    Args:
        seed: of every random number; None draws one.
        domain: the search space, where trials are schedules (`suggest`): rich features and moves.
            None takes the parameters that every finished trial has.
        batch: trials proposed together.
        earlier: results at other numbers of calls, to learn from.
        predictor: of an `OdeDomain`: "auto", "sequence" or "gaussian".
        rounds: rounds of evolution on the prediction; None is the space's own number.
        children: children of a round; None is the space's own number.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        domain: Domain | None = None,
        batch: int = 1,
        earlier: Sequence[Evaluated] = (),
        predictor: str = "auto",
        rounds: int | None = None,
        children: int | None = None,
    ) -> None:
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._batch, self._domain = batch, domain
        self._rounds, self._children = rounds, children
        self._space: Space | None = None
        if isinstance(domain, OdeDomain):
            self._space = OdeSpace(domain, earlier, predictor)
        elif domain is not None:
            if predictor != "auto":
                raise StudyError(
                    f"predictor {predictor!r} reads solver schedules: a {type(domain).__name__} "
                    "has none: leave it out"
                )
            self._space = DomainSpace(domain, earlier)
        self._intersection = IntersectionSearchSpace()
        self._proposed: tuple[Any, deque[tuple[Individual, dict[str, Any]]]] = (None, deque())

    def reseed_rng(self) -> None:
        """Draw a new seed (Optuna calls this in parallel workers)."""
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The domain's parameters, or those that every finished trial has."""
        if self._domain is not None:
            return self._domain.distributions()
        space = self._intersection.calculate(study)
        return {name: d for name, d in space.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of a trial, proposed together with those of its batch."""
        _require_single(study)
        if not search_space:
            return {}
        finished = study.get_trials(
            deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        )
        stage = (study.study_name, len(finished), self._seed)
        if self._proposed[0] != stage or not self._proposed[1]:
            rng = np.random.default_rng([self._seed, trial.number])
            space = self._space or ParameterSpace(search_space)
            space.rounds = self._rounds or space.rounds
            space.children = self._children or space.children
            self._proposed = stage, deque(self._propose(study, trial, space, rng))
        point, note = self._proposed[1].popleft()
        for name, said in ((SOURCE, point.source), (NOTE, note)):
            study._storage.set_trial_system_attr(trial._trial_id, name, said)
        return (self._space or ParameterSpace(search_space)).params(point)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A parameter that not every trial has: uniform."""
        _require_single(study)
        space = ParameterSpace({param_name: param_distribution})
        rng = np.random.default_rng([self._seed, trial.number, *param_name.encode()])
        return space.params(space.explore((), rng))[param_name]

    def _propose(
        self, study: Study, trial: FrozenTrial, space: Space, rng: np.random.Generator
    ) -> list[tuple[Individual, dict[str, Any]]]:
        """A batch of points and what is expected of each."""
        known, scores = self._history(study, space)
        order = np.argsort(scores, kind="stable")
        best = [known[i] for i in order]
        pending = [
            point
            for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if t.number != trial.number and (point := space.point(t.params)) is not None
        ]
        taken = {_name(space.params(p)) for p in [*known, *pending]}
        guests = {_name(space.params(p)): p for p in space.guests()}
        guests = {name: p for name, p in guests.items() if name not in taken}
        chosen: list[tuple[Individual, dict[str, Any]]] = []
        ready = space.ready(known, scores)
        if not ready or not isinstance(space, OdeSpace):  # few: scored first
            chosen += [(p, {}) for p in guests.values()][: self._batch]
        if ready:
            model = space.model(known, scores, self._batch, int(rng.integers(2**31)))
            met = _evolve(space, model, best, list(guests.values()), rng)
            taken |= {_name(space.params(p)) for p, _ in chosen}
            chosen += _choose(space, model, met, pending, taken, self._batch - len(chosen))
        taken |= {_name(space.params(p)) for p, _ in chosen}
        for attempt in range(20 * self._batch):
            if len(chosen) == self._batch:
                break
            point = space.explore(best, rng)
            name = _name(space.params(point))
            if name not in taken or attempt >= 19 * self._batch:
                taken.add(name)
                chosen.append((point, {}))
        return chosen

    def _history(self, study: Study, space: Space) -> tuple[list[Individual], list[float]]:
        """Points and scores, smaller better; of stopped trials where the value is an estimate."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        states = [TrialState.COMPLETE, *([TrialState.PRUNED] if self._domain is not None else [])]
        points, scores = [], []
        for t in study.get_trials(deepcopy=False, states=states):
            if t.value is None or not math.isfinite(t.value):
                continue
            point = space.point(t.params)
            if point is not None:
                points.append(point)
                scores.append(sign * t.value)
        return points, scores


def _require_single(study: Study) -> None:
    if len(study.directions) > 1:
        raise ValueError("S3Sampler takes one objective: a study of several needs another sampler")


def _name(params: dict[str, Any]) -> frozenset[Any]:
    return frozenset(params.items())


def _niches(ranked: Sequence[Individual], most: int, count: int) -> list[Individual]:
    """The first `count` of a ranking with at most `most` of one key."""
    seen: Counter[Any] = Counter()
    kept: list[Individual] = []
    for p in ranked:
        if p.key is None or seen[p.key] < most:
            seen[p.key] += 1
            kept.append(p)
            if len(kept) == count:
                break
    return kept


def _evolve(
    space: Space,
    model: Model,
    best: Sequence[Individual],
    guests: Sequence[Individual],
    rng: np.random.Generator,
) -> list[Individual]:
    """Everyone met during the rounds."""
    parents = predicted(model, best[: 5 * ELITE])
    adopted = predicted(model, guests)
    alive, met = [*_niches(parents, _KEEP, ELITE), *adopted], [*parents, *adopted]
    for _ in range(space.rounds):
        met += predicted(model, space.breed(alive, rng))
        near = _trusted(model, met)
        bound = sorted(near, key=lambda p: p.mean - BETA * p.std)
        mean = sorted(near, key=lambda p: p.mean)
        pairs = zip(
            _niches(bound, _KEEP, 2 * ELITE), _niches(mean, _KEEP, 2 * ELITE), strict=False
        )
        alive = [p for pair in pairs for p in pair]
    return met


def _trusted(model: Model, met: Sequence[Individual]) -> list[Individual]:
    """Those whose uncertainty is small beside the spread of the scores; all if they are few.

    Far from all data a predictor returns the average of what it has seen, and late in a search
    that average is good: without a limit the search would leave for where it knows nothing.
    """
    near = [p for p in met if p.std <= TRUST * model.spread]
    enough = len(near) >= 2 * ELITE
    return near if enough else sorted(met, key=lambda p: p.std)[: 4 * ELITE]


def _choose(
    space: Space,
    model: Model,
    met: Sequence[Individual],
    pending: Sequence[Individual],
    taken: set[frozenset[Any]],
    size: int,
) -> list[tuple[Individual, dict[str, Any]]]:
    """Expected improvement, one after the other; what is known is not proposed again."""
    near = _trusted(model, met)
    most = max(1, int(NICHE * size))  # of one pattern in the batch
    bound = sorted(near, key=lambda p: p.mean - BETA * p.std)
    mean_first = sorted(near, key=lambda p: p.mean)
    listed = _niches(bound, 4 * most, 12 * size) + _niches(mean_first, 2 * most, 4 * size)
    short = list({id(p): p for p in listed}.values())
    if not short or size < 1:
        return []
    mean, cov = model.posterior(torch.stack([p.x for p in [*short, *pending]]))
    for i in range(len(short), len(short) + len(pending)):
        cov = cov - np.outer(cov[:, i], cov[:, i]) / (cov[i, i] + 1e-9)
    free, patterns = np.ones(len(short), dtype=bool), Counter[Any]()
    chosen: list[tuple[Individual, dict[str, Any]]] = []
    while len(chosen) < size and free.any():
        std = np.sqrt(cov.diagonal()[: len(short)].clip(1e-12))
        gain = expected_improvement(model.best - mean[: len(short)], std)
        i = int(np.argmax(np.where(free, gain, -1.0)))
        free[i] = False
        point = short[i]
        name = _name(space.params(point))
        if name in taken or (point.key is not None and patterns[point.key] >= most):
            continue
        patterns[point.key] += 1
        taken.add(name)
        note: dict[str, Any] = {"predicted": float(mean[i]), "std": point.std}
        note["predictor"] = model.chosen
        note |= {f"tau_{name}": tau for name, tau in getattr(model, "tau", {}).items()}
        chosen.append((point, note))
        cov = cov - np.outer(cov[:, i], cov[:, i]) / (cov[i, i] + 1e-9)
    return chosen
