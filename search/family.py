"""What a search needs to know of its kind of schedules: ODE, masked, particles.

The problem decides the kind; everything else of the driver is the same for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from fewstep.predictors.yardstick import Statistic
from fewstep.samplers import AnyProblem, MaskedProblem, ParticleProblem, Problem
from fewstep.samplers.problems import prompts
from fewstep.search.config import StudyConfig
from fewstep.search.problem import priced
from fewstep.space.baselines import named
from fewstep.space.costs import Prices
from fewstep.space.domain import OdeDomain
from fewstep.space.errors import ModelError, ScheduleError, StudyError
from fewstep.space.masked import MaskedSchedule
from fewstep.space.masked_domain import MaskedDomain
from fewstep.space.particle_domain import ParticleDomain
from fewstep.space.particle_policies import named_policies
from fewstep.space.particles import ParticleSchedule
from fewstep.space.plans import PlanDomain
from fewstep.space.step_choices import StepChoices


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of schedules, for one problem.

    Attributes:
        kind: the kind that schedule files of it name.
        has_teacher: whether samples are scored against a teacher's; only then can schedules be
            refined.
        per_sample: network evaluations of one sample and one call.
    """

    problem: Any
    kind: ClassVar[str]
    has_teacher: ClassVar[bool] = False

    @property
    def per_sample(self) -> int:
        """One, or the sequences of a population."""
        return int(getattr(self.problem, "particles", 1))

    def settle(self, config: StudyConfig) -> StudyConfig:
        """The study with what it leaves open filled in.

        By default there is no teacher: the score is the problem's, and nothing is refined.

        Raises:
            StudyError: a setting that this kind does not have.
        """
        own, kind = self.problem.objective, type(self.problem).__name__
        if config.search.race and self.problem.score is not None:
            raise StudyError(
                f"search.race compares sample by sample, which {own} cannot: remove race"
            )
        if config.search.guidance is not None:
            raise StudyError(f"search.guidance: a {kind} has no guidance scale: leave it out")
        for table in _TEACHERS:
            if table in config.model_fields_set:
                raise StudyError(f"{table}: a {kind} has no teacher to match: remove the table")
        if config.finish is not None:
            if "strategy" in config.search.model_fields_set:
                done = "refined" if config.finish == "refine" else "compensated"
                raise StudyError(
                    f"search.strategy {config.search.strategy}: schedules of kind {self.kind!r} "
                    f"cannot be {done}: use {config.base_strategy or 's3'}"
                )
            search = config.search.model_copy(update={"strategy": config.base_strategy or "s3"})
            config = config.model_copy(update={"search": search})
        return _with_objective(config, own, "mean")

    def readable(self, config: StudyConfig) -> dict[str, Any]:
        """The settled study as it is written down: it reads back."""
        absent = () if self.has_teacher else _TEACHERS
        data = {k: v for k, v in config.resolved().items() if k not in absent}
        if config.objective.name != "endpoint_mse":
            data["objective"].pop("statistic")
        return data

    def domain(self, config: StudyConfig, nfe: int) -> Any:
        """The search space of the study's [space].

        Raises:
            StudyError: an unknown key or a space without members; one line.
        """
        raise NotImplementedError

    def named(self, nfe: int) -> dict[str, Any]:
        """The named schedules, "name/variant": what a search must beat."""
        raise NotImplementedError

    def check(self, schedule: Any, name: str) -> None:
        """Raise a FewstepError if a schedule from a file is not for this problem."""
        if schedule.kind != self.kind:
            raise StudyError(
                f"{name} is a schedule of kind {schedule.kind!r}, and the study's model needs "
                f"kind {self.kind!r}"
            )


def family_of(problem: AnyProblem) -> Family:
    """The family of a problem."""
    if isinstance(problem, MaskedProblem):
        return MaskedFamily(problem)
    if isinstance(problem, ParticleProblem):
        return ParticleFamily(problem)
    return OdeFamily(problem)


