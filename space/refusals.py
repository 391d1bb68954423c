"""Why a step is outside a space: the rules of `StepChoices.settle`, written a second time.

`settle` makes steps that keep the rules, `refuses` finds steps that break them; neither calls the
other, so each checks the other (a member's canonical form must be the same sampler).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.space.schedule import StepSpec

if TYPE_CHECKING:
    from fewstep.space.step_choices import Place, StepChoices

_INTERPOLATING = ("t", "rho", "power")


def refuses(choices: StepChoices, step: StepSpec, place: Place) -> str | None:
    """Why a step is outside the choices, or None.

    Args:
        choices: the decisions left open.
        step: the step.
        place: where it stands.
    """
    if step.order not in choices.orders:
        return f"order {step.order} is not among {choices.orders}"
    if step.corrector not in choices.correctors:
        return f"corrector {step.corrector!r} is not among {choices.correctors}"
    return (
        _formulation(choices, step, place)
        or _basis(choices, step, place)
        or (_corrector(choices, step, place) if step.corrector != "none" else None)
        or (_scalings(choices, step) if step.order > 1 and step.basis == "lam" else None)
        or (_start(choices, step, place) if step.start > 0 else None)
        or _numbers(choices, step)
    )


def _formulation(choices: StepChoices, step: StepSpec, place: Place) -> str | None:
    named = f"formulation {step.formulation!r}"
    if step.order > 1 or step.corrector != "none" or any(step.weights):
        listed = step.formulation in choices.formulations
        return None if listed else f"{named} is not among {choices.formulations}"
    if not place.corrected:  # DDIM in data and in noise; Euler in velocity
        euler = step.formulation == "velocity"
        return f"{named} of a step of order 1 is not searched" if euler else None
    if not choices.corrector_orders and step.formulation != "data":
        return f"{named} of a step of order 1 after a reuse corrector is not open"
    if choices.corrector_orders and step.formulation not in choices.formulations:
        return f"{named} is not among {choices.formulations}"
    return None


def _basis(choices: StepChoices, step: StepSpec, place: Place) -> str | None:
    if step.order == 1 and step.corrector == "none":
        return None
    if step.basis not in choices.bases:
        return f"basis {step.basis!r} is not among {choices.bases}"
    if step.formulation == "velocity":
        apart = step.basis not in ("t", "adams")
        return f"formulation velocity has no basis {step.basis}" if apart else None
    if place.pure_start and step.basis in _INTERPOLATING:
        if place.index == 0:
            return f"basis {step.basis} cannot start at alpha = 0"
        if step.order > place.index:
            return f"order {step.order} in basis {step.basis} reaches alpha = 0"
    return None


def _corrector(choices: StepChoices, step: StepSpec, place: Place) -> str | None:
    points, fewer = step.points_corrector, step.corrector_slope_points
    if points != step.order + 1 and not choices.corrector_orders:
        return f"corrector_order {step.corrector_order} is not order + 1"
    if step.basis == "adams" and points > 4:
        return "the adams basis has no corrector of 5 points"
    interpolates = step.basis in _INTERPOLATING and step.formulation != "velocity"
    if place.pure_start and interpolates and points > place.index + 1:
        return f"a corrector of {points} points in basis {step.basis} reaches alpha = 0"
    if step.basis != "lam":
        return None
    name = step.corrector_relaxation
    if name not in ("none", "bh1", "bh2") or name not in choices.relaxations:
        return f"corrector_relaxation {name!r} is not open"
    if fewer is not None and fewer < points - 1 and not choices.corrector_orders:
        return f"corrector_slope_points {fewer} is not open"
    if fewer is not None and fewer < points - 1 and not choices.slopes:
        return "corrector_slope_points is not open: slopes is false"
    return None


def _scalings(choices: StepChoices, step: StepSpec) -> str | None:
    if step.relaxation not in choices.relaxations:
        return f"relaxation {step.relaxation!r} is not among {choices.relaxations}"
    c, bound = step.relaxation_coefficient, choices.coefficient_bound
    if step.relaxation == "linear" and abs(c) > bound:
        return f"relaxation_coefficient={c} is beyond {bound}"
    if step.slope_points is not None and step.slope_points < step.order - 1 and not choices.slopes:
        return "slope_points is not open"
    return None


def _start(choices: StepChoices, step: StepSpec, place: Place) -> str | None:
    if step.start > choices.starts:
        return f"start {step.start} is beyond starts = {choices.starts}"
    if step.order == 1:
        return f"start {step.start} with order 1 leaves the newest output unused"
    if step.basis == "adams":
        return f"start {step.start} has no adams weights"
    if place.pure_start and step.start == place.index:
        return f"start {step.start} is the point at alpha = 0"
    return None


def _numbers(choices: StepChoices, step: StepSpec) -> str | None:
    plain = StepSpec()
    for name in ("tableau", "eta"):
        if getattr(step, name) != getattr(plain, name):
            return f"{name} is {getattr(step, name)!r}, which is not searched"
    bounds = {name: (low, high) for name, low, high in choices.extras}
    for name in ("compensation", "dt_query", "dt_start", "dt_land", "guidance"):
        value, neutral = getattr(step, name), getattr(plain, name)
        low, high = bounds.get(name, (neutral, neutral))
        if value != neutral and (name not in bounds or not low <= value <= high):
            return f"{name} {value} is not open or outside its bounds"
    bound = choices.weights_bound
    if len(step.weights) > choices.weights or any(abs(w) > bound for w in step.weights):
        return f"weights {step.weights} are not open or outside +-{bound}"
    return None
