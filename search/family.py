"""What a kind of schedules, which the problem decides, changes in a study: settings and space."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fewstep.predictors.yardstick import Statistic
from fewstep.samplers import AnyProblem, MaskedProblem, ParticleProblem, Problem
from fewstep.samplers.prices import priced
from fewstep.search.config import StudyConfig
from fewstep.space.costs import Prices
from fewstep.space.domain import OdeDomain
from fewstep.space.errors import ScheduleError, StudyError, blamed
from fewstep.space.masked_domain import MaskedDomain
from fewstep.space.particle_domain import ParticleDomain
from fewstep.space.plans import PlanDomain
from fewstep.space.step_choices import StepChoices

_TEACHERS = ("teacher", "refine", "compensation", "cpr", "prices")
"""Tables of studies with a teacher."""


def settled(config: StudyConfig, problem: AnyProblem) -> StudyConfig:
    """The study with what it leaves open filled in.

    Without a teacher the score is the problem's, and nothing is refined.

    Raises:
        StudyError: a setting that this kind does not have.
    """
    if isinstance(problem, Problem):
        name = config.objective.name or "endpoint_mse"
        if problem.plain_start:
            plain = config.refine.model_copy(update={"mean": False})
            config = config.model_copy(update={"refine": plain})
        return _with_objective(config, name, "geometric" if name == "endpoint_mse" else "mean")
    own, kind = problem.objective, type(problem).__name__
    if config.search.race and problem.score is not None:
        raise StudyError(f"search.race compares sample by sample, which {own} cannot: remove race")
    if config.search.guidance is not None:
        raise StudyError(f"search.guidance: a {kind} has no guidance scale: leave it out")
    for table in _TEACHERS:
        if table in config.model_fields_set:
            raise StudyError(f"{table}: a {kind} has no teacher to match: remove the table")
    if config.finish is not None:
        if "strategy" in config.search.model_fields_set:
            done = "refined" if config.finish == "refine" else "compensated"
            raise StudyError(
                f"search.strategy {config.search.strategy}: schedules of kind {problem.kind!r} "
                f"cannot be {done}: use {config.base_strategy or 's3'}"
            )
        search = config.search.model_copy(update={"strategy": config.base_strategy or "s3"})
        config = config.model_copy(update={"search": search})
    return _with_objective(config, own, "mean")


def readable(config: StudyConfig, problem: AnyProblem) -> dict[str, Any]:
    """The settled study as it is written down: it reads back."""
    absent = () if problem.has_teacher else _TEACHERS
    data = {k: v for k, v in config.resolved().items() if k not in absent}
    if config.objective.name != "endpoint_mse":
        data["objective"].pop("statistic")
    return data


def domain_of(config: StudyConfig, problem: AnyProblem, nfe: int) -> Any:
    """The search space of the study's [space] at a number of calls, or a cost.

    Keys are fields of the domain (of an `OdeDomain` those of its `StepChoices` too) that the
    problem does not settle.

    Raises:
        StudyError: an unknown key or a space without members; one line.
    """
    if isinstance(problem, MaskedProblem):
        return _masked(config, problem, nfe)
    if isinstance(problem, ParticleProblem):
        return _particles(config, problem, nfe)
    steps = {f.name for f in dataclasses.fields(StepChoices)}
    ours = _open(OdeDomain, "noise", "nfe", "choices", "constant")
    with blamed("space", ScheduleError, TypeError):
        if config.search.cost:
            return _plans(config, problem, nfe)
        values = _values(config.space, ours | steps)
        choices = StepChoices(**{k: v for k, v in values.items() if k in steps})
        mine = {k: v for k, v in values.items() if k in ours}
        return OdeDomain(problem.denoiser.noise, nfe, choices=choices, **mine)


def _plans(config: StudyConfig, problem: Problem, cost: int) -> PlanDomain:
    """The plans of a cost; the model's networks and guidance are open, stages are not."""
    settled = ("noise", "cost", "prices", "scale")
    prices = priced(Prices(**config.prices.listed), problem)
    scale = None if problem.guidance in (None, 1) else problem.guidance
    found = {"networks": ["", *prices.networks]} | config.space
    values = _values(found, _open(PlanDomain, *settled))
    return PlanDomain(problem.denoiser.noise, cost, prices, scale, **values)


def _masked(config: StudyConfig, problem: MaskedProblem, nfe: int) -> MaskedDomain:
    """With a target, of what it weighs."""
    keys = _open(MaskedDomain, "length", "nfe", "noise", "curve")
    if problem.target is not None:
        keys &= {"positions", "temperature"}
    values = _values(config.space, keys)
    with blamed("space", ScheduleError, TypeError):
        return MaskedDomain(problem.free, nfe, **problem.settled, **values)


def _particles(config: StudyConfig, problem: ParticleProblem, nfe: int) -> ParticleDomain:
    settled = ("noise", "nfe", "own", "own_ramp", "rewarded")
    values, target = _values(config.space, _open(ParticleDomain, *settled)), problem.target
    if values.get("strength") is not None and target.reward is None:
        for i, factor in enumerate(target.factors):
            if factor.log_density is None:
                raise StudyError(f"space.strength needs log_density of model {i}: give it")
    if len(values.get("reward_weight", ())) > 1 and not problem.two_ways:
        raise StudyError(
            "space.reward_weight: only a reward on the state that its gradient guides can be "
            "weighed in two ways: leave it out"
        )
    own: dict[str, Any] = {"own": target.strength, "own_ramp": target.ramp}
    own["rewarded"] = target.reward is not None
    with blamed("space", ScheduleError, TypeError):
        return ParticleDomain(target.noise, nfe, **own, **values)


def _with_objective(config: StudyConfig, name: str, statistic: Statistic) -> StudyConfig:
    """The study with its objective's name, and its statistic where it names none."""
    changes = {"name": name, "statistic": config.objective.statistic or statistic}
    return config.model_copy(update={"objective": config.objective.model_copy(update=changes)})


def _open(domain: type[Any], *fixed: str) -> set[str]:
    return {f.name for f in dataclasses.fields(domain) if f.init} - set(fixed)


def _values(space: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """The values of [space], lists as tuples."""
    for key in space:
        if key not in keys:
            raise StudyError(
                f"space.{key} is an unknown key: use one of {', '.join(sorted(keys))}"
            )
    return {k: _tuples(v) for k, v in space.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