@dataclasses.dataclass(frozen=True)
class OdeFamily(Family):
    """Solver schedules of the probability-flow ODE."""

    problem: Problem
    kind: ClassVar[str] = "ode"
    has_teacher: ClassVar[bool] = True

    def settle(self, config: StudyConfig) -> StudyConfig:
        """See `Family`."""
        name = config.objective.name or "endpoint_mse"
        if self.problem.plain_start:
            plain = config.refine.model_copy(update={"mean": False})
            config = config.model_copy(update={"refine": plain})
        return _with_objective(config, name, "geometric" if name == "endpoint_mse" else "mean")

    def domain(self, config: StudyConfig, nfe: int) -> OdeDomain | PlanDomain:
        """See `Family`; keys are fields of `OdeDomain` and of its `StepChoices`."""
        steps = {f.name for f in dataclasses.fields(StepChoices)}
        ours = _open(OdeDomain, "noise", "nfe", "choices", "constant")
        with _space_named():
            if config.search.cost:
                return self._plans(config, nfe)
            values = _values(config, ours | steps)
            choices = StepChoices(**{k: v for k, v in values.items() if k in steps})
            mine = {k: v for k, v in values.items() if k in ours}
            return OdeDomain(self.problem.denoiser.noise, nfe, choices=choices, **mine)

    def _plans(self, config: StudyConfig, cost: int) -> PlanDomain:
        """The plans of a cost; the model's networks and guidance are open, stages are not."""
        problem, settled = self.problem, ("noise", "cost", "prices", "scale")
        prices = priced(Prices(**config.prices.listed), problem)
        scale = None if problem.guidance in (None, 1) else problem.guidance
        found = {"networks": ["", *prices.networks]} | config.space
        values = _values(config.model_copy(update={"space": found}), _open(PlanDomain, *settled))
        return PlanDomain(problem.denoiser.noise, cost, prices, scale, **values)

    def named(self, nfe: int) -> dict[str, Any]:
        """See `Family`: the problem's own baselines, and every named solver on every grid."""
        own = self.problem.baselines
        return {**(own(nfe) if own else {}), **named(self.problem.denoiser.noise, nfe)}

    def check(self, schedule: Any, name: str) -> None:
        """See `Family`."""
        super().check(schedule, name)
        if schedule.noise != self.problem.denoiser.noise:
            raise ModelError(
                f"{name} was made for noise schedule {schedule.noise.type}, and the study's model "
                f"has another ({self.problem.denoiser.noise.type}): search for this model"
            )


@dataclasses.dataclass(frozen=True)
class MaskedFamily(Family):
    """Schedules of masked diffusion: how many tokens each call unmasks, and how."""

    problem: MaskedProblem
    kind: ClassVar[str] = "masked"

    @property
    def free(self) -> int:
        """Positions to decide in a sequence.

        Raises:
            StudyError: the prompt leaves none.
        """
        tokens = prompts(self.problem, range(1))
        count = int((tokens == self.problem.denoiser.mask).sum())
        if count == 0:
            raise StudyError("the prompt leaves no position to decide: put the mask id where a "
                             "token is wanted")  # fmt: skip
        return count

    def domain(self, config: StudyConfig, nfe: int) -> MaskedDomain:
        """See `Family`; keys are fields of `MaskedDomain`, with a target those it weighs."""
        keys = _open(MaskedDomain, "length", "nfe", "noise", "curve")
        values = _values(config, keys & {"positions", "temperature"} if self.tilted else keys)
        with _space_named():
            return MaskedDomain(self.free, nfe, **self._fixed, **values)

    @property
    def tilted(self) -> bool:
        """Whether populations are weighed towards a target."""
        return self.problem.target is not None

    @property
    def _fixed(self) -> dict[str, Any]:
        """What the problem says of its schedules."""
        curve = self.problem.curve
        return {"noise": self.problem.noise, "curve": None if curve is None else tuple(curve)}

    def named(self, nfe: int) -> dict[str, Any]:
        """See `Family`: the named counts, the same choices at every call."""
        choices: dict[str, Any] = {
            "modes": ("parallel",) if self.tilted else ("parallel", "extrapolate"),
            "positions": ("uniform", "confidence"),
        }
        try:
            every = MaskedDomain(self.free, nfe, **self._fixed, **choices)
        except ScheduleError as error:
            raise StudyError(f"search.nfe: {error}") from None
        return dict(every.baselines())

    def check(self, schedule: Any, name: str) -> None:
        """See `Family`."""
        super().check(schedule, name)
        assert isinstance(schedule, MaskedSchedule)
        if schedule.length != self.free:
            raise ModelError(
                f"{name} decides {schedule.length} positions, and the study's sequences have "
                f"{self.free} free ones: search for this model"
            )


