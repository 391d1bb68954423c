"""Which decisions of a solver step are open, and steps in canonical form.

`settle` maps any combination of values to the valid, canonical step nearest to it (fields that do
not matter are neutral), `active` lists the parameters that matter for a canonical step. So every
combination of values means a schedule, equal steps are equal values, and a search never meets a
crash. What decisions there are, and when each is open, stands in the table of `space.choices`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

from fewstep.space.choices import EXTRAS, Parameter, Place, Settled, Value, open_at
from fewstep.space.coefficients import RELAXATIONS
from fewstep.space.errors import ScheduleError
from fewstep.space.schedule import StepSpec

__all__ = ["StepChoices", "heun_as_corrector", "step_values"]

_OPTIONS: dict[str, tuple[Any, ...]] = {
    "orders": (1, 2, 3, 4),
    "formulations": get_args(StepSpec.model_fields["formulation"].annotation),
    "bases": tuple(b for b in get_args(StepSpec.model_fields["basis"].annotation) if b != "label"),
    "correctors": get_args(StepSpec.model_fields["corrector"].annotation),
    "relaxations": RELAXATIONS,
}


@dataclass(frozen=True)
class StepChoices:
    """Which decisions of a step are open.

    Args:
        orders: orders of the predictor, capped by the history.
        formulations: out of "data", "noise", "velocity".
        bases: out of "lam", "t", "rho", "power", "adams"; "lam" and "t" are DPM-Solver, UniPC and
            DEIS, "adams" is iPNDM.
        correctors: out of "none", "reuse", "reeval".
        relaxations: factors on the first derivative in the lam basis; "linear" opens its
            coefficient.
        coefficient_bound: largest |c| of the linear relaxation 1 + c h.
        slopes: whether the first derivative may use fewer points than the order offers.
        extras: further continuous fields of `StepSpec` with their bounds, as (name, low, high),
            out of `choices.EXTRAS`.
        weights: number of extra weights on older outputs.
        weights_bound: their largest absolute value.
        compensation_order: older points a compensation other than 1 needs.
        starts: how many points back a step may start, 0..3: singlestep methods (orders from 2 on,
            not in the adams basis, which is uniform from the newest point).
        corrector_orders: whether correctors are as free as USF's: a corrector chooses its points
            and those of its first derivative (otherwise order + 1), and after a reuse corrector a
            step of order 1 its formulation (otherwise data).
    """

    orders: tuple[int, ...] = (1, 2, 3, 4)
    formulations: tuple[str, ...] = ("data", "noise")
    bases: tuple[str, ...] = ("lam", "t", "rho", "adams")
    correctors: tuple[str, ...] = ("none", "reuse", "reeval")
    relaxations: tuple[str, ...] = (
        "none",
        "bh1",
        "bh2",
        "exp",
        "minus_exp",
        "half_second",
        "linear",
    )
    coefficient_bound: float = 1.0
    slopes: bool = True
    extras: tuple[tuple[str, float, float], ...] = ()
    weights: int = 0
    weights_bound: float = 0.5
    compensation_order: int = 2
    starts: int = 0
    corrector_orders: bool = False

    def __post_init__(self) -> None:
        if self.starts not in (0, 1, 2, 3):
            raise ScheduleError(f"domain: starts {self.starts!r} must be 0 (newest only) to 3")
        for name, allowed in _OPTIONS.items():
            given = getattr(self, name)
            if not given:
                raise ScheduleError(
                    f"domain: {name} is empty: give at least one of {', '.join(map(str, allowed))}"
                )
            for value in given:
                if value not in allowed:
                    raise ScheduleError(
                        f"domain: {name} holds {value!r}: use {', '.join(map(str, allowed))}"
                    )
        if 1 not in self.orders:
            raise ScheduleError("domain: orders must hold 1: the first step has no history")
        if "none" not in self.correctors or "none" not in self.relaxations:
            raise ScheduleError(
                "domain: correctors and relaxations must hold 'none': not every step can have one"
            )
        if set(self.formulations) == {"velocity"} and not {"t", "adams"} & set(self.bases):
            raise ScheduleError("domain: formulation velocity needs basis t or adams")
        for name, low, high in self.extras:
            if name not in EXTRAS or not low < high:
                raise ScheduleError(
                    f"domain: extras holds {(name, low, high)!r}: give (field, low, high)"
                )

    @property
    def corrects(self) -> bool:
        """Whether any corrector is open."""
        return set(self.correctors) != {"none"}

    def top(self, i: int) -> int:
        """The highest order step i can have."""
        return max(p for p in self.orders if p <= i + 1)

    def settle(self, values: Mapping[str, Any], place: Place) -> StepSpec:
        """The canonical step nearest to `values`, by decision; missing ones are neutral.

        Args:
            values: any values of the decisions; numbers outside their bounds are clipped.
            place: where the step stands.
        """
        return _settled(self, place, tuple(values.items()))

    def canonical(self, step: StepSpec, place: Place) -> StepSpec:
        """The canonical step nearest to a step."""
        return _canonical(self, place, step)

    def active(self, step: StepSpec, place: Place) -> tuple[tuple[str, Value], ...]:
        """The (decision, value) pairs that matter for a canonical step; `settle` inverts them."""
        return _active(self, place, step)

    def parameters(self, i: int) -> Iterator[Parameter]:
        """Every parameter step i may have, in a fixed order."""
        yield from open_at(self, i).values()


# Steps and places are frozen, and a search meets the same few of them over and over: while one
# parameter of a schedule is suggested, the steps before it and after it stay as they are.


@lru_cache(maxsize=8192)
def _settled(choices: StepChoices, place: Place, values: tuple[tuple[str, Any], ...]) -> StepSpec:
    f = Settled(choices, place, dict(values))
    fields = {d.field: f[name] for name, d in f.rows.items() if d.field and d.matters(f)}
    for name, all_points in (
        ("slope_points", 0),
        ("corrector_slope_points", 0),
        ("corrector_order", f["order"] + 1),
    ):
        if fields.get(name) == all_points:
            del fields[name]
    weights = tuple(f[f"weight{k}"] for k in range(min(choices.weights, place.index)))
    if any(weights):
        fields["weights"] = weights
    return _step(tuple(fields.items()))


@lru_cache(maxsize=8192)
def _canonical(choices: StepChoices, place: Place, step: StepSpec) -> StepSpec:
    return choices.settle(step_values(heun_as_corrector(step)), place)


@lru_cache(maxsize=8192)
def _active(choices: StepChoices, place: Place, step: StepSpec) -> tuple[tuple[str, Value], ...]:
    f = Settled(choices, place, {})
    f |= step_values(step) | {"corrector_order": step.points_corrector}
    return tuple((name, f[name]) for name in f.open if f.rows[name].matters(f))


@lru_cache(maxsize=8192)
def _step(fields: tuple[tuple[str, Any], ...]) -> StepSpec:
    return StepSpec(**dict(fields))


def heun_as_corrector(step: StepSpec) -> StepSpec:
    """A step with EDM's Heun tableau as the equal predictor-corrector step."""
    if step.tableau == "heun2" and step.formulation == "noise" and step.basis == "rho":
        return StepSpec(
            formulation="noise", basis="rho", corrector="reeval", guidance=step.guidance
        )
    return step


def step_values(step: StepSpec) -> dict[str, Any]:
    """A step's fields under the parameters' names, for `StepChoices.settle`."""
    values: dict[str, Any] = {name: getattr(step, name) for name in StepSpec.model_fields}
    values |= {"coefficient": step.relaxation_coefficient, "slope": step.slope_points or 0}
    values |= {"corrector_slope": step.corrector_slope_points or 0}
    return values | {f"weight{k}": w for k, w in enumerate(step.weights)}
