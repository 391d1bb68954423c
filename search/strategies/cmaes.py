"""CMA-ES on the continuous part: times, in lam, of the best schedule known; its steps stay.

Stateless: the covariance is rebuilt by replaying the generations this strategy has proposed
before, in told order. Reference: Hansen, "The CMA evolution strategy: a tutorial" (arXiv
1604.00772), in the implementation of the package cmaes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.search.strategies import Evaluated, Proposal
from fewstep.search.strategies.common import Member, members
from fewstep.space.protocol import Domain


@dataclass(frozen=True)
class CMAES:
    """CMA-ES over times (and open ends and numbers) of one schedule's steps.

    Args:
        domain: the search space.
        scale: initial standard deviation as a share of each number's range.
    """

    domain: Domain
    scale: float = 0.03
    name: str = "cmaes"

    def propose(
        self, known: Sequence[Evaluated], generation: int, size: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """See `Strategy`; random members where there is nothing to start from or to move."""
        from cmaes import CMA

        starts = members(self.domain, [r for r in known if r.source != "cmaes"], 1)
        ranges = {p.name: (p.low, p.high) for p in self.domain.parameters if p.kind == "float"}
        names = [n for n in starts[0].params if n in ranges] if starts else []
        if len(names) < 2 or size < 2:
            return [Proposal(self.domain.sample(rng), "random") for _ in range(size)]
        low, high = (np.array([ranges[n][side] for n in names]) for side in (0, 1))

        def unit(m: Member) -> np.ndarray:
            u: np.ndarray = (np.array([float(m.params[n]) for n in names]) - low) / (high - low)
            return u

        cma = CMA(
            unit(starts[0]),
            self.scale,
            bounds=np.tile([[-0.5, 1.5]], (len(names), 1)),
            population_size=size,
            seed=int(rng.integers(2**31)),
        )
        told = [
            m
            for m in members(self.domain, known)
            if known[m.told].source == "cmaes" and set(names) <= set(m.params)
        ]
        told.sort(key=lambda m: m.told)
        for at in range(0, len(told) - size + 1, size):
            cma.tell([(unit(m), m.score) for m in told[at : at + size]])
        fixed = starts[0].params
        asked = [low + cma.ask() * (high - low) for _ in range(size)]
        return [
            Proposal(
                self.domain.from_params(fixed | dict(zip(names, a.tolist(), strict=True))), "cmaes"
            )
            for a in asked
        ]
