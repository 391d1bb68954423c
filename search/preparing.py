"""What a study asks for, as objects: what workers need, strategies, first trials, the pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.search.config import StudyConfig
from fewstep.search.family import Family, OdeFamily
from fewstep.search.pool import Pool, make_pool, one_thread
from fewstep.search.problem import ModelSpec
from fewstep.search.record import Record, write_text
from fewstep.search.stages.improve import named_bases
from fewstep.search.strategies import Strategy
from fewstep.search.work import Block, Evaluator, EvaluatorSpec, Want, cut
from fewstep.space.baselines import baseline
from fewstep.space.errors import ScheduleError, StudyError
from fewstep.space.protocol import Domain


def evaluator_spec(config: StudyConfig) -> EvaluatorSpec:
    """What workers need to know of a study."""
    model = ModelSpec(config.model.factory, config.model.arguments, config.folder, config.scale)
    return EvaluatorSpec(
        model,
        config.objective.name,
        config.objective.features,
        config.search.seed,
        config.objective.statistic,
    )


def open_pool(
    config: StudyConfig, spec: EvaluatorSpec, evaluator: Evaluator, address: str | None
) -> Pool:
    """The pool a study asks for."""
    return make_pool(
        spec,
        workers=config.search.workers,
        address=address,
        timeout=config.search.timeout,
        retries=config.search.retries,
        gpus=config.search.gpus,
        evaluator=evaluator,
    )


def freeze(config: StudyConfig, out: Path, record: Record) -> None:
    """Keep the resolved study in the folder; a resumed one must ask the same.

    Raises:
        StudyError: it asks something else; the setting is named.
    """
    identity = json.loads(json.dumps(config.identity()))
    kept = record.notes.get("study")
    if kept is None:
        record.note(study=identity)
    else:
        keys = sorted(k for k in {*kept, *identity} if kept.get(k) != identity.get(k))
        if keys:
            was, now = kept.get(keys[0]), identity.get(keys[0])
            raise StudyError(
                f"--resume: {keys[0]} is {now!r} but the search in {out} began with {was!r}: "
                "set it back, or --overwrite"
            )
    write_text(out / "study.json", json.dumps(config.resolved(), indent=1) + "\n")


def make_strategy(config: StudyConfig, domain: Domain) -> Strategy | None:
    """The strategy that a study names, on a domain; None for a stage alone, which needs none.

    Raises:
        StudyError: an unknown name or option.
    """
    from fewstep.search import strategies

    if config.base_strategy is None:
        if config.search.options:
            raise StudyError(
                f"search.options are those of a strategy that proposes: {config.search.strategy} "
                f"has its own table, [{config.finish}]"
            )
        return None
    try:
        made: Strategy = strategies.make(config.base_strategy, domain, **config.search.options)
    except TypeError as error:
        raise StudyError(f"search.options of {config.search.strategy}: {error}") from None
    return made


def starters(config: StudyConfig, family: Family, nfe: int) -> dict[str, Any]:
    """The named schedules, told first; where guidance per step is open, with the problem's.

    Raises:
        StudyError: guidance is open for a problem without it, or in bounds that leave its out.
    """
    found = family.named(nfe)
    if not isinstance(family, OdeFamily):
        return found
    for name, low, high in config.space.get("extras", ()):
        if name != "guidance":
            continue
        scale = family.problem.guidance
        if scale is None:
            raise StudyError("space.extras opens guidance, but the problem has none to start from")
        if not low <= scale <= high:
            raise StudyError(
                f"space.extras: guidance {low:g} to {high:g} leaves out {scale:g}, the problem's"
            )
        for key, schedule in found.items():
            steps = tuple(s.model_copy(update={"guidance": scale}) for s in schedule.steps)
            found[key] = schedule.model_copy(update={"steps": steps})
    return found


def check_names(config: StudyConfig, family: Family) -> None:
    """Refuse, before anything runs, named solvers of the last stages that do not exist.

    Raises:
        StudyError: the setting is named.
    """
    if not isinstance(family, OdeFamily):
        return
    nfes, noise = config.search.nfe, family.problem.denoiser.noise
    if config.finish == "compensation":
        for nfe in nfes:
            named_bases(config, noise, nfe)
    if config.cpr.template is not None:
        try:
            for nfe in range(min(nfes), max(nfes) + 1):
                baseline(config.cpr.template, noise, nfe)
        except ScheduleError as error:
            raise StudyError(f"cpr.template: {error}") from None


def speed(evaluator: Evaluator, config: StudyConfig, family: Family) -> float:
    """Seconds of one network evaluation in a block, one thread; raises what the model raises.

    A problem's own measure is part of it.
    """
    size, samples = config.search.block[0], min(config.search.block[1], config.search.samples)
    schedules = list(family.named(min(2, *config.search.nfe)).values())[:size]
    want: Want = "samples" if family.has_teacher else "measures"
    group = tuple(schedules[i] for i in cut(schedules, size)[0])
    with one_thread():
        for together in (group[:1], group):  # warm-up, and the first look at the model
            result = Block(together, "timing", 0, samples, want, strict=True).run(evaluator)
    return result.seconds / max(result.evaluations, 1)
