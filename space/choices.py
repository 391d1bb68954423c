"""The decisions of one solver step: ONE table of names, options, neutral values, and when open.

A step's decisions are not independent: relaxations act in the lam basis only, a slope of fewer
points needs order 3, order 1 without a corrector is DDIM in the data and in the noise form (but
after a reuse corrector, see `corrector_orders`). A row of the table says which parameter a
decision is at step i, which allowed value is nearest to any given one, and whether the decision
matters beside the others. Parameters, canonical steps, membership and moves all read this table.

Identities used: order 1 is DDIM in every basis; EDM's Heun is the order-1 predictor with the
order-2 corrector of the rho basis, evaluated again (USF, arXiv 2312.07243 section 3, names that
corrector "implicit").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fewstep.space.schedule import StepSpec

if TYPE_CHECKING:
    from fewstep.space.step_choices import StepChoices

Value = str | float | int
CORRECTOR_RELAXATIONS = ("none", "bh1", "bh2")
_INTERPOLATING = ("t", "rho", "power")  # not through a point at alpha = 0
_SHARE = 0.1  # of an option that a prior does not name
EXTRAS = {
    "compensation": None,
    "dt_query": 1,
    "dt_start": 1,
    "dt_land": 0,
    "power": 0,
    "guidance": 0,
}
"""Numbers of a step that a search may open within bounds, and the first step at which each does
something (x_T has the level of the start time); None: where there are points enough."""


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
        shares: with which the options (of an int: from low to high) are proposed [all alike].
    """

    name: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Value, ...] = ()
    neutral: Value = 0.0
    shares: tuple[float, ...] = ()

    @property
    def options(self) -> tuple[Value, ...]:
        """The values of a choice or an int."""
        return self.choices or tuple(range(int(self.low), int(self.high) + 1))

    def with_prior(self, prior: Mapping[Value, float]) -> Parameter:
        """The parameter with the shares of its options; those not named have 0.1."""
        shares = tuple(prior.get(option, _SHARE) for option in self.options)
        return Parameter(
            self.name, self.kind, self.low, self.high, self.choices, self.neutral, shares
        )


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


class Settled(dict[str, Any]):
    """The decisions of one step, each settled when it is first asked for.

    Args:
        choices: which decisions are open.
        place: where the step stands.
        wanted: the values wanted, by decision; missing ones are neutral.
    """

    def __init__(self, choices: StepChoices, place: Place, wanted: Mapping[str, Any]) -> None:
        super().__init__()
        self.choices, self.place, self.wanted = choices, place, wanted
        self.rows, self.open = table(choices), open_at(choices, place.index)

    def __missing__(self, name: str) -> Any:
        wanted = self.wanted.get(name) if name in self.open else None
        self[name] = found = self.rows[name].nearest(self, wanted)
        return found

    @property
    def plain(self) -> bool:
        """Order 1 without a corrector: DDIM, whatever the basis."""
        return bool(self["order"] == 1 and self["corrector"] == "none")


@dataclass(frozen=True)
class Decision:
    """One row of the table.

    Args:
        parameter: (choices, i) -> the parameter of step i; None where it is never open.
        nearest: (settled, wanted) -> the allowed value nearest to `wanted`; None is neutral.
        matters: whether the value changes the step, given all others.
        field: the field of `StepSpec` it sets; "" for one of the weights.
        key: decisions of one key are inherited together [the name].
        prior: shares with which options are proposed.
    """

    parameter: Callable[[StepChoices, int], Parameter | None]
    nearest: Callable[[Settled, Any], Value | None]
    matters: Callable[[Settled], bool]
    field: str
    key: str
    prior: Mapping[Value, float] = dataclasses.field(default_factory=dict)


@lru_cache(maxsize=256)
def table(choices: StepChoices) -> dict[str, Decision]:
    """The decisions of a step by name, in the order of their parameters."""
    made = dict(_FIXED)
    for name, low, high in choices.extras:
        made[name] = _extra(name, low, high)
    for k in range(choices.weights):
        made[f"weight{k}"] = _weight(k, choices.weights_bound)
    return made


@lru_cache(maxsize=4096)
def open_at(choices: StepChoices, i: int) -> dict[str, Parameter]:
    """The parameters of step i, by decision; what is not among them is neutral there."""
    found = {}
    for name, row in table(choices).items():
        p = row.parameter(choices, i)
        if p is not None:
            found[name] = p.with_prior(row.prior) if row.prior else p
    return found


def _clip(value: Any, low: float, high: float) -> float:
    return min(max(float(value), low), high)


def _named(name: str, options: Callable[[StepChoices], tuple[Value, ...]]) -> Any:
    """The parameter of a choice among `options`, open at every step."""

    def parameter(c: StepChoices, i: int) -> Parameter | None:
        found = options(c)
        if len(found) < 2:
            return None
        return Parameter(f"{name}_{i}", "choice", choices=found, neutral=found[0])

    return parameter


