"""The choices of one solver step, as named parameters with a canonical form.

A step's fields are not independent: relaxations act in the lam basis only, a slope of fewer
points needs order 3, order 1 without a corrector is DDIM in the data and in the noise form (but
after a reuse corrector, see `corrector_orders`). `settle` maps any combination to the valid,
canonical step nearest to it (fields that do not matter are neutral), `active` lists the parameters
that matter for a canonical step. So every combination of values means a schedule, equal steps are
equal values, and a search never meets a crash. Identities used: order 1 is DDIM in every basis;
EDM's Heun is the order-1 predictor with the order-2 corrector of the rho basis, evaluated again
(USF, arXiv 2312.07243 section 3, names that corrector "implicit").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fewstep.space import refusals
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
        corrected: the step before reuses its call for a corrector, so the state here is not the
            one the network saw: D and eps no longer recombine to it.
    """

    index: int
    calls: int
    clean_end: bool = False
    pure_start: bool = False
    corrected: bool = False

    def after(self, step: StepSpec) -> Place:
        """Where the next step stands."""
        calls = self.calls - (2 if step.corrector == "reeval" else 1)
        reused = step.corrector == "reuse"
        return Place(self.index + 1, calls, self.clean_end, self.pure_start, reused)


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
        if basis == "adams" and corrector != "none" and not self.corrector_orders:
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
        if corrector != "none":
            fields |= self._corrected(values, place, order, formulation, basis)
        start = min(round(float(values.get("start", 0))), self._oldest_start(order, basis, place))
        if start > 0:
            fields["start"] = start
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
            if any(extra):
                fields |= {"weights": extra, "formulation": formulation}
        if place.corrected and self.corrector_orders:
            fields["formulation"] = formulation
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

    def _corrected(
        self, values: Mapping[str, Any], place: Place, order: int, formulation: str, basis: str
    ) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        points = order + 1
        if self.corrector_orders:
            wanted = values.get("corrector_order")
            points = points if wanted is None else round(float(wanted))
            points = min(max(points, 2), _most_points(formulation, basis, place))
            fields |= {"corrector_order": points} if points != order + 1 else {}
        if basis == "lam":
            name = str(values.get("corrector_relaxation", "none"))
            open_ = name in CORRECTOR_RELAXATIONS and (name in self.relaxations)
            fields["corrector_relaxation"] = name if open_ else "none"
            slope = round(float(values.get("corrector_slope", 0)))
            if self.corrector_orders and self.slopes and 1 <= slope <= points - 2:
                fields["corrector_slope_points"] = slope
        return fields

    def _oldest_start(self, order: int, basis: str, place: Place) -> int:
        """Points back from which the step may start; never the one at alpha = 0."""
        if order == 1 or basis == "adams":
            return 0
        return min(self.starts, place.index - place.pure_start)

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
        if step.corrector != "none" and self.corrector_orders and place.index > 0:
            yield "corrector_order", step.points_corrector
        if len(self.formulations) > 1 and self._formulated(step, place):
            yield "formulation", step.formulation
        if step.order > 1 or step.corrector != "none":
            if len(self.bases) > 1:
                yield "basis", step.basis
            if step.basis == "lam":
                yield from self._active_in_lam(step)
        if self._oldest_start(step.order, step.basis, place) > 0:
            yield "start", step.start
        for name, _, _ in self.extras:
            if self._extra_open(name, {"basis": step.basis}, place):
                yield name, getattr(step, name)
        for k in range(min(self.weights, place.index)):
            yield f"weight{k}", step.weights[k] if step.weights else 0.0

    def _formulated(self, step: StepSpec, place: Place) -> bool:
        """Whether the step's formulation is chosen."""
        plain = step.order == 1 and step.corrector == "none" and not any(step.weights)
        return not plain or (place.corrected and self.corrector_orders)

    def _active_in_lam(self, step: StepSpec) -> Iterator[tuple[str, Value]]:
        if step.order > 1 and len(self.relaxations) > 1:
            yield "relaxation", step.relaxation
            if step.relaxation == "linear":
                yield "coefficient", step.relaxation_coefficient
        if step.order > 2 and self.slopes:
            yield "slope", step.slope_points or 0
        if step.corrector != "none" and len(self._corrector_relaxations) > 1:
            yield "corrector_relaxation", step.corrector_relaxation
        if step.corrector != "none" and self._corrector_slopes and step.points_corrector > 2:
            yield "corrector_slope", step.corrector_slope_points or 0

    @property
    def _corrector_slopes(self) -> bool:
        return self.corrector_orders and self.slopes

    @property
    def _corrector_relaxations(self) -> tuple[str, ...]:
        return tuple(name for name in CORRECTOR_RELAXATIONS if name in self.relaxations)

    def _top(self, i: int) -> int:
        """The highest order step i can have."""
        return max(p for p in self.orders if p <= i + 1)

    def parameters(self, i: int) -> Iterator[Parameter]:
        """Every parameter step i may have, in a fixed order."""
        top, corrects = self._top(i), set(self.correctors) != {"none"}
        if top > 1:
            yield Parameter(f"order_{i}", "int", 1, top, neutral=1)
        for field, options in (
            ("corrector", self.correctors),
            ("formulation", self.formulations),
            ("basis", self.bases),
        ):
            if len(options) > 1:
                yield Parameter(f"{field}_{i}", "choice", choices=options, neutral=options[0])
            if field == "corrector" and corrects and self.corrector_orders and i > 0:
                yield Parameter(f"corrector_order_{i}", "int", 2, min(5, i + 2), neutral=2)
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
            if corrects and len(self._corrector_relaxations) > 1:
                choices = self._corrector_relaxations
                yield Parameter(
                    f"corrector_relaxation_{i}", "choice", choices=choices, neutral="none"
                )
            if corrects and self._corrector_slopes and i > 0:
                yield Parameter(f"corrector_slope_{i}", "int", 0, min(3, i), neutral=0)
        if self.starts and top > 1 and set(self.bases) != {"adams"}:
            yield Parameter(f"start_{i}", "int", 0, min(self.starts, i), neutral=0)
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
        """Why a step is outside these choices, or None; see `space.refusals`."""
        return refusals.refuses(self, step, place)


@lru_cache(maxsize=8192)
def _step(fields: tuple[tuple[str, Any], ...]) -> StepSpec:
    """Steps are frozen, and most of a search's are the same few: validated once."""
    return StepSpec(**dict(fields))


def _most_points(formulation: str, basis: str, place: Place) -> int:
    """Points the corrector of a step can use."""
    if basis == "adams":
        return min(4, place.index + 2)
    if place.pure_start and basis in ("t", "rho", "power") and formulation != "velocity":
        return min(5, place.index + 1)
    return min(5, place.index + 2)


def _from_pure_noise(formulation: str, basis: str, order: int, i: int) -> tuple[str, str, int]:
    """What a start at alpha = 0 allows.

    No noise form at step 0, and no t or rho interpolation through that point; in the velocity
    form, integrated in t, everything there is finite.
    """
    if formulation == "velocity":
        return formulation, basis, order
    if i == 0:
        return "data", ("lam" if basis in ("t", "rho", "power") else basis), 1
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
    values |= {"corrector_slope": step.corrector_slope_points or 0}
    return values | {f"weight{k}": w for k, w in enumerate(step.weights)}