@dataclasses.dataclass(frozen=True)
class ParticleFamily(Family):
    """Schedules of weighted particles."""

    problem: ParticleProblem
    kind: ClassVar[str] = "particles"

    @property
    def per_sample(self) -> int:
        """See `Family`: a population of K particles, asked of every model."""
        return self.problem.particles * len(self.problem.target.factors)

    @property
    def _two_ways(self) -> bool:
        """Whether the target's reward can be weighed by its gradient as well as by its path."""
        reward = self.problem.target.reward
        return reward is not None and reward.integrable

    def domain(self, config: StudyConfig, nfe: int) -> ParticleDomain:
        """See `Family`; keys are fields of `ParticleDomain`."""
        settled = ("noise", "nfe", "own", "own_ramp", "rewarded")
        values, target = _values(config, _open(ParticleDomain, *settled)), self.problem.target
        if values.get("strength") is not None and target.reward is None:
            for i, factor in enumerate(target.factors):
                if factor.log_density is None:
                    raise StudyError(f"space.strength needs log_density of model {i}: give it")
        if len(values.get("reward_weight", ())) > 1 and not self._two_ways:
            raise StudyError(
                "space.reward_weight: only a reward on the state that its gradient guides can be "
                "weighed in two ways: leave it out"
            )
        own: dict[str, Any] = {"own": target.strength, "own_ramp": target.ramp}
        own["rewarded"] = target.reward is not None
        with _space_named():
            return ParticleDomain(target.noise, nfe, **own, **values)

    def named(self, nfe: int) -> dict[str, Any]:
        """See `Family`: the authors' policies, with both integrators, on three grids."""
        target = self.problem.target
        strength = 1.0 if target.reward is not None else target.strength
        return dict(named_policies(target.noise, nfe, b=strength, paths=self._two_ways))

    def check(self, schedule: Any, name: str) -> None:
        """See `Family`."""
        super().check(schedule, name)
        assert isinstance(schedule, ParticleSchedule)
        self.problem.target.require_noise(schedule.noise)


def _with_objective(config: StudyConfig, name: str, statistic: Statistic) -> StudyConfig:
    """The study with its objective's name, and its statistic where it names none."""
    changes = {"name": name, "statistic": config.objective.statistic or statistic}
    return config.model_copy(update={"objective": config.objective.model_copy(update=changes)})


_TEACHERS = ("teacher", "refine", "compensation", "cpr", "prices")
"""Tables of studies with a teacher."""


def _open(domain: type[Any], *fixed: str) -> set[str]:
    return {f.name for f in dataclasses.fields(domain) if f.init} - set(fixed)


def _values(config: StudyConfig, keys: set[str]) -> dict[str, Any]:
    """The values of [space], lists as tuples."""
    for key in config.space:
        if key not in keys:
            raise StudyError(
                f"space.{key} is an unknown key: use one of {', '.join(sorted(keys))}"
            )
    return {k: _tuples(v) for k, v in config.space.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


@contextlib.contextmanager
def _space_named() -> Iterator[None]:
    """Say that what is wrong with a domain stands in [space]."""
    try:
        yield
    except (ScheduleError, TypeError) as error:
        raise StudyError(f"space: {error}") from None