def _corrector(f: Settled, wanted: Any) -> Value:
    p, name = f.place, str(wanted)
    late = p.calls == 1 or (p.clean_end and p.calls == 2 and name == "reeval")
    return "none" if late or name not in f.choices.correctors else name


def _corrector_order_parameter(c: StepChoices, i: int) -> Parameter | None:
    if not (c.corrects and c.corrector_orders and i > 0):
        return None
    return Parameter(f"corrector_order_{i}", "int", 2, min(5, i + 2), neutral=2)


def _corrector_order(f: Settled, wanted: Any) -> Value:
    """Points of the corrector, at most those that its basis can use."""
    usual: int = f["order"] + 1
    if not f.choices.corrector_orders:
        return usual
    i, basis, most = f.place.index, f["basis"], 5
    if basis == "adams":
        most = 4
    last = i + 2
    if f.place.pure_start and basis in _INTERPOLATING and f["formulation"] != "velocity":
        last = i + 1
    points = usual if wanted is None else round(float(wanted))
    return min(max(points, 2), most, last)


def _formulation(f: Settled, wanted: Any) -> Value:
    """At alpha = 0 there is no noise form."""
    allowed = f.choices.formulations
    name = str(wanted) if wanted in allowed else allowed[0]
    at_pure_noise = f.place.pure_start and f.place.index == 0
    return "data" if at_pure_noise and name != "velocity" else name


def _basis(f: Settled, wanted: Any) -> Value:
    """Velocity is integrated in t or adams; no t or rho interpolation starts at alpha = 0."""
    allowed = f.choices.bases
    name = str(wanted) if wanted in allowed else allowed[0]
    if f["formulation"] == "velocity":
        return name if name in ("t", "adams") else "t" if "t" in allowed else "adams"
    at_pure_noise = f.place.pure_start and f.place.index == 0
    return "lam" if at_pure_noise and name in _INTERPOLATING else name


def _order_parameter(c: StepChoices, i: int) -> Parameter | None:
    top = c.top(i)
    return Parameter(f"order_{i}", "int", 1, top, neutral=1) if top > 1 else None


def _order(f: Settled, wanted: Any) -> Value:
    """Capped by the history, by a start at alpha = 0, by the Adams-Moulton weights (4 points)."""
    c, p = f.choices, f.place
    most = min(1 if wanted is None else round(float(wanted)), p.index + 1)
    order = max((q for q in c.orders if q <= most), default=1)
    if p.clean_end and p.calls == 1:
        order = 1
    if f["basis"] == "adams" and f["corrector"] != "none" and not c.corrector_orders:
        order = min(order, 3)
    if p.pure_start and f["formulation"] != "velocity":
        order = 1 if p.index == 0 else order
        order = min(order, p.index) if f["basis"] in _INTERPOLATING else order
    return order


def _relaxation_parameter(c: StepChoices, i: int) -> Parameter | None:
    if "lam" not in c.bases or c.top(i) == 1 or len(c.relaxations) < 2:
        return None
    return Parameter(f"relaxation_{i}", "choice", choices=c.relaxations, neutral="none")


def _relaxation(f: Settled, wanted: Any) -> Value:
    name = str(wanted)
    idle = (name == "half_second" and f["order"] < 3) or (
        name == "linear" and f["coefficient"] == 0
    )
    return "none" if idle or name not in f.choices.relaxations else name


def _coefficient_parameter(c: StepChoices, i: int) -> Parameter | None:
    if "lam" not in c.bases or c.top(i) == 1 or "linear" not in c.relaxations:
        return None
    return Parameter(f"coefficient_{i}", "float", -c.coefficient_bound, c.coefficient_bound)


def _slope_parameter(c: StepChoices, i: int) -> Parameter | None:
    if "lam" not in c.bases or c.top(i) < 3 or not c.slopes:
        return None
    return Parameter(f"slope_{i}", "int", 0, c.top(i) - 2, neutral=0)


def _slope(points: int, wanted: Any) -> int:
    """Points of a first derivative out of `points`; 0 is all."""
    slope = 0 if wanted is None else round(float(wanted))
    return slope if 1 <= slope <= points - 2 else 0


def _corrector_relaxations(c: StepChoices) -> tuple[Value, ...]:
    return tuple(name for name in CORRECTOR_RELAXATIONS if name in c.relaxations)


def _corrector_relaxation_parameter(c: StepChoices, i: int) -> Parameter | None:
    found = _corrector_relaxations(c)
    if "lam" not in c.bases or not c.corrects or len(found) < 2:
        return None
    return Parameter(f"corrector_relaxation_{i}", "choice", choices=found, neutral="none")


def _corrector_slope_parameter(c: StepChoices, i: int) -> Parameter | None:
    free = c.corrector_orders and c.slopes
    if "lam" not in c.bases or not c.corrects or not free or i == 0:
        return None
    return Parameter(f"corrector_slope_{i}", "int", 0, min(3, i), neutral=0)


def _start_parameter(c: StepChoices, i: int) -> Parameter | None:
    if not c.starts or c.top(i) == 1 or set(c.bases) == {"adams"}:
        return None
    return Parameter(f"start_{i}", "int", 0, min(c.starts, i), neutral=0)


