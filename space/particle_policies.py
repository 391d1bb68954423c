"""Particle schedules that people know by name: the policies of Skreta et al. 2503.02819."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fewstep.space.baselines import grid
from fewstep.space.errors import ScheduleError
from fewstep.space.noise import NoiseSchedule
from fewstep.space.particles import ParticleSchedule

__all__ = ["POLICIES", "named_policies", "policy"]

POLICIES = (
    "target_score",
    "target_score/systematic",
    "target_score/clocks",
    "tempered_noise",
    "tempered_noise/systematic",
    "tempered_noise/clocks",
)


def policy(
    name: str,
    noise: NoiseSchedule,
    times: Sequence[float],
    *,
    b: float = 1.0,
    integrator: str = "euler",
    window: tuple[float, float] | None = None,
) -> ParticleSchedule:
    """The authors' policies as schedules.

    Args:
        name: one of `POLICIES`. "target_score" has zeta = 1 (drift b s); "tempered_noise" has
            zeta = b^(-1/2) (drift (b+1)/2 s). Alone the weights are ignored; "/systematic"
            resamples after every step, "/clocks" has birth-death clocks.
        noise: the noise schedule.
        times: N+1 decreasing times.
        b: the target's annealing exponent, > 0.
        integrator: "euler" as published, or "exponential".
        window: (t_high, t_low), the times within which particles are weighed; None = all.

    Raises:
        ScheduleError: an unknown name, or b that is not positive.

    References:
        Skreta et al. 2503.02819, propositions 3.1 to 3.3 and algorithm 1; the a-family of the
        released code: zeta^2 = (b + 2a(1-b))/b with a = 0 and a = 1/2.
    """
    if name not in POLICIES:
        raise ScheduleError(f"policy {name!r} is unknown: use one of {', '.join(POLICIES)}")
    if not (b > 0 and math.isfinite(b)):
        raise ScheduleError(f"b {b} must be a positive number")
    move, _, rule = name.partition("/")
    weights = {
        "": {"weight": "none"},
        "systematic": {"resample": "always"},
        "clocks": {"resample": "clocks"},
    }[rule]
    zeta = 1.0 if move == "target_score" else b**-0.5
    schedule = ParticleSchedule.uniform(noise, times, zeta=zeta, **weights)
    schedule = schedule.model_copy(
        update={"integrator": integrator, "provenance": {"policy": name}}
    )
    return schedule if window is None else schedule.window(*window)


def named_policies(
    noise: NoiseSchedule, nfe: int, *, b: float = 1.0, paths: bool = False
) -> dict[str, ParticleSchedule]:
    """The authors' policies on three grids with both integrators, "policy/grid/integrator".

    Beside them stands "+ess": resampling where the effective sample size is below one half, and
    where asked for "+path" to each: a reward weighed by its path. What a noise schedule does not
    allow is left out, and so is a sampler already named.

    Args:
        noise: the noise schedule.
        nfe: steps, >= 1.
        b: the target's exponent, for the tempered policies.
        paths: whether the target has a reward that can be weighed in both ways.
    """
    found: dict[str, ParticleSchedule] = {}
    for kind in ("logsnr", "edm", "time"):
        for integrator in ("euler", "exponential"):
            for name in POLICIES:
                try:
                    times = grid(noise, nfe, kind)
                    made = policy(name, noise, times, b=b, integrator=integrator)
                    made = ParticleSchedule.from_dict(made.to_dict())  # checked with this one
                except ScheduleError:
                    continue
                found[f"{name.replace('/', '+')}/{kind}/{integrator}"] = made
                if name.endswith("systematic"):
                    half = tuple(s.model_copy(update={"resample": "ess"}) for s in made.steps)
                    other = f"{name.partition('/')[0]}+ess"
                    made = made.model_copy(update={"steps": half, "provenance": {"policy": other}})
                    found[f"{other}/{kind}/{integrator}"] = made
    if paths:
        found |= {
            name.replace("/", "+path/", 1): made.model_copy(update={"reward_weight": "path"})
            for name, made in found.items()
        }
    first: dict[str, str] = {}
    for name, made in found.items():
        first.setdefault(made.digest, name)
    return {name: made for name, made in found.items() if first[made.digest] == name}
