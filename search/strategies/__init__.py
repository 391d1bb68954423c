"""How candidates are proposed: from what is known, the generation, and a seed.

A strategy keeps no memory of its own: everything it may use is in `known`, and its random numbers
come from f(seed, generation). So a search killed at any moment and resumed proposes exactly what
it would have proposed, for every strategy, and generation g can be proposed while generation g - 1
is still being evaluated (then `known` ends earlier).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np

from fewstep.space.domain import OdeDomain
from fewstep.space.errors import StudyError
from fewstep.space.protocol import Domain


@dataclass(frozen=True)
class Evaluated:
    """A candidate that has been scored.

    Args:
        schedule: the candidate.
        score: the number minimised; inf if it failed.
        status: "ok", "diverged", "oom", "timeout" or "error".
        samples: how many samples the score rests on.
        per_sample: per-sample scores where the objective has them, in the fixed sample order; None
            otherwise.
        source: where it came from: a baseline's name, "random", "mutation", "crossover",
            "predictor", "import:...".
    """

    schedule: Any
    score: float
    status: str = "ok"
    samples: int = 0
    per_sample: np.ndarray | None = None
    source: str = ""


@dataclass(frozen=True)
class Proposal:
    """A candidate to score, and where it came from.

    `note` goes into the trial's user attributes.
    """

    schedule: Any
    source: str
    note: dict[str, Any] = field(default_factory=dict)


class Strategy(Protocol):
    """Proposes generations."""

    name: str

    def propose(
        self, known: Sequence[Evaluated], generation: int, size: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Up to `size` candidates for generation `generation`.

        `known` holds the seeds' and earlier results in told order.
        """
        ...


STRATEGIES = {
    "random": "random_search.RandomSearch",
    "evolution": "evolution.Evolution",
    "tpe": "tpe.TPE",
    "cmaes": "cmaes.CMAES",
    "s3": "s3.S3",
}


def make(name: str, domain: Domain, **options: Any) -> Strategy:
    """A strategy by name.

    Args:
        name: one of `STRATEGIES`.
        domain: the space it searches.
        options: fields of the strategy's class.

    Raises:
        StudyError: an unknown strategy or option; the known ones are listed.
    """
    if name not in STRATEGIES:
        raise StudyError(
            f"strategy {name!r} is unknown: use one of {', '.join(STRATEGIES)}, each alone or "
            "with +refine or +compensation, or these two alone"
        )
    plain = name == "s3" and not isinstance(domain, OdeDomain)
    module, _, cls = ("plain.PlainS3" if plain else STRATEGIES[name]).partition(".")
    factory = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    known = [f.name for f in fields(factory) if f.name not in ("domain", "name")]
    for option in options:
        if option not in known:
            raise StudyError(
                f"strategy {name} has no option {option!r}: its options are "
                f"{', '.join(known) or 'none'}"
            )
    strategy: Strategy = factory(domain, **options)
    return strategy