def _oldest_start(f: Settled) -> int:
    """Points back from which the step may start; never the one at alpha = 0."""
    if f["order"] == 1 or f["basis"] == "adams":
        return 0
    return max(0, min(f.choices.starts, f.place.index - f.place.pure_start))


def _start(f: Settled, wanted: Any) -> int:
    return max(0, min(0 if wanted is None else round(float(wanted)), _oldest_start(f)))


def _in_lam(f: Settled) -> bool:
    return bool(f["basis"] == "lam")


def _corrects_in_lam(f: Settled) -> bool:
    return bool(f["corrector"] != "none" and f["basis"] == "lam")


def _formulated(f: Settled) -> bool:
    weighted = any(f[f"weight{k}"] for k in range(f.choices.weights))
    return not f.plain or weighted or (f.place.corrected and f.choices.corrector_orders)


_FIXED: dict[str, Decision] = {
    "order": Decision(
        _order_parameter,
        _order,
        lambda f: True,
        "order",
        "order",
        {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.1},
    ),
    "corrector": Decision(
        _named("corrector", lambda c: c.correctors),
        _corrector,
        lambda f: f.place.calls > 1,
        "corrector",
        "corrector",
        {"none": 0.45, "reuse": 0.45, "reeval": 0.1},
    ),
    "corrector_order": Decision(
        _corrector_order_parameter,
        _corrector_order,
        lambda f: f["corrector"] != "none",
        "corrector_order",
        "corrector",
    ),
    "formulation": Decision(
        _named("formulation", lambda c: c.formulations),
        _formulation,
        _formulated,
        "formulation",
        "formulation",
    ),
    "basis": Decision(
        _named("basis", lambda c: c.bases),
        _basis,
        lambda f: not f.plain,
        "basis",
        "basis",
        {"lam": 0.4, "adams": 0.2, "t": 0.2, "rho": 0.2, "power": 0.2},
    ),
    "relaxation": Decision(
        _relaxation_parameter,
        _relaxation,
        lambda f: f["order"] > 1 and _in_lam(f),
        "relaxation",
        "order",
        {"none": 0.4, "linear": 0.2},
    ),
    "coefficient": Decision(
        _coefficient_parameter,
        lambda f, x: _clip(x or 0.0, -f.choices.coefficient_bound, f.choices.coefficient_bound),
        lambda f: f["order"] > 1 and _in_lam(f) and f["relaxation"] == "linear",
        "relaxation_coefficient",
        "order",
    ),
    "slope": Decision(
        _slope_parameter,
        lambda f, x: _slope(f["order"], x) if f.choices.slopes else 0,
        lambda f: f["order"] > 2 and _in_lam(f),
        "slope_points",
        "order",
    ),
    "corrector_relaxation": Decision(
        _corrector_relaxation_parameter,
        lambda f, x: str(x) if x in _corrector_relaxations(f.choices) else "none",
        _corrects_in_lam,
        "corrector_relaxation",
        "corrector",
    ),
    "corrector_slope": Decision(
        _corrector_slope_parameter,
        lambda f, x: _slope(f["corrector_order"], x) if f.choices.slopes else 0,
        lambda f: _corrects_in_lam(f) and f.choices.corrector_orders and f["corrector_order"] > 2,
        "corrector_slope_points",
        "corrector",
    ),
    "start": Decision(
        _start_parameter,
        _start,
        lambda f: _oldest_start(f) > 0,
        "start",
        "order",
        {0: 0.6, 1: 0.3},
    ),
}


def _extra(name: str, low: float, high: float) -> Decision:
    """A continuous field of `StepSpec` within bounds."""
    default = StepSpec.model_fields[name].default
    neutral = 0.5 * (low + high) if default is None else _clip(default, low, high)

    def first(c: StepChoices) -> int:
        at = EXTRAS[name]
        return c.compensation_order if at is None else at

    def parameter(c: StepChoices, i: int) -> Parameter | None:
        if i < first(c):
            return None
        return Parameter(f"{name}_{i}", "float", low, high, neutral=neutral)

    def matters(f: Settled) -> bool:
        if name == "power":
            return not f.plain and f["basis"] == "power"
        if name == "dt_land":  # the end of the last step is the end time itself
            return f.place.calls > 1
        return f.place.index >= first(f.choices)

    def nearest(f: Settled, wanted: Any) -> Value:
        return neutral if wanted is None else _clip(wanted, low, high)

    return Decision(parameter, nearest, matters, name, name)


def _weight(k: int, bound: float) -> Decision:
    """An extra weight on the output k + 1 calls before the newest."""

    def parameter(c: StepChoices, i: int) -> Parameter | None:
        return Parameter(f"weight{k}_{i}", "float", -bound, bound) if i > k else None

    def nearest(f: Settled, wanted: Any) -> Value:
        return _clip(wanted or 0.0, -bound, bound) if f.place.index > k else 0.0

    return Decision(parameter, nearest, lambda f: f.place.index > k, "", f"weight{k}")
