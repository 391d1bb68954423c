"""Schedules for weighted particles: noise scale, resampling and weights of every step.

K particles follow one stochastic differential equation towards a target made of several models,
and carry weights for what the equation alone gets wrong (Feynman-Kac correctors, Skreta et al.
2503.02819). The weights do not depend on the noise scale zeta, so zeta is a free number per step
(0: the probability-flow ODE), as are the rule of resampling and the quadrature of the weights.
Frame: rho = sigma/alpha, lam = -log rho; a step goes from times[i] to times[i+1]. The target
itself (which models, which exponents, which reward) is no part of the schedule; see
`samplers.targets`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule, noise_to_dict
from fewstep.space.schedule import FORMAT, LOADERS, VERSION, Frozen, OdeSchedule, Timed

__all__ = ["ParticleSchedule", "ParticleStep", "ramp_share"]


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ScheduleError(message)


def ramp_share(noise: NoiseSchedule, times: Sequence[float], scale: float) -> list[float]:
    """Share of a reward's strength at some times, 1/(1 + (rho/scale)^2), rho = sigma/alpha.

    For data N(0, scale^2 I) the best guess of the data given the noisy y = x/alpha is this share
    times y. So a reward b r with r linear, at strength share * b on y, makes the target of every
    time exactly the noised law of the tilted data; at full strength it would ask noise of size
    rho for a shift of order rho^2.

    Args:
        noise: the noise schedule.
        times: any times of it.
        scale: the data's standard deviation, > 0; inf gives shares of 1.
    """
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    shares: list[float] = (alpha**2 / (alpha**2 + (sigma / scale) ** 2)).tolist()
    return shares if math.isfinite(scale) else [1.0] * len(shares)


class ParticleStep(Frozen):
    """One step t -> t_next of every particle. Neutral values in brackets.

    Args:
        zeta: noise scale, >= 0; 0 is the ODE, 1 the reverse SDE [0]. Unused with a solver.
        resample: what happens after the step: "never"; "always"; "ess", if the effective sample
            size falls below `ess` times K; "clocks", birth-death clocks ["never"].
        ess: threshold of "ess", a share of K in (0, 1] [0.5].
        weight: quadrature of the step's weight over the base gap lam..lam_next: "left" (the rate
            per rho^2 is held, as published; finite on clean data), "trapezoid" (in lam, no
            further call: the next step's is used; "left" where there is none), "none" (outside
            the active window: nothing is weighed) ["left"].
        b: strength of the target during this step; None = the target's own, which for a reward
            may ramp [None]. A change from step to step is a jump of the target and needs the
            models' densities; the strength of a reward changes without any.
    """

    zeta: float = 0.0
    resample: Literal["never", "always", "ess", "clocks"] = "never"
    ess: float = 0.5
    weight: Literal["left", "trapezoid", "none"] = "left"
    b: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _need(self.zeta >= 0, f"zeta {self.zeta} is below 0: use 0 for the ODE")
        _need(0 < self.ess <= 1, f"ess {self.ess} is outside (0, 1]: it is a share of K")
        return self

    def canonical(self, *, solver: bool) -> list[object]:
        """The choices that change a sample, floats to 12 digits."""
        ess = f"{self.ess:.11e}" if self.resample == "ess" else ""
        b = "" if self.b is None else f"{self.b:.11e}"
        return [
            "" if solver else f"{self.zeta:.11e}",
            self.resample,
            ess,
            self.weight,
            b,
        ]


class ParticleSchedule(Timed):
    """A complete schedule for weighted particles.

    Args:
        noise: the noise schedule of every model (a `NoiseSchedule` or its JSON form).
        times: N+1 strictly decreasing times, as in `OdeSchedule`.
        steps: N steps.
        integrator: "exponential" (exact while the data prediction stands still) or "euler"
            (Euler-Maruyama in rho^2, as published).
        solver: an `OdeSchedule` on the same times whose compiled program moves the particles
            instead (eta > 0 is churn); one call per step, no shifts, no own guidance.
        reward_weight: how a reward on the state is weighed: "gradient" integrates the gradient of
            r over a step by the step's quadrature; "path" weighs the change of r and the
            likelihood ratio of the step, with the noise the step drew (Girsanov), needs no
            derivative and is exact for steps of any length. Only where the target leaves the
            choice: a reward without a gradient, or on the data prediction, is always
            weighed by its path ["gradient"].
        ramp: the scale by which a reward's strength rises in steps whose b is None
            (`ramp_share`), in data units, > 0; None = the target's own [None].
        provenance: where the schedule comes from; free JSON, no part of the digest.
    """

    kind: Literal["particles"] = "particles"
    steps: tuple[ParticleStep, ...]
    integrator: Literal["exponential", "euler"] = "exponential"
    solver: OdeSchedule | None = None
    reward_weight: Literal["gradient", "path"] = "gradient"
    ramp: float | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_times(len(self.steps))
        _need(self.ramp is None or self.ramp > 0, f"ramp {self.ramp} must be above 0, or null")
        if any(step.resample == "clocks" for step in self.steps):
            for i, step in enumerate(self.steps):
                _need(
                    step.resample == "clocks"
                    or (step.resample == "never" and step.weight == "none"),
                    f"step {i}: 'clocks' keep all weights equal: use clocks in every step, or "
                    "weight none and resample never outside the window",
                )
        if self.integrator == "euler" and self.solver is None:
            alpha = float(self.noise.alpha(torch.tensor(self.times[0], dtype=torch.float64)))
            _need(alpha > 0, "integrator euler cannot start where alpha is 0: lower times[0]")
        if self.solver is not None:
            self._check_solver(self.solver)
        return self

    def _check_solver(self, solver: OdeSchedule) -> None:
        _need(solver.noise == self.noise, "solver.noise is not the schedule's noise")
        _need(solver.times == self.times, "solver.times are not the schedule's times")
        _need(
            solver.nfe == self.n_steps and solver.first == "network",
            f"solver makes {solver.nfe} calls in {self.n_steps} steps: use one call per step",
        )
        _need(not solver.options, "solver.options are not for particles: remove them")
        for i, step in enumerate(solver.steps):
            shifted = any((step.dt_query, step.dt_start, step.dt_land))
            _need(not shifted, f"solver step {i} is shifted: particles need dt_* = 0")
            _need(step.guidance is None, f"solver step {i} sets guidance: the target does that")
            _need(self.steps[i].zeta == 0, f"step {i}: zeta is unused with a solver, use its eta")

    @property
    def n_steps(self) -> int:
        """Number of steps N."""
        return len(self.steps)

    @property
    def nfe(self) -> int:
        """Network calls per particle and model."""
        return len(self.steps)

    @cached_property
    def digest(self) -> str:
        """Hash of what the sampler does: equal digests are equal samplers."""
        found = [
            self.kind,
            noise_to_dict(self.noise),
            [f"{t:.11e}" for t in self.times],
            [step.canonical(solver=self.solver is not None) for step in self.steps],
            self.integrator if self.solver is None else self.solver.digest,
        ]
        if self.reward_weight != "gradient":
            found.append(self.reward_weight)
        if self.ramp is not None and any(step.b is None for step in self.steps):
            found.append(f"ramp {self.ramp:.11e}")
        text = json.dumps(found, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @classmethod
    def uniform(cls, noise: NoiseSchedule, times: Sequence[float], **choices: Any) -> Self:
        """The same choices (fields of `ParticleStep`) in every step."""
        step = ParticleStep(**choices)
        return cls(noise=noise, times=tuple(times), steps=(step,) * (len(times) - 1))

    def every(self, k: int) -> Self:
        """A copy that resamples after every k-th step that weighs, and at no other.

        Raises:
            ScheduleError: k below 1.
        """
        _need(k >= 1, f"every {k} steps: use 1 or more")
        count, steps = 0, []
        for step in self.steps:
            count += step.weight != "none"
            due = step.weight != "none" and count % k == 0
            steps.append(step.model_copy(update={"resample": "always" if due else "never"}))
        return self.model_copy(update={"steps": tuple(steps)})

    def window(self, t_high: float, t_low: float) -> Self:
        """A copy that weighs and resamples only in steps within t_low <= t <= t_high."""
        steps = [
            step
            if t <= t_high and t_next >= t_low
            else step.model_copy(update={"weight": "none", "resample": "never"})
            for step, (t, t_next) in zip(self.steps, pairwise(self.times), strict=True)
        ]
        return self.model_copy(update={"steps": tuple(steps)})

    def late(self, t_on: float) -> Self:
        """A copy whose target is switched on at a time: b = 0 in every step that starts above it.

        For hard constraints, which kill every particle while the states are noise. Steps from
        `t_on` on keep their b.

        Args:
            t_on: a time above the last one.

        Raises:
            ScheduleError: a time at which nothing is left to switch on.
        """
        _need(t_on > self.times[-1], f"t_on {t_on} is not above the last time {self.times[-1]}")
        steps = [
            step.model_copy(update={"b": 0.0}) if t > t_on else step
            for step, t in zip(self.steps, self.times[:-1], strict=True)
        ]
        return self.model_copy(update={"steps": tuple(steps)})

    def to_dict(self) -> dict[str, Any]:
        """The file form: format, version, choices that differ from neutral, provenance."""
        steps = [
            {"zeta": step.zeta, "resample": step.resample, "weight": step.weight}
            | step.model_dump(mode="json", exclude_defaults=True)
            for step in self.steps
        ]
        found = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "nfe": self.nfe,
            "noise": noise_to_dict(self.noise),
            "times": list(self.times),
            "steps": steps,
            "integrator": self.integrator,
            "solver": None if self.solver is None else self.solver.to_dict(),
        }
        if self.reward_weight != "gradient":
            found["reward_weight"] = self.reward_weight
        if self.ramp is not None:
            found["ramp"] = self.ramp
        return found | {"provenance": self.provenance}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ParticleSchedule:
        """Read the file form.

        Raises:
            ScheduleError: a missing or unknown field, or choices that make no sense.
        """
        body = {k: v for k, v in data.items() if k not in ("format", "version", "nfe")}
        for field in ("noise", "times", "steps"):
            _need(field in body, f"{field} is missing from the schedule file")
        _need(isinstance(body["steps"], list), "steps must be a list of objects")
        body["steps"] = tuple(_step(i, step) for i, step in enumerate(body["steps"]))
        if body.get("solver") is not None:
            _need(isinstance(body["solver"], dict), "solver must be an ode schedule or null")
            body["solver"] = OdeSchedule.from_dict(body["solver"])
        schedule = cls(**body)
        nfe = data.get("nfe", schedule.nfe)
        _need(nfe == schedule.nfe, f"nfe is {nfe} in the file but it has {schedule.nfe} steps")
        return schedule


def _step(i: int, data: object) -> ParticleStep:
    if not isinstance(data, dict):
        raise ScheduleError(f"steps[{i}] is {data!r}: an object is needed")
    try:
        return ParticleStep(**data)
    except ScheduleError as error:
        raise ScheduleError(f"step {i}: {error}") from None


LOADERS["particles"] = ParticleSchedule.from_dict
