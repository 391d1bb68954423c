"""Random search: members drawn anew, the yardstick every strategy must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.search.strategies import Evaluated, Proposal
from fewstep.space.protocol import Domain


@dataclass(frozen=True)
class RandomSearch:
    """Proposes independent random members.

    Args:
        domain: the search space.
    """

    domain: Domain
    name: str = "random"

    def propose(
        self, known: Sequence[Evaluated], generation: int, size: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """See `Strategy`."""
        return [Proposal(self.domain.sample(rng), "random") for _ in range(size)]
