"""What a strategy may ask of a search space, whatever kind of schedule its members are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from fewstep.space.step_choices import Parameter, Value

__all__ = ["Domain", "distributions", "encoded"]


class Domain(Protocol):
    """All schedules of `nfe` calls with some decisions left open.

    Named parameters and members are equal views: `params(from_params(v)) == v` for the parameters
    of any member, and `from_params` is total. A parameter that does not matter is absent.
    """

    @property
    def nfe(self) -> int:
        """Network calls of every member."""
        ...

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter a member may have, in a fixed order."""
        ...

    def with_nfe(self, nfe: int) -> Self:
        """The same decisions at another number of calls."""
        ...

    def contains(self, schedule: object) -> str | None:
        """Why a schedule is not a member, or None if it is."""
        ...

    def params(self, schedule: Any) -> dict[str, Value]:
        """The parameters of a member that matter; a ScheduleError for anything else."""
        ...

    def from_params(self, values: Mapping[str, Any]) -> Any:
        """The member nearest to any values."""
        ...

    def encode(self, schedule: Any) -> np.ndarray:
        """A member as a flat float64 vector."""
        ...

    def sample(self, rng: np.random.Generator) -> Any:
        """A random member."""
        ...

    def mutate(
        self,
        schedule: Any,
        rng: np.random.Generator,
        *,
        rates: Mapping[str, float] | None = None,
        scale: float = ...,
    ) -> Any:
        """A changed copy of a member."""
        ...

    def crossover(self, a: Any, b: Any, rng: np.random.Generator) -> Any:
        """A child of two members."""
        ...

    def adopt(self, schedule: Any) -> list[Any]:
        """Members made from a schedule of any number of calls; none from one of another model."""
        ...

    def distributions(self) -> dict[str, Any]:
        """The parameters as Optuna distributions."""
        ...


def distributions(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Parameters as Optuna distributions (needs the search extra)."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for p in parameters:
        if p.kind == "choice":
            made[p.name] = CategoricalDistribution(p.choices)
        elif p.kind == "int":
            made[p.name] = IntDistribution(int(p.low), int(p.high))
        else:
            made[p.name] = FloatDistribution(p.low, p.high)
    return made


def encoded(parameters: Sequence[Parameter], values: Mapping[str, Value]) -> np.ndarray:
    """Values as a flat float64 vector.

    Numbers as they are, choices one-hot; absent numbers are neutral, absent choices zero.
    """
    vector: list[float] = []
    for p in parameters:
        if p.kind == "choice":
            one_hot = [0.0] * len(p.choices)
            if p.name in values:
                one_hot[p.choices.index(values[p.name])] = 1.0
            vector += one_hot
        else:
            vector.append(float(values.get(p.name, p.neutral)))
    return np.array(vector)
