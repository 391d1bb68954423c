"""What a search will cost, said before it begins: network evaluations of all its parts."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.predictors.refine import refine_cost
from fewstep.search.cluster import cpus
from fewstep.search.config import FinalTable, StudyConfig
from fewstep.search.display import duration
from fewstep.search.record import shown_url
from fewstep.search.stages.cpr import cpr_cost, wanted
from fewstep.search.stages.improve import halved, streams, task_cost
from fewstep.search.tracking import tracking_uri
from fewstep.search.verdict import RIVALS

if TYPE_CHECKING:
    from fewstep.search.run import Search


def announce(run: Search, per_call: float) -> None:
    """Say what the search will cost, before it does."""
    config, pool = run.config, run.pool
    around = _around(run)
    at_once = max(1, min(pool.workers, cpus()) if run.address is None else pool.workers)
    where = f"{pool.workers} workers" if pool.workers else "this process"
    each = f"({per_call * 1e6:.0f} µs each, measured)"
    own = "and the strategy's own time"
    total: int | None = None
    if run.limits is not None:
        asked, trials = _candidates(run)
        total = trials + around
        on, most = f"each on {config.search.samples} samples", ""
        if config.search.race:
            on, most = f"racing on {' -> '.join(map(str, config.search.levels))} samples", "≤ "
        text = f"{asked}, {on}; {most}{count(total)} network evaluations on {where}"
    elif config.budget.calls is not None:
        total = config.budget.calls + around
        text = (
            f"{count(config.budget.calls)} network evaluations of racing candidates, "
            f"{count(total)} in all on {where}"
        )
    else:
        seconds = (config.budget.seconds or 0) + around * per_call / at_once
        text = f"{config.budget.seconds:g} s of search on {where}"
        each, own = f"about {duration(seconds)} in all", "the result depends on the machine"
    if total is not None:
        each = f"about {duration(total * per_call / at_once)} {each}"
    run.display.total(total)
    run.display.note(f"{config.name}: {text}, {each}; {own}")
    run.display.note(places(config, run.out, run.store.name))


def places(config: StudyConfig, out: Path, name: str) -> str:
    """Where a search leaves what it finds, in one line."""
    storage = config.search.storage
    kept = out.resolve() / "study.journal" if storage is None else f"{shown_url(storage)} ({name})"
    said = f"on {socket.gethostname()}: results {out.resolve()}, trials {kept}"
    if not config.tracking.enabled:
        return f"{said}, no MLflow"
    uri, experiment = tracking_uri(config), config.tracking.experiment
    return f"{said}, MLflow {shown_url(uri)} (experiment {experiment})"


def _around(run: Search) -> int:
    """Network evaluations of the teacher, the verdict and the last stages, at most."""
    config, final, reference = run.config, run.config.final, 0
    if run.problem.has_teacher:
        check = 2 * min(config.teacher.check, final.samples)
        reference = (config.search.samples + 2 * final.samples + check) * config.teacher.nfe
    verdict = sum(final_cost(nfe, final) for nfe in config.search.settings)
    fitting = cpr_cost(config, 1) if wanted(config) else 0
    fitting += sum(task_cost(config, nfe, 1) for nfe in run.starts)
    finish = finish_cost(config, halved(run))
    return reference + run.problem.per_sample * verdict + finish + fitting


def _candidates(run: Search) -> tuple[str, int]:
    """How many candidates there will be, in words, and their network evaluations."""
    limits = dict(run.limits or {})
    if run.config.base_strategy is None:
        for nfe, limit in limits.items():
            limits[nfe] = min(limit, len(run.solvers[nfe]) + len(run.warm.get(nfe, ())))
    asked = ", ".join(f"{n} at {run.config.search.word} {nfe}" for nfe, n in limits.items())
    calls = run.config.search.samples * sum(nfe * n for nfe, n in limits.items())
    if run.config.search.cost:
        plans = ((n, max(0, limit - len(run.solvers[n]))) for n, limit in limits.items())
        calls += sum(count * short_cost(run.config, n) for n, count in plans)
    return asked, run.problem.per_sample * calls


def final_cost(nfe: int, table: FinalTable) -> int:
    """Network evaluations of the verdict at one NFE, if the first fresh samples are enough."""
    return nfe * table.samples * (table.top + RIVALS + 4)


def finish_cost(config: StudyConfig, halved: bool = False) -> int:
    """Network evaluations of the stage at all NFEs, as announced."""
    if config.finish is None:
        return 0
    bases = len(config.compensation.base) or config.compensation.top
    count = 1 if config.finish == "refine" else bases
    noise = sum(size for _, size in streams(config)) * config.teacher.nfe
    each = (task_cost(config, nfe, 1, halved) for nfe in config.search.settings)
    return noise + count * sum(each)


def short_cost(config: StudyConfig, cost: int) -> int:
    """Network evaluations of one short fit, as announced: half of the calls guided."""
    calls = max(1, round(cost / 1.5))
    return round(
        1.5 * refine_cost(config.refine.shortened().model_copy(update={"top": 1}), calls) / 2
    )


def count(number: int) -> str:
    """A large number in short, e.g. "2.1 M"."""
    if number >= 1_000_000:
        return f"{number / 1e6:.1f} M"
    return f"{number / 1e3:.0f} k" if number >= 10_000 else str(number)
