"""How candidates are proposed: a strategy is a function of what is known, the generation, and a seed.

A strategy keeps no memory of its own: everything it may use is in `known`, and its random numbers come from f(seed, generation). So a
search killed at any moment and resumed proposes exactly what it would have proposed, for every strategy, and generation g can be proposed
while generation g - 1 is still being evaluated (then `known` ends earlier).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Evaluated:
    """A candidate that has been scored.

    Args:
        schedule: the candidate.
        score: the number minimised; inf if it failed.
        status: "ok", "diverged", "oom", "timeout" or "error".
        samples: how many samples the score rests on.
        per_sample: per-sample scores where the objective has them, in the fixed sample order; None otherwise.
        source: where it came from: a baseline's name, "random", "mutation", "crossover", "predictor", "import:...".
    """

    schedule: Any
    score: float
    status: str = "ok"
    samples: int = 0
    per_sample: np.ndarray | None = None
    source: str = ""


@dataclass(frozen=True)
class Proposal:
    """A candidate to score, and where it came from; `note` goes into the trial's user attributes."""

    schedule: Any
    source: str
    note: dict[str, Any] = field(default_factory=dict)


class Strategy(Protocol):
    """Proposes generations."""

    name: str

    def propose(self, known: Sequence[Evaluated], generation: int, size: int, rng: np.random.Generator) -> list[Proposal]:
        """Up to `size` candidates for generation `generation`; `known` holds the seeds' and earlier results in told order."""
        ...
