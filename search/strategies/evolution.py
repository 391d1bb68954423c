"""Evolution as in the released USF search (thu-nics/USF at 5b89ef5): what S3 must beat.

The released loop is steady-state: sort everything scored, take the top 15 as parents, with
probability .3 cross two of them, always mutate, score, repeat. It has no predictor, no ageing, no
duplicate check and no re-scoring (the paper's S3 has a predictor; no version of the code does).
Differences here: times move in lam (in t or sigma there), every child is a valid member, the
number of calls is fixed, and a generation is proposed at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fewstep.search.strategies import Evaluated, Proposal
from fewstep.search.strategies.common import members
from fewstep.space.protocol import Domain


@dataclass(frozen=True)
class Evolution:
    """Top-k parents, crossover, mutation.

    Args:
        domain: the search space.
        parents: size of the parent pool, the best of everything known; drawn from uniformly.
        crossover: probability that a child has two parents.
        scale: standard deviation of a time's move as a share of the range of lam; USF moves t in
            0..1 by .03 to .08.
        rates: mutation probabilities that differ from `space.moves.RATES`.
    """

    domain: Domain
    parents: int = 15
    crossover: float = 0.3
    scale: float = 0.05
    rates: Mapping[str, float] = field(default_factory=dict)
    name: str = "evolution"

    def propose(
        self, known: Sequence[Evaluated], generation: int, size: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """See `Strategy`; random members while nothing is known."""
        pool = [m.schedule for m in members(self.domain, known, self.parents)]
        made: list[Proposal] = []
        for _ in range(size):
            if not pool:
                made.append(Proposal(self.domain.sample(rng), "random"))
                continue
            parent, source = pool[int(rng.integers(len(pool)))], "mutation"
            if len(pool) > 1 and rng.random() < self.crossover:
                other = pool[int(rng.integers(len(pool)))]
                parent, source = self.domain.crossover(parent, other, rng), "crossover"
            made.append(
                Proposal(
                    self.domain.mutate(parent, rng, rates=self.rates, scale=self.scale), source
                )
            )
        return made
