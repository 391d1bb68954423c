"""What a strategy may ask of a search space, whatever kind of schedule its members are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from fewstep.space.choices import Parameter, Value
from fewstep.space.errors import ScheduleError

__all__ = ["Domain", "distributions", "encoded"]


class Domain(ABC):
    """All schedules of `nfe` calls with some decisions left open.

    Named parameters and members are equal views: `params(from_params(v)) == v` for the parameters
    of any member, and `from_params` is total. A parameter that does not matter is absent.
    Domains are frozen dataclasses.
    """

    nfe: int

    @property
    @abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter a member may have, in a fixed order; it has those that matter."""

    @abstractmethod
    def contains(self, schedule: object) -> str | None:
        """Why a schedule is not a member, or None if it is."""

    @abstractmethod
    def _values(self, schedule: Any) -> dict[str, Any]:
        """The parameters of a member."""

    @abstractmethod
    def from_params(self, values: Mapping[str, Any]) -> Any:
        """The member nearest to any values: missing ones are neutral, impossible ones settled."""

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> Any:
        """A random member."""

    @abstractmethod
    def mutate(
        self,
        schedule: Any,
        rng: np.random.Generator,
        *,
        rates: Mapping[str, float] | None = None,
        scale: float = ...,
    ) -> Any:
        """A changed copy of a member."""

    @abstractmethod
    def crossover(self, a: Any, b: Any, rng: np.random.Generator) -> Any:
        """A child of two members."""

    @abstractmethod
    def adopt(self, schedule: Any) -> list[Any]:
        """Members made from a schedule of any number of calls; none from one of another model."""

    def with_nfe(self, nfe: int) -> Self:
        """The same decisions at another number of calls."""
        return replace(self, nfe=nfe)  # type: ignore[type-var]

    def params(self, schedule: Any) -> dict[str, Any]:
        """The parameters of a member that matter; `from_params` inverts them exactly.

        Raises:
            ScheduleError: the schedule is not a member; says why.
        """
        reason = self.contains(schedule)
        if reason is not None:
            raise ScheduleError(f"not in the search space: {reason}")
        return self._values(schedule)

    def matter(self, values: Mapping[str, Any]) -> set[str]:
        """The names of the parameters that matter for the member nearest to any values."""
        return set(self._values(self.from_params(values)))

    def canonical(self, schedule: Any) -> Any:
        """The same sampler (to rounding) as a member whose irrelevant fields are neutral.

        Raises:
            ScheduleError: the schedule is not a member; says why.
        """
        return self.from_params(self.params(schedule))

    def distributions(self) -> dict[str, Any]:
        """The parameters as Optuna distributions (needs the search extra)."""
        return distributions(self.parameters)

    def encode(self, schedule: Any) -> np.ndarray:
        """A member as a flat float64 vector: numbers as they are, choices one-hot.

        Absent numbers are neutral, absent choices zero.
        """
        return encoded(self.parameters, self.params(schedule))


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
