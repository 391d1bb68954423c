"""How candidates are proposed: by an Optuna sampler, as a function of what it was told.

A strategy is an Optuna sampler: `s3` and `evolution` are ours, all others Optuna's own. A
`Proposer` keeps a study in memory, asks it for generations of schedules, and tells it results.
Random numbers are f(seed, generation), or f(seed, trial number), so a search killed at any moment
and resumed proposes exactly what it would have proposed, and generation g can be proposed while
generation g - 1 is still being evaluated.

In a study of one's own:

    sampler = S3Sampler(domain=domain)
    trial = study.ask()
    schedule = suggest(trial, domain)
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.space.errors import StudyError
from fewstep.space.protocol import Domain

if TYPE_CHECKING:
    import optuna

    from fewstep.search.strategies.evolution import EvolutionSampler
    from fewstep.search.strategies.s3 import S3Sampler
    from fewstep.search.work import Result

__all__ = ["Evaluated", "EvolutionSampler", "Proposal", "Proposer", "S3Sampler", "suggest"]

SOURCE, NOTE = "fewstep:source", "fewstep:note"
"""System attributes in which our samplers say where a trial came from, and what they expect."""

OURS = {"evolution": "evolution.EvolutionSampler", "s3": "s3.S3Sampler"}
OPTUNAS = {
    "random": "RandomSampler",
    "qmc": "QMCSampler",
    "tpe": "TPESampler",
    "gp": "GPSampler",
    "nsgaii": "NSGAIISampler",
    "cmaes": "CmaEsSampler",
}
STRATEGIES = ("random", *OURS, *(name for name in OPTUNAS if name != "random"))


def __getattr__(name: str) -> Any:
    """Our samplers, which need Optuna, when they are asked for."""
    for path in OURS.values():
        module, _, cls = path.partition(".")
        if name == cls:
            return getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    raise AttributeError(f"module {__name__} has no attribute {name}")


@dataclass(frozen=True)
class Evaluated:
    """A candidate that has been scored; score to per_sample are those of its `work.Result`.

    `source` says where it came from: a baseline's name, "random", "mutation", "crossover",
    "times", "steps", "adopted", "import:...", "refine:...".
    """

    schedule: Any
    score: float
    status: str = "ok"
    samples: int = 0
    per_sample: np.ndarray | None = None
    source: str = ""

    @classmethod
    def of(cls, schedule: Any, result: Result, source: str = "") -> Evaluated:
        """A schedule with what its evaluation gave."""
        facts = (result.score, result.status, result.samples, result.per_sample)
        return cls(schedule, *facts, source)


def ranked(evaluated: Iterable[Evaluated]) -> list[Evaluated]:
    """Those that were scored, the lowest score first, of equals the earliest."""
    return sorted((e for e in evaluated if e.status == "ok"), key=lambda e: e.score)


@dataclass(frozen=True)
class Proposal:
    """A candidate to score, where it came from, and a note that its trial keeps.

    `trial` is the number of its trial in the proposer's study; None if it has none yet.
    """

    schedule: Any
    source: str
    note: dict[str, Any] = field(default_factory=dict)
    trial: int | None = field(default=None, compare=False)


def suggest(trial: optuna.Trial, domain: Domain) -> Any:
    """The member of a domain that a trial asks for, its parameters suggested one by one.

    Only those that matter given the ones before are suggested; what the sampler proposed together
    is taken as it is.
    """
    values: dict[str, Any] = dict(trial.relative_params)
    matter = domain.matter(values)
    asked: dict[str, Any] = {}
    for p in domain.parameters:
        if p.name not in matter:
            continue
        if p.kind == "float":
            asked[p.name] = trial.suggest_float(p.name, p.low, p.high)
        elif p.kind == "choice":
            asked[p.name] = trial.suggest_categorical(p.name, p.choices)
        else:
            asked[p.name] = trial.suggest_int(p.name, int(p.low), int(p.high))
        before = values.get(p.name, p.neutral)
        values[p.name] = asked[p.name]
        if p.kind != "float" and asked[p.name] != before:
            matter = domain.matter(values)
    return domain.from_params(asked)


class Proposer:
    """Asks an Optuna study in memory for generations of `size` schedules of a domain.

    Its name is one of `STRATEGIES`, `seed` that of every random number, `options` are keyword
    arguments of the sampler; only s3 learns from `earlier`, results at other numbers of calls.

    Raises:
        StudyError: an unknown strategy or option; the known ones are listed.
    """

    def __init__(
        self,
        name: str,
        domain: Domain,
        *,
        seed: int,
        size: int,
        earlier: Sequence[Evaluated] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        import optuna

        self._optuna = optuna
        self.name, self.domain, self.seed, self.size = name, domain, seed, size
        self._options, self._distributions = dict(options or {}), domain.distributions()
        sampler = self._make(earlier)
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self.study = optuna.create_study(sampler=sampler)
        finally:
            optuna.logging.set_verbosity(level)

    @property
    def replays(self) -> bool:
        """Whether the sampler keeps state besides its trials, so that resuming asks it anew."""
        return self.name in ("cmaes", "nsgaii", "qmc")

    def _make(self, earlier: Sequence[Evaluated]) -> Any:
        """The sampler, or an Optuna one of no generation yet: options are checked."""
        if self.name not in STRATEGIES:
            raise StudyError(
                f"strategy {self.name!r} is unknown: use one of {', '.join(STRATEGIES)}, each "
                "alone or with +refine or +compensation, or these two alone"
            )
        fixed: dict[str, Any] = {"seed": self.seed}
        if self.name in OURS:
            factory: Any = __getattr__(OURS[self.name].partition(".")[2])
            fixed["domain"] = self.domain
            if self.name == "s3":
                fixed |= {"batch": self.size, "earlier": earlier}
        else:
            factory = getattr(self._optuna.samplers, OPTUNAS[self.name])
        known = [n for n in inspect.signature(factory).parameters if n not in fixed]
        for option in self._options:
            if option not in known:
                raise StudyError(
                    f"strategy {self.name} has no option {option!r}: its options are "
                    f"{', '.join(known) or 'none'}"
                )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
                return factory(**fixed, **self._options)
        except (TypeError, ValueError) as error:
            raise StudyError(f"search.options of {self.name}: {error}") from None

    def _of_generation(self, generation: int) -> Any:
        """Optuna's samplers draw from a state that no study keeps: a new one each generation."""
        seed = int(np.random.default_rng([self.seed, generation]).integers(2**31))
        samplers, options = self._optuna.samplers, {"seed": seed, **self._options}
        if self.name == "tpe":
            return samplers.TPESampler(**{"constant_liar": True} | options)
        if self.name == "nsgaii":
            return samplers.NSGAIISampler(**{"population_size": max(self.size, 2)} | options)
        if self.name == "cmaes":
            return self._numbers_of_best(options)
        return getattr(samplers, OPTUNAS[self.name])(**options)

    def _numbers_of_best(self, options: dict[str, Any]) -> Any:
        """CMA-ES on the numbers of the best schedule that it did not propose; its steps stay."""
        samplers = self._optuna.samplers
        told = [
            t
            for t in self.study.get_trials(deepcopy=False)
            if t.state.name == "COMPLETE" and t.params and SOURCE in t.system_attrs
        ]
        if not told:
            return samplers.RandomSampler(seed=options["seed"])
        best = min(told, key=lambda t: (t.value, t.number)).params
        ranges = {p.name for p in self.domain.parameters if p.kind == "float"} & set(best)
        if len(ranges) < 2:
            return samplers.RandomSampler(seed=options["seed"])
        space = {name: self._distributions[name] for name in sorted(ranges)}
        start = {name: best[name] for name in space}
        size, scale = max(self.size, 2), options.pop("sigma0", 0.03)

        class NumbersOfBest(samplers.CmaEsSampler):  # type: ignore[name-defined]
            def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
                return space

            def _init_optimizer(self, trans: Any, direction: Any) -> Any:
                from cmaes import CMA

                mean, more = trans.transform(start), {"seed": options["seed"] + 1}
                return CMA(mean, scale, trans.bounds, population_size=size, **more)

        fixed = {name: value for name, value in best.items() if name not in space}
        return samplers.PartialFixedSampler(fixed, NumbersOfBest(**options))

    def propose(self, generation: int, tend: Callable[[], None] = lambda: None) -> list[Proposal]:
        """The candidates of a generation, given what has been told; each is followed by `tend`."""
        found = list[Proposal]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            if self.name not in OURS:
                self.study.sampler = self._of_generation(generation)
            for _ in range(self.size):
                found.append(self._ask())
                tend()
        return found

    def _ask(self) -> Proposal:
        trial = self.study.ask()
        schedule = suggest(trial, self.domain)
        storage, number, suggested = self.study._storage, trial._trial_id, trial.params
        for name, value in self.domain.params(schedule).items():
            if suggested.get(name) != value:  # as it is in the member: sorted, settled
                d = self._distributions[name]
                storage.set_trial_param(number, name, d.to_internal_repr(value), d)
        said = storage.get_trial(number).system_attrs
        return Proposal(schedule, said.get(SOURCE, self.name), said.get(NOTE, {}), trial.number)

    def follow(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """Take a generation proposed before as if it had been proposed now."""
        state = self._optuna.trial.TrialState.RUNNING
        followed = []
        for p in proposals:
            params = self.params(p.schedule)
            if params is None:
                followed.append(p)
                continue
            attrs = {NOTE: p.note} | ({SOURCE: p.source} if p.source != self.name else {})
            self.study.add_trial(self._trial(state, params, system_attrs=attrs))
            number = len(self.study.get_trials(deepcopy=False)) - 1
            followed.append(replace(p, trial=number))
        return followed

    def tell(self, evaluated: Evaluated, trial: int | None = None, stopped: bool = False) -> None:
        """Tell a result, of a trial proposed or (None) of a member scored otherwise.

        One that was `stopped` lost a race: its score is an estimate.
        """
        states = self._optuna.trial.TrialState
        state = states.PRUNED if stopped else states.COMPLETE
        good = evaluated.status == "ok" and bool(np.isfinite(evaluated.score))
        state, value = (state, evaluated.score) if good else (states.FAIL, None)
        if trial is None:
            params = self.params(evaluated.schedule)
            if params is not None:
                attrs = {SOURCE: evaluated.source}
                made = self._trial(state, params, value=value, system_attrs=attrs)
                self.study.add_trial(made)
            return
        storage, number = self.study._storage, self.study.get_trials(deepcopy=False)[trial]
        if stopped and value is not None:
            storage.set_trial_intermediate_value(number._trial_id, evaluated.samples, value)
        self.study.tell(trial, None if state != states.COMPLETE else value, state)

    def _trial(self, state: Any, params: dict[str, Any], **more: Any) -> Any:
        used = {name: self._distributions[name] for name in params}
        return self._optuna.trial.create_trial(
            state=state, params=params, distributions=used, **more
        )

    def params(self, schedule: Any) -> dict[str, Any] | None:
        """The parameters of a member of the space; None outside."""
        if self.domain.contains(schedule) is not None:
            return None
        return dict(self.domain.params(schedule))
