"""TPE (Optuna's tree-structured Parzen estimator), its study rebuilt from what is known.

Every result becomes a finished trial with the parameters that mattered for it; a candidate asks
for the parameters one after the other, those that matter given the ones before. Reference:
Bergstra et al. 2011; Watanabe 2023 (arXiv 2304.11127).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.search.strategies import Evaluated, Proposal
from fewstep.search.strategies.common import members
from fewstep.space.protocol import Domain

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True)
class TPE:
    """Optuna's TPESampler over the domain's distributions.

    Args:
        domain: the search space.
        startup: finished trials before the estimator is used.
        multivariate: model parameters jointly where all trials share them.
    """

    domain: Domain
    startup: int = 10
    multivariate: bool = False
    name: str = "tpe"

    def propose(
        self, known: Sequence[Evaluated], generation: int, size: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """See `Strategy`."""
        import optuna

        sampler = optuna.samplers.TPESampler(
            n_startup_trials=self.startup,
            multivariate=self.multivariate,
            constant_liar=True,
            seed=int(rng.integers(2**31)),
        )
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(sampler=sampler)
        finally:
            optuna.logging.set_verbosity(verbosity)
        distributions = self.domain.distributions()
        for m in sorted(members(self.domain, known), key=lambda m: m.told):
            used = {name: distributions[name] for name in m.params}
            study.add_trial(
                optuna.trial.create_trial(params=m.params, distributions=used, value=m.score)
            )
        return [
            Proposal(self.domain.from_params(self._ask(study.ask())), "tpe") for _ in range(size)
        ]

    def _ask(self, trial: Trial) -> dict[str, Any]:
        """Suggest each parameter that matters given those before it."""
        values: dict[str, Any] = {}
        matter = self._matter(values)
        for p in self.domain.parameters:
            if p.name not in matter:
                continue
            if p.kind == "float":
                values[p.name] = trial.suggest_float(p.name, p.low, p.high)
                continue
            if p.kind == "choice":
                values[p.name] = trial.suggest_categorical(p.name, p.choices)
            else:
                values[p.name] = trial.suggest_int(p.name, int(p.low), int(p.high))
            matter = self._matter(values)
        return values

    def _matter(self, values: dict[str, Any]) -> set[str]:
        return set(self.domain.params(self.domain.from_params(values)))
