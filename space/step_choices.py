"""The choices of one solver step, as named parameters with a canonical form.

A step's fields are not independent: relaxations act in the lam basis only, a slope of fewer points
needs order 3, order 1 without a corrector is DDIM in every formulation. `settle` maps any
combination to the valid, canonical step nearest to it (fields that do not matter are neutral),
`active` lists the parameters that matter for a canonical step. So every combination of values
means a schedule, equal steps are equal values, and a search never meets a crash. Identities used:
order 1 is DDIM in every formulation and basis; EDM's Heun is the order-1 predictor with the
order-2 corrector of the rho basis, evaluated again (USF, arXiv 2312.07243 section 3, names that
corrector "implicit").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fewstep.space.errors import ScheduleError
from fewstep.space.schedule import StepSpec

Value = str | float | int
CORRECTOR_RELAXATIONS = ("none", "bh1", "bh2")
_BASES = ("lam", "t", "rho", "power", "adams")
_RELAXATIONS = ("none", "bh1", "bh2", "exp", "minus_exp", "linear", "half_second")
_OPTIONS = {
    "orders": (1, 2, 3, 4),
    "formulations": ("data", "noise", "velocity"),
    "bases": _BASES,
    "correctors": ("none", "reuse", "reeval"),
    "relaxations": _RELAXATIONS,
}


@dataclass(frozen=True)
class Parameter:
    """One searched value.

    Args:
        name: field and step, e.g. "order_2", or a global name.
        kind: "float", "int" (ordered) or "choice".
        low: least value of a number.
        high: greatest value of a number.
        choices: values of a choice.
        neutral: the value at which it does nothing, or its default.
    """

    name: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Value, ...] = ()
    neutral: Value = 0.0

    @property
    def width(self) -> int:
        """Columns in the flat encoding."""
        return len(self.choices) if self.kind == "choice" else 1


@dataclass(frozen=True)
class Place:
    """Where a step stands.

    Args:
        index: 0 for the first step.
        calls: calls that remain for this step and the following ones, >= 1.
        clean_end: the schedule ends on clean data (lam = inf).
        pure_start: the schedule starts at alpha = 0 (lam = -inf).
    """

    index: int
    calls: int
    clean_end: bool = False
    pure_start: bool = False

    def after(self, step: StepSpec) -> Place:
        """Where the next step stands."""
        calls = self.calls - (2 if step.corrector == "reeval" else 1)
        return Place(self.index + 1, calls, self.clean_end, self.pure_start)


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
        extras: further continuous fields of `StepSpec` with their bounds, as (name, low, high):
            "compensation", "dt_query", "dt_start", "dt_land", "power", "guidance".
        weights: number of extra weights on older outputs.
        weights_bound: their largest absolute value.
        compensation_order: older points a compensation other than 1 needs.
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

    def __post_init__(self) -> None:
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
            if (
                name
                not in ("compensation", "dt_query", "dt_start", "dt_land", "power", "guidance")
                or not low < high
            ):
                raise ScheduleError(
                    f"domain: extras holds {(name, low, high)!r}: give (field, low, high)"
                )

    def settle(self, values: Mapping[str, Any], place: Place) -> StepSpec:
        """The canonical step nearest to `values`, by field name; missing ones are neutral.

        Args:
            values: any values of the fields; numbers outside their bounds are clipped.
            place: where the step stands.
        """
        i, last_call = place.index, place.calls == 1
        corrector = str(values.get("corrector", "none"))
        if corrector not in self.correctors or last_call:
            corrector = "none"
        if place.clean_end and (place.calls == 2 and corrector == "reeval"):
            corrector = "none"  # the network cannot be asked at sigma = 0
        wanted = round(float(values.get("order", 1)))
        order = max((p for p in self.orders if p <= min(wanted, i + 1)), default=1)
        basis = str(values.get("basis", self.bases[0]))
        basis = basis if basis in self.bases else self.bases[0]
        formulation = str(values.get("formulation", self.formulations[0]))
        formulation = formulation if formulation in self.formulations else self.formulations[0]
        if formulation == "velocity" and basis not in ("t", "adams"):
            basis = "t" if "t" in self.bases else "adams"
        if place.clean_end and last_call:
            order = 1
        if basis == "adams" and corrector != "none":
            order = min(order, 3)  # Adams-Moulton weights end at 4 points
        if place.pure_start:
            formulation, basis, order = _from_pure_noise(formulation, basis, order, i)
        return self._canonical(values, place, order, formulation, basis, corrector)

    def _canonical(
        self,
        values: Mapping[str, Any],
        place: Place,
        order: int,
        formulation: str,
        basis: str,
        corrector: str,
    ) -> StepSpec:
        fields: dict[str, Any] = {"order": order, "corrector": corrector}
        if order > 1 or corrector != "none":
            fields |= {"formulation": formulation, "basis": basis}
        if basis == "lam" and order > 1:
            fields |= self._relaxed(values, order)
        if basis == "lam" and corrector != "none":
            name = str(values.get("corrector_relaxation", "none"))
            open_ = name in CORRECTOR_RELAXATIONS and (name in self.relaxations)
            fields["corrector_relaxation"] = name if open_ else "none"
        for name, low, high in self.extras:
            if self._extra_open(name, fields, place):
                neutral = StepSpec.model_fields[name].default
                value = values.get(name, neutral)
                fields[name] = (
                    min(max(float(value), low), high) if value is not None else 0.5 * (low + high)
                )
        count = min(self.weights, place.index)
        if count:
            bound = self.weights_bound
            extra = tuple(
                min(max(float(values.get(f"weight{k}", 0.0)), -bound), bound) for k in range(count)
            )
            fields["weights"] = extra if any(extra) else ()
        return _step(tuple(fields.items()))

    def _relaxed(self, values: Mapping[str, Any], order: int) -> dict[str, Any]:
        name = str(values.get("relaxation", "none"))
        if name not in self.relaxations or (name == "half_second" and order < 3):
            name = "none"
        fields: dict[str, Any] = {}
        if name == "linear":
            c = min(
                max(float(values.get("coefficient", 0.0)), -self.coefficient_bound),
                self.coefficient_bound,
            )
            name = "linear" if c != 0.0 else "none"
            fields["relaxation_coefficient"] = c if c != 0.0 else 0.0
        slope = round(float(values.get("slope", 0)))
        if self.slopes and order >= 3 and 1 <= slope <= order - 2:
            fields["slope_points"] = slope
        return fields | {"relaxation": name}

    def _extra_open(self, name: str, fields: Mapping[str, Any], place: Place) -> bool:
        if name == "compensation":
            return place.index >= self.compensation_order
        if name == "power":
            return fields.get("basis") == "power"
        if name == "dt_land":
            return place.calls > 1  # the end of the last step is the end time itself
        if name in ("dt_query", "dt_start"):
            return place.index > 0  # x_T has the level of the start time
        return True

    def active(self, step: StepSpec, place: Place) -> Iterator[tuple[str, Value]]:
        """The (field, value) pairs that matter for a canonical step; `settle` inverts them."""
        if self._top(place.index) > 1:
            yield "order", step.order
        if place.calls > 1 and len(self.correctors) > 1:
            yield "corrector", step.corrector
        if step.order > 1 or step.corrector != "none":
            if len(self.formulations) > 1:
                yield "formulation", step.formulation
            if len(self.bases) > 1:
                yield "basis", step.basis
            if step.basis == "lam":
                yield from self._active_in_lam(step)
        for name, _, _ in self.extras:
            if self._extra_open(name, {"basis": step.basis}, place):
                yield name, getattr(step, name)
        for k in range(min(self.weights, place.index)):
            yield f"weight{k}", step.weights[k] if step.weights else 0.0

    def _active_in_lam(self, step: StepSpec) -> Iterator[tuple[str, Value]]:
        if step.order > 1 and len(self.relaxations) > 1:
            yield "relaxation", step.relaxation
            if step.relaxation == "linear":
                yield "coefficient", step.relaxation_coefficient
        if step.order > 2 and self.slopes:
            yield "slope", step.slope_points or 0
        if step.corrector != "none" and len(self._corrector_relaxations) > 1:
            yield "corrector_relaxation", step.corrector_relaxation

    @property
    def _corrector_relaxations(self) -> tuple[str, ...]:
        return tuple(name for name in CORRECTOR_RELAXATIONS if name in self.relaxations)

    def _top(self, i: int) -> int:
        """The highest order step i can have."""
        return max(p for p in self.orders if p <= i + 1)

    def parameters(self, i: int) -> Iterator[Parameter]:
        """Every parameter step i may have, in a fixed order."""
        top = self._top(i)
        if top > 1:
            yield Parameter(f"order_{i}", "int", 1, top, neutral=1)
        for field, options in (
            ("corrector", self.correctors),
            ("formulation", self.formulations),
            ("basis", self.bases),
        ):
            if len(options) > 1:
                yield Parameter(f"{field}_{i}", "choice", choices=options, neutral=options[0])
        if "lam" in self.bases:
            if top > 1 and len(self.relaxations) > 1:
                yield Parameter(
                    f"relaxation_{i}", "choice", choices=self.relaxations, neutral="none"
                )
            if top > 1 and "linear" in self.relaxations:
                bound = self.coefficient_bound
                yield Parameter(f"coefficient_{i}", "float", -bound, bound)
            if top > 2 and self.slopes:
                yield Parameter(f"slope_{i}", "int", 0, top - 2, neutral=0)
            if set(self.correctors) != {"none"} and len(self._corrector_relaxations) > 1:
                choices = self._corrector_relaxations
                yield Parameter(
                    f"corrector_relaxation_{i}", "choice", choices=choices, neutral="none"
                )
        for name, low, high in self.extras:
            if name == "compensation" and i < self.compensation_order:
                continue
            if name in ("dt_query", "dt_start") and i == 0:
                continue
            default = StepSpec.model_fields[name].default
            neutral = 0.5 * (low + high) if default is None else min(max(default, low), high)
            yield Parameter(f"{name}_{i}", "float", low, high, neutral=neutral)
        for k in range(min(self.weights, i)):
            yield Parameter(f"weight{k}_{i}", "float", -self.weights_bound, self.weights_bound)

    def refuses(self, step: StepSpec, place: Place) -> str | None:
        """Why a step is outside these choices, or None.

        Written apart from `settle`, so that each checks the other.
        """
        if step.order not in self.orders:
            return f"order {step.order} is not among {self.orders}"
        if step.corrector not in self.correctors:
            return f"corrector {step.corrector!r} is not among {self.correctors}"
        if step.corrector != "none" and step.points_corrector != step.order + 1:
            return f"corrector_order {step.corrector_order} is not order + 1"
        matters = step.order > 1 or step.corrector != "none"
        if matters and step.formulation not in self.formulations:
            return f"formulation {step.formulation!r} is not among {self.formulations}"
        if matters and step.basis not in self.bases:
            return f"basis {step.basis!r} is not among {self.bases}"
        if matters and step.formulation == "velocity" and step.basis not in ("t", "adams"):
            return f"formulation velocity has no basis {step.basis}"
        if step.basis == "adams" and step.corrector != "none" and step.order > 3:
            return "the adams basis has no corrector of 5 points"
        in_lam = matters and step.basis == "lam"
        if in_lam and step.order > 1 and step.relaxation not in self.relaxations:
            return f"relaxation {step.relaxation!r} is not among {self.relaxations}"
        if (
            in_lam
            and step.relaxation == "linear"
            and abs(step.relaxation_coefficient) > self.coefficient_bound
        ):
            return f"{step.relaxation_coefficient=} is beyond {self.coefficient_bound}".replace(
                "step.", ""
            )
        if (
            in_lam
            and step.slope_points is not None
            and step.slope_points < step.order - 1
            and not self.slopes
        ):
            return "slope_points is not open"
        if (
            in_lam
            and step.corrector != "none"
            and step.corrector_relaxation not in self._corrector_relaxations
        ):
            return f"corrector_relaxation {step.corrector_relaxation!r} is not open"
        return self._refuses_fixed(step, place)

    def _refuses_fixed(self, step: StepSpec, place: Place) -> str | None:
        for name in ("start", "tableau", "eta"):
            if getattr(step, name) != StepSpec.model_fields[name].default:
                return f"{name} is {getattr(step, name)!r}, which is not searched"
        bounds = {name: (low, high) for name, low, high in self.extras}
        for name in ("compensation", "dt_query", "dt_start", "dt_land", "guidance"):
            value, neutral = getattr(step, name), StepSpec.model_fields[name].default
            low, high = bounds.get(name, (neutral, neutral))
            if value != neutral and (name not in bounds or not low <= value <= high):
                return f"{name} {value} is not open or outside its bounds"
        if len(step.weights) > self.weights or any(
            abs(w) > self.weights_bound for w in step.weights
        ):
            return f"weights {step.weights} are not open or outside +-{self.weights_bound}"
        if (
            place.pure_start
            and place.index == 0
            and step.corrector != "none"
            and step.basis not in ("lam", "adams")
        ):
            return f"basis {step.basis} cannot start at alpha = 0"
        return None


@lru_cache(maxsize=8192)
def _step(fields: tuple[tuple[str, Any], ...]) -> StepSpec:
    """Steps are frozen, and most of a search's are the same few: validated once."""
    return StepSpec(**dict(fields))


def _from_pure_noise(formulation: str, basis: str, order: int, i: int) -> tuple[str, str, int]:
    """What a start at alpha = 0 allows.

    No noise form at step 0, and no t or rho interpolation through that point.
    """
    if i == 0:
        return (
            ("data" if formulation == "noise" else formulation),
            ("lam" if basis in ("t", "rho", "power") else basis),
            1,
        )
    return formulation, basis, (min(order, i) if basis in ("t", "rho", "power") else order)


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
    return values | {f"weight{k}": w for k, w in enumerate(step.weights)}
