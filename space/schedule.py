"""Solver schedules: WHAT a sampler does, as frozen, validated values with a versioned JSON form.

An `OdeSchedule` is a noise schedule, N+1 decreasing times and one `StepSpec` per step. Its meaning
is the `Program` it compiles to (`space.program`). The file holds both: the choices for people, the
program for samplers. Every field of a step has a neutral value at which the program equals the
plain solver's bit for bit. Nothing that is loaded here can execute code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from fewstep.space.base import FORMAT, VERSION, Frozen, Replayable, Timed, require_nfe
from fewstep.space.coefficients import RELAXATIONS, TABLEAUS
from fewstep.space.errors import ScheduleError, need
from fewstep.space.noise import noise_to_dict

if TYPE_CHECKING:
    from fewstep.space.program import Program

__all__ = [
    "FORMAT",
    "LOADERS",
    "VERSION",
    "Frozen",
    "OdeSchedule",
    "StepSpec",
    "Timed",
]


class StepSpec(Frozen):
    """One step t -> t_next. Neutral values in brackets.

    Args:
        order: points used by the predictor, 1..4; needs order - 1 older points (DPM-Solver++ 2M:
            2).
        formulation: variable of the ODE the step integrates: "data", "noise" or "velocity".
        basis: variable of the interpolation: "lam" (exponential integrators), "t" (DEIS tAB),
            "rho" (DEIS rhoAB), "power" (rho ** power), "adams" (uniform-grid Adams weights,
            iPNDM), or, for a tableau only, "label" ("t", the level of a stage between two
            training steps being that of the lower one, as PNDM's code has it).
        power: exponent of the "power" basis; 1 is "rho", towards 0 it tends to "lam".
        relaxation: factor on the first derivative in the lam basis ["none"]: "bh1", "bh2" (UniPC's
            B(h)), "exp", "minus_exp", "linear" (1 + coefficient * h); "half_second" halves the
            second derivative (DPM-Solver++ 3M).
        relaxation_coefficient: c of "linear" [0], per unit of lam.
        slope_points: points used for the FIRST derivative, 1..order-1, nearest first [all].
        start: which history point the step starts from, 0 = newest [0]; > 0 makes singlestep
            methods.
        tableau: an explicit Runge-Kutta method instead of history (see `coefficients.TABLEAUS`)
            [None]; its stages are placed in the basis variable: "rho" is DEIS rhoRK, "t" PNDM's
            pseudo Runge-Kutta.
        corrector: "none"; "reuse" (UniC: corrects the state, keeps the network value, +0 calls);
            "reeval" (+1 call).
        corrector_order: points used by the corrector, the new one included [order + 1].
        corrector_relaxation: as `relaxation`, for the corrector ["none"].
        corrector_slope_points: as `slope_points`, for the corrector, the new point included [all].
        weights: extra weights on older outputs, newest first, in units of the step's DDIM weight;
            the newest output loses their sum, so constants stay exact [()].
        compensation: DC-Solver's ratio: the newest output is replaced for good by its
            interpolation at compensation * t + (1 - compensation) * t_previous [1]; needs
            `compensation_order` older points.
        dt_query: time told to the network minus the nominal time, in model time [0].
        dt_start: time whose (alpha, sigma) the step takes its start state to have, minus nominal
            [0].
        dt_land: time the step lands on, minus the nominal next time [0].
        eta: share of fresh noise, 0..1 [0]; 1 with order 1 is the DDPM ancestral step.
        guidance: guidance scale of this step's network call, None = as the caller gives [None].
    """

    order: int = 1
    formulation: Literal["data", "noise", "velocity"] = "data"
    basis: Literal["lam", "t", "rho", "power", "adams", "label"] = "lam"
    power: float = 1.0
    relaxation: str = "none"
    relaxation_coefficient: float = 0.0
    slope_points: int | None = None
    start: int = 0
    tableau: str | None = None
    corrector: Literal["none", "reuse", "reeval"] = "none"
    corrector_order: int | None = None
    corrector_relaxation: str = "none"
    corrector_slope_points: int | None = None
    weights: tuple[float, ...] = ()
    compensation: float = 1.0
    dt_query: float = 0.0
    dt_start: float = 0.0
    dt_land: float = 0.0
    eta: float = 0.0
    guidance: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        need(1 <= self.order <= 4, f"order {self.order} is outside 1..4")
        need(self.start >= 0, f"start {self.start} must be 0 (newest) or more")
        need(0 <= self.eta <= 1, f"eta {self.eta} is outside 0..1")
        for name in (self.relaxation, self.corrector_relaxation):
            need(
                name in RELAXATIONS,
                f"relaxation {name!r} is unknown: use one of {', '.join(RELAXATIONS)}",
            )
        if self.tableau is not None:
            need(
                self.tableau in TABLEAUS,
                f"tableau {self.tableau!r} is unknown: use one of {', '.join(TABLEAUS)}",
            )
            need(
                self.order == 1 and self.corrector == "none",
                "a tableau step takes order 1 and no corrector",
            )
            need(
                self.basis in ("lam", "rho", "t", "label"),
                "a tableau step places its stages in basis lam, rho, t or label",
            )
        need(
            self.basis != "label" or self.tableau is not None,
            "basis label places the stages of a tableau: use basis t",
        )
        if self.slope_points is not None:
            need(self.order > 1, "slope_points needs order 2 or more")
            need(
                1 <= self.slope_points < self.order,
                f"slope_points {self.slope_points} must lie in 1..order-1",
            )
        if self.corrector_order is not None:
            need(self.corrector != "none", "corrector_order is given but corrector is none")
            need(
                2 <= self.corrector_order <= 5,
                f"corrector_order {self.corrector_order} is outside 2..5",
            )
        if self.corrector_slope_points is not None:
            top = self.points_corrector - 1
            need(self.corrector != "none", "corrector_slope_points is given but corrector is none")
            need(
                1 <= self.corrector_slope_points <= top,
                f"corrector_slope_points {self.corrector_slope_points} must lie in 1..{top}",
            )
        need(self.eta == 0 or self.corrector == "none", "a step with eta > 0 takes no corrector")
        need(self.basis != "power" or self.power > 0, f"power {self.power} must be positive")
        return self

    @property
    def points_corrector(self) -> int:
        """Order of the corrector: outputs it uses, the new one included."""
        return self.corrector_order or self.order + 1

    def with_history(self, older: int, compensation_order: int) -> StepSpec:
        """The step where it has only `older` points before the newest.

        Order, corrector, start, weights and compensation are capped by them.
        """
        order = min(self.order, older + 1)
        changes: dict[str, Any] = {"order": order, "start": min(self.start, older)}
        changes["weights"] = self.weights[:older]
        if self.slope_points is not None and self.slope_points >= order:
            changes["slope_points"] = None
        if self.corrector != "none":
            changes["corrector_order"] = min(self.points_corrector, older + 2)
            changes["corrector_slope_points"] = None
        if older < compensation_order:
            changes["compensation"] = 1.0
        return self.model_copy(update=changes)


class OdeSchedule(Timed, Replayable):
    """A complete solver schedule for an ODE (or, with eta > 0, ancestral) sampler.

    Args:
        noise: the noise schedule the times belong to (a `NoiseSchedule` or its JSON form).
        times: N+1 strictly decreasing times, times[0] <= noise's first time, times[N] >= the time
            of clean data.
        steps: N steps.
        first: "network"; or the analytical first step, which replaces the first call: "mean" (D =
            the constant image m), "zero" (D = 0), "usf_zero" (eps = x as USF released it; kept to
            replay published files).
        compensation_order: polynomial degree K of the compensation's interpolation, 1..3.
        compensation_variable: "t" as published, or "lam".
        shift_keeps: which output of a shifted query is carried to the nominal time, "eps" or "x0".
        options: named run-time options that are not linear, e.g. {"threshold": {...}} (see
            `samplers.ode`).
        provenance: where the schedule comes from; free JSON, not part of equality of programs.
    """

    kind: Literal["ode"] = "ode"
    steps: tuple[StepSpec, ...]
    first: Literal["network", "mean", "zero", "usf_zero"] = "network"
    compensation_order: int = 2
    compensation_variable: Literal["t", "lam"] = "t"
    shift_keeps: Literal["eps", "x0"] = "eps"

    @model_validator(mode="after")
    def _check(self) -> Self:
        n = len(self.steps)
        self._check_times(n)
        need(
            1 <= self.compensation_order <= 3,
            f"compensation_order {self.compensation_order} is outside 1..3",
        )
        for i, step in enumerate(self.steps):
            self._check_history(i, step, last=i == n - 1)
        return self

    def _check_history(self, i: int, step: StepSpec, *, last: bool) -> None:
        for order, what in (
            (step.order, "order"),
            (step.points_corrector - 1 if step.corrector != "none" else 1, "corrector"),
        ):
            need(
                order <= i + 1,
                f"step {i} asks for {what} {order if what == 'order' else order + 1} but has "
                f"{i + 1} point{'s' if i else ''} of history: use order <= {i + 1}"
                f"{'' if what == 'order' else f', corrector_order <= {i + 2}'}",
            )
        need(
            step.start <= i,
            f"step {i}: start {step.start} points before the first of {i + 1} points",
        )
        need(
            len(step.weights) <= i,
            f"step {i}: {len(step.weights)} extra weights for {i} older points",
        )
        need(
            step.compensation == 1.0 or i >= self.compensation_order,
            (
                f"step {i}: compensation {step.compensation} needs {self.compensation_order} "
                f"older points: it is 1 before step {self.compensation_order}"
            ),
        )
        need(
            not (last and step.corrector == "reuse"),
            f"step {i} is the last: a reuse corrector there has no call to reuse",
        )
        need(
            not (last and step.corrector == "reeval" and self.times[-1] <= self.noise.t_data),
            (
                f"step {i} lands on clean data, where the network cannot be asked: corrector must "
                "be none"
            ),
        )
        need(
            i > 0 or step.tableau is None or self.first == "network",
            "step 0 is a tableau step: first must be 'network'",
        )

    @property
    def nfe(self) -> int:
        """Network calls, counted from the choices (the compiled program has as many rows)."""
        calls = 0 if self.first == "network" else -1
        for step in self.steps:
            calls += 1
            if step.tableau is not None:
                calls += len(TABLEAUS[step.tableau].c) - 1
            if step.corrector == "reeval":
                calls += 1
        return calls

    @property
    def start(self) -> float:
        """The time that x_T belongs to: the first of `times`."""
        return self.times[0]

    @property
    def end(self) -> float:
        """The time that the sample belongs to: the last of `times`."""
        return self.times[-1]

    @property
    def uses_constant(self) -> bool:
        """Whether the schedule starts from a constant image."""
        return self.first == "mean"

    @property
    def n_steps(self) -> int:
        """Number of transitions t_i -> t_{i+1}."""
        return len(self.steps)

    @cached_property
    def program(self) -> Program:
        """The compiled program (computed once)."""
        from fewstep.space.program import compile

        return compile(self)

    def tail(self, k: int) -> Self:
        """The schedule from step k on, for a start in the middle (image to image).

        Orders, correctors, weights and compensation are capped by the new, shorter history; an
        analytical first step is behind.

        Raises:
            ScheduleError: k is not a step.
        """
        need(0 <= k < self.n_steps, f"step {k} is not one of {self.n_steps}")
        if k == 0:
            return self
        steps = [
            step.with_history(i, self.compensation_order) for i, step in enumerate(self.steps[k:])
        ]
        changes = {"times": self.times[k:], "steps": tuple(steps), "first": "network"}
        return self.model_copy(update=changes)

    def to_dict(self) -> dict[str, Any]:
        """The file form: format, version, non-neutral choices, program, provenance."""
        steps = []
        for step in self.steps:
            kept = step.model_dump(mode="json", exclude_defaults=True)
            steps.append(
                {"order": step.order, "formulation": step.formulation, "corrector": step.corrector}
                | kept
            )
        extra = self.model_dump(
            mode="json",
            exclude_defaults=True,
            include={
                "first",
                "compensation_order",
                "compensation_variable",
                "shift_keeps",
                "options",
            },
        )
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "nfe": self.nfe,
            "noise": noise_to_dict(self.noise),
            "times": list(self.times),
            "steps": steps,
            **extra,
            "program": self.program.to_dict(),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OdeSchedule:
        """Read the file form and check that `program` is what `steps` compile to, to 1e-9.

        Raises:
            ScheduleError: what is missing, unknown, out of range or has no program; it is named.
        """
        body = {k: v for k, v in data.items() if k not in ("format", "version", "nfe", "program")}
        for field in ("noise", "times", "steps"):
            need(field in body, f"{field} is missing from the schedule file")
        steps = body["steps"]
        need(isinstance(steps, list), f"steps is {steps!r}: a list of steps is needed")
        body["steps"] = tuple(_step(i, s) for i, s in enumerate(steps))
        schedule = cls(**body)
        if "nfe" in data:
            require_nfe(data["nfe"], schedule.nfe, "steps")
        compiled = schedule.program  # choices without a program are refused here, not later
        if data.get("program") is not None:
            type(compiled).from_dict(data["program"]).require_equal(compiled)
        return schedule


def _step(i: int, data: object) -> StepSpec:
    need(isinstance(data, dict), f"steps[{i}] is {data!r}: an object is needed")
    try:
        return StepSpec(**data)  # type: ignore[arg-type]
    except ScheduleError as error:
        raise ScheduleError(f"step {i}: {error}") from None


LOADERS: dict[str, Callable[[dict[str, Any]], Any]] = {"ode": OdeSchedule.from_dict}
