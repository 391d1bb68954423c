"""S3 as an Optuna sampler: stages of predict, evolve, score for anybody's study.

    study = optuna.create_study(sampler=S3Sampler(seed=0))
    study.optimize(objective, n_trials=300)

Parameters become coordinates in [0, 1] (in log or by steps where the distribution says so; choices
one-hot), a Gaussian process (`predictors.gaussian`) predicts the objective from them, and a
population evolves on its lower confidence bound from the best trials. Random numbers are f(seed,
trial number), so a resumed study goes on as it would have. The strategy `S3` knows what a schedule
is and is the better tool for schedules; this one knows distributions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fewstep.predictors.gaussian import GaussianProcess
from fewstep.predictors.quality import targets

Genes = list[float]  # one number per parameter: 0..1, or the index of a choice


class S3Sampler(BaseSampler):
    """Quality-predictor search over any single-objective Optuna search space.

    Args:
        seed: seed of every random number; None draws one.
        startup: finished trials before the predictor is used; random until then.
        population: candidates evolved per round.
        rounds: rounds of evolution on the prediction per trial.
        beta: weight of the uncertainty.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        startup: int = 10,
        population: int = 128,
        rounds: int = 6,
        beta: float = 1.5,
    ) -> None:
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._startup, self._population, self._rounds, self._beta = (
            startup,
            population,
            rounds,
            beta,
        )
        self._space = IntersectionSearchSpace()

    def reseed_rng(self) -> None:
        """Draw a new seed (Optuna calls this in parallel workers)."""
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Parameters that every finished trial has; the others are drawn at random."""
        space = self._space.calculate(study)
        return {name: d for name, d in space.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of a trial, proposed together."""
        self._require_single(study)
        if not search_space:
            return {}
        rng = np.random.default_rng([self._seed, trial.number])
        names, space = list(search_space), list(search_space.values())
        genes, scores = self._history(study, search_space)
        if len(genes) < self._startup:
            chosen = [_draw(d, rng) for d in space]
        else:
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            pending = [
                _genes(t, search_space)
                for t in running
                if t.number != trial.number and set(names) <= set(t.params)
            ]
            chosen = self._propose(genes, scores, pending, space, rng)
        return {name: _value(d, g) for name, d, g in zip(names, space, chosen, strict=True)}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A parameter that not every trial has: uniform."""
        self._require_single(study)
        key = [self._seed, trial.number, *param_name.encode()]
        return _value(param_distribution, _draw(param_distribution, np.random.default_rng(key)))

    @staticmethod
    def _require_single(study: Study) -> None:
        if len(study.directions) > 1:
            raise ValueError(
                "S3Sampler takes one objective: a study of several needs another sampler"
            )

    def _history(
        self, study: Study, space: dict[str, BaseDistribution]
    ) -> tuple[list[Genes], list[float]]:
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        genes, scores = [], []
        for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if t.value is not None and math.isfinite(t.value) and set(space) <= set(t.params):
                genes.append(_genes(t, space))
                scores.append(sign * t.value)
        return genes, scores

    def _propose(
        self,
        genes: list[Genes],
        scores: list[float],
        pending: list[Genes],
        space: Sequence[BaseDistribution],
        rng: np.random.Generator,
    ) -> Genes:
        """The best new point of an evolved population by the lower confidence bound."""
        y = targets(torch.tensor(scores))
        x = _features(genes, space)
        process = GaussianProcess(steps=10).fit(x, y)
        if pending:  # what runs is believed to turn out as predicted
            at = _features(pending, space)
            process = process.believe(at, process.predict(at)[0])
        order = np.argsort(scores, kind="stable")
        alive = [genes[i] for i in order[:20]]
        taken = {tuple(g) for g in (*genes, *pending)}
        beta = self._beta * float(rng.choice([0.0, 0.5, 1.0, 1.5]))
        met: dict[tuple[float, ...], float] = {}
        for _ in range(self._rounds):
            children = [_child(alive, space, rng) for _ in range(self._population)]
            children += [[_draw(d, rng) for d in space] for _ in range(self._population // 8)]
            mean, std = process.predict(_features(children, space))
            bound = (mean - beta * std).tolist()
            met |= {
                tuple(c): b for c, b in zip(children, bound, strict=True) if tuple(c) not in taken
            }
            alive = [list(c) for c in sorted(met, key=lambda c: met[c])[:30]] or alive
        if not met:
            return [_draw(d, rng) for d in space]
        chosen, _ = min(met.items(), key=lambda item: item[1])
        return list(chosen)


def _draw(d: BaseDistribution, rng: np.random.Generator) -> float:
    return (
        float(rng.integers(len(d.choices)))
        if isinstance(d, CategoricalDistribution)
        else _snapped(d, float(rng.random()))
    )


def _child(
    alive: list[Genes], space: Sequence[BaseDistribution], rng: np.random.Generator
) -> Genes:
    """A parent moved by a Gaussian step of log-uniform size, or along a difference of others."""
    parent = alive[min(int(rng.exponential(len(alive) / 4)), len(alive) - 1)]
    a, b = alive[int(rng.integers(len(alive)))], alive[int(rng.integers(len(alive)))]
    difference = rng.random() < 0.4
    scale, share = 10 ** rng.uniform(-2.5, -0.5), float(rng.choice([0.3, 1.0]))
    child: Genes = []
    for g, p, q, d in zip(parent, a, b, space, strict=True):
        if isinstance(d, CategoricalDistribution):
            changed = rng.random() < 0.5 / len(space) + 0.05
            child.append(
                _draw(d, rng) if changed else p if difference and rng.random() < 0.3 else g
            )
        else:
            move = (
                0.7 * (p - q)
                if difference
                else rng.normal(0, scale)
                if rng.random() < share
                else 0.0
            )
            child.append(_snapped(d, min(max(g + move, 0.0), 1.0)))
    return child


def _features(genes: Sequence[Genes], space: Sequence[BaseDistribution]) -> torch.Tensor:
    columns = []
    for j, d in enumerate(space):
        values = torch.tensor([g[j] for g in genes], dtype=torch.float64)
        if isinstance(d, CategoricalDistribution):
            columns.append(torch.nn.functional.one_hot(values.long(), len(d.choices)).double())
        else:
            columns.append(values[:, None])
    return torch.cat(columns, dim=1)


def _genes(trial: FrozenTrial, space: dict[str, BaseDistribution]) -> Genes:
    return [_gene(d, trial.params[name]) for name, d in space.items()]


def _gene(d: BaseDistribution, value: Any) -> float:
    if isinstance(d, CategoricalDistribution):
        return float(d.to_internal_repr(value))
    d = _number(d)
    low, high = _bounds(d)
    position = math.log(value) if d.log else float(value)
    return min(max((position - low) / (high - low), 0.0), 1.0) if high > low else 0.5


def _value(d: BaseDistribution, gene: float) -> Any:
    if isinstance(d, CategoricalDistribution):
        return d.choices[int(gene)]
    d = _number(d)
    low, high = _bounds(d)
    value = low + gene * (high - low)
    value = math.exp(value) if d.log else value
    if isinstance(d, IntDistribution):
        step = d.step or 1
        return int(min(max(d.low + step * round((value - d.low) / step), d.low), d.high))
    if d.step is not None:
        value = d.low + d.step * round((value - d.low) / d.step)
    return float(min(max(value, d.low), d.high))


def _snapped(d: BaseDistribution, gene: float) -> float:
    """The coordinate of the value a coordinate means: integers and steps have few."""
    continuous = isinstance(d, FloatDistribution) and d.step is None
    return gene if continuous else _gene(d, _value(d, gene))


def _number(d: BaseDistribution) -> FloatDistribution | IntDistribution:
    if not isinstance(d, FloatDistribution | IntDistribution):
        raise TypeError(f"S3Sampler knows no {type(d).__name__}")
    return d


def _bounds(d: FloatDistribution | IntDistribution) -> tuple[float, float]:
    if not d.log:
        return float(d.low), float(d.high)
    half = 0.5 if isinstance(d, IntDistribution) else 0.0  # integers get equal room at both ends
    return math.log(d.low - half), math.log(d.high + half)
