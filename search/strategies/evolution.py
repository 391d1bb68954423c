"""Evolution as in the released USF search (thu-nics/USF at 5b89ef5): what S3 must beat.

The released loop is steady-state: sort everything scored, take the top 15 as parents, with
probability .3 cross two of them, always mutate, score, repeat. It has no predictor, no ageing, no
duplicate check and no re-scoring (the paper's S3 has a predictor; no version of the code does).
Differences here: times move in lam (in t or sigma there), every child is a valid member, the
number of calls is fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from fewstep.search.strategies import SOURCE
from fewstep.space.protocol import Domain


class EvolutionSampler(BaseSampler):
    """Top-k parents, crossover, mutation; random members while nothing is known.

    Args:
        seed: of every random number.
        domain: the search space.
        parents: size of the parent pool, the best of everything told; drawn from uniformly.
        crossover: probability that a child has two parents.
        scale: standard deviation of a time's move as a share of the range of lam; USF moves t in
            0..1 by .03 to .08.
        rates: mutation probabilities that differ from `space.moves.RATES`.
    """

    def __init__(
        self,
        seed: int,
        *,
        domain: Domain,
        parents: int = 15,
        crossover: float = 0.3,
        scale: float = 0.05,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self._seed, self._domain, self._parents = seed, domain, parents
        self._crossover, self._scale, self._rates = crossover, scale, dict(rates or {})

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The domain's parameters."""
        return self._domain.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of a child."""
        domain, rng = self._domain, np.random.default_rng([self._seed, trial.number])
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        told = [
            t
            for t in study.get_trials(deepcopy=False, states=states)
            if t.params and t.value is not None
        ]
        told.sort(key=lambda t: (t.value, t.number))
        best = [t.params for t in told[: self._parents]]
        if best:
            child, source = domain.from_params(best[int(rng.integers(len(best)))]), "mutation"
            if len(best) > 1 and rng.random() < self._crossover:
                other = domain.from_params(best[int(rng.integers(len(best)))])
                child, source = domain.crossover(child, other, rng), "crossover"
            child = domain.mutate(child, rng, rates=self._rates, scale=self._scale)
        else:
            child, source = domain.sample(rng), "random"
        study._storage.set_trial_system_attr(trial._trial_id, SOURCE, source)
        return dict(domain.params(child))

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A parameter that is none of the domain's: uniform."""
        plain = RandomSampler(seed=self._seed + trial.number)
        return plain.sample_independent(study, trial, param_name, param_distribution)
