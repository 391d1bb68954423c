"""The last stage of a search: the best candidates of every NFE improved, on the workers.

A stage is "refine" (`refining`) or "compensation" (`compensating`). One task improves one schedule
(refinement: the best of several starts) on noise of its own, which neither ranks candidates nor
reports results. What comes back is proposed like any other candidate: scored on the search's
noise, told to the study, judged on fresh seeds. The log holds it, so that a resumed search
improves nothing twice.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fewstep.search.compensating import CompensationTask, compensation_cost
from fewstep.search.config import StudyConfig
from fewstep.search.display import Display
from fewstep.search.pool import Pool
from fewstep.search.refining import RefineTask, best_starts, refine_cost
from fewstep.search.rung import Rung, best_of
from fewstep.search.strategies import Evaluated, Proposal
from fewstep.space import OdeSchedule, load_schedule
from fewstep.space.baselines import baseline
from fewstep.space.errors import ScheduleError, StudyError
from fewstep.space.growing import grown
from fewstep.space.noise import NoiseSchedule


def finish_rungs(
    config: StudyConfig,
    pool: Pool,
    rungs: Mapping[int, Rung],
    display: Display,
    mean: Tensor | None = None,
) -> dict[int, int]:
    """Improve the starts of every NFE and tell the results; network evaluations by NFE.

    All NFEs at once, the longest first. With [refine] grow one after another, from the fewest
    calls on, so that each learns from the one before. `mean` is the constant image that refined
    schedules may use.
    """
    upwards = sorted(rungs)
    if not (config.finish == "refine" and config.refine.grow):
        longest_first = {nfe: rungs[nfe] for nfe in upwards[::-1]}
        return _improve(config, pool, longest_first, None, display, mean)
    spent: dict[int, int] = {}
    for below, nfe in zip([None, *upwards], upwards, strict=False):
        start = None if below is None else _grown(rungs[below], nfe, display)
        spent |= _improve(config, pool, {nfe: rungs[nfe]}, start, display, mean)
    return spent


def _grown(rung: Rung, nfe: int, display: Display) -> Evaluated | None:
    """The best schedule of a rung with calls added; its score stays, as its samples do."""
    best = best_of(rung.known)
    if best is None or not isinstance(best.schedule, OdeSchedule):
        return None
    try:
        longer = grown(best.schedule, nfe)
    except ScheduleError as error:
        display.note(f"NFE {nfe}: {best.source} of NFE {rung.nfe} is no start: {error}")
        return None
    return Evaluated(longer, best.score, "ok", source=f"grown:nfe{rung.nfe:02d}")


def _improve(
    config: StudyConfig,
    pool: Pool,
    rungs: Mapping[int, Rung],
    start: Evaluated | None,
    display: Display,
    mean: Tensor | None,
) -> dict[int, int]:
    """The stage at some NFEs at once, in their order; `start` competes with the candidates."""
    stage = config.finish or ""
    sent: list[tuple[int, list[Evaluated]]] = []
    for nfe, rung in rungs.items():
        if rung.refined_before:
            continue
        found = starts(config, rung, start, mean)
        alone = config.finish == "compensation" or not found
        for group in [[one] for one in found] if alone else [found]:
            sent.append((nfe, group))
    proposals: dict[int, list[Proposal]] = {nfe: [] for nfe in rungs}
    results = pool.map(_task(config, group, mean) for _, group in sent)
    for k, (nfe, group) in enumerate(sent):
        display.stage(f"{stage} of {len(sent)} schedules, {k} done")
        result, used = next(results), group[0]
        display.advance(result.evaluations)
        if result.schedule is not None:
            used = group[result.start_used]
            schedule = load_schedule(result.schedule)
            constant = _constant(group, mean)
            if constant is not None and schedule.first == "mean":
                schedule = schedule.with_constant(constant)
            proposals[nfe].append(Proposal(schedule, f"{stage}:{used.source}", dict(result.note)))
        else:
            display.note(f"NFE {nfe}: {stage} of {used.source} failed ({result.message})")
    spent: dict[int, int] = {}
    for nfe, rung in sorted(rungs.items()):
        display.stage(f"NFE {nfe}: scoring the schedules of {stage}")
        told = rung.extend(proposals[nfe])
        spent[nfe] = sum(int(p.note.get(f"{stage}_calls", 0)) for p in told)
        for p in told:
            text = (
                f"NFE {nfe}: {p.source} {p.note[f'{stage}_before']:.4g} -> "
                f"{p.note[f'{stage}_after']:.4g} (held-out noise)"
            )
            if p.note.get("refine_method", config.refine.method) != config.refine.method:
                text += f", by {p.note['refine_method']}: the model gives no gradient"
            display.note(text)
    return spent


def _constant(group: list[Evaluated], mean: Tensor | None) -> Tensor | None:
    """The constant image of a task: what its best start brings along, else the search's."""
    constant: Tensor | None = group[0].schedule.constant
    return mean if constant is None else constant


def _task(
    config: StudyConfig, group: list[Evaluated], mean: Tensor | None
) -> RefineTask | CompensationTask:
    bodies = tuple(
        {k: v for k, v in start.schedule.to_dict().items() if k != "provenance"} for start in group
    )
    constant = _constant(group, mean)
    if config.finish == "compensation":
        return CompensationTask(bodies[0], constant, config.compensation)
    featured = config.objective.name == "frechet"
    return RefineTask(bodies, constant, config.refine, config.search.seed, featured)


def starts(
    config: StudyConfig,
    rung: Rung,
    start: Evaluated | None = None,
    mean: Tensor | None = None,
) -> list[Evaluated]:
    """What the stage improves: the bases that the study names, else the best candidates."""
    table = config.compensation
    if config.finish != "compensation":
        known = rung.known if start is None else [start, *rung.known]
        return best_starts(known, config.refine.top, rung.named_known(), mean)
    if not table.base:
        usable = [
            e
            for e in rung.known
            if isinstance(e.schedule, OdeSchedule) and e.schedule.n_steps > table.order
        ]
        return best_starts(usable, table.top)
    scored = {e.source: e for e in rung.named_known()}
    bases = named_bases(config, rung.known[0].schedule.noise, rung.nfe)
    return [
        scored.get(name) or Evaluated(schedule, float("inf"), "ok", source=name)
        for name, schedule in bases.items()
    ]


def named_bases(config: StudyConfig, noise: NoiseSchedule, nfe: int) -> dict[str, OdeSchedule]:
    """The bases of [compensation], by name.

    Raises:
        StudyError: a name that is no solver, or one that does not exist at this NFE.
    """
    found = {}
    for name in config.compensation.base:
        try:
            found[name] = baseline(name, noise, nfe)
        except ScheduleError as error:
            raise StudyError(f"compensation.base: {error}") from None
        if found[name].program.stochastic:
            raise StudyError(f"compensation.base: {name} adds fresh noise: name another")
    return found


def finish_cost(config: StudyConfig) -> int:
    """Network evaluations of the stage at all NFEs, at most."""
    nfes = config.search.nfe
    if config.finish == "refine":
        noise = (config.refine.samples + config.refine.held) * config.teacher.nfe
        return noise + sum(refine_cost(config.refine, nfe) for nfe in nfes)
    if config.finish == "compensation":
        bases = len(config.compensation.base) or config.compensation.top
        return sum(compensation_cost(config.compensation, nfe, bases) for nfe in nfes)
    return 0
