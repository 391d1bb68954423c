"""The last stage of a search: the best candidates of every NFE improved, on the workers.

A stage is "refine" or "compensation". One task (`stages.tasks`) improves one schedule (refinement:
the best of several starts). What comes back is proposed like any other candidate: scored on the
search's noise, told to the study, judged on fresh seeds. The store keeps it, so that a resumed
search improves nothing twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fewstep.predictors.compensate import compensation_cost
from fewstep.predictors.refine import Fitted, refine_cost
from fewstep.search.config import StudyConfig
from fewstep.search.display import Display
from fewstep.search.rung import Rung, best_of
from fewstep.search.stages.tasks import (
    COMPENSATE,
    HELD,
    TRAIN,
    CompensationTask,
    RefineTask,
    StageTask,
    best_starts,
)
from fewstep.search.strategies import Evaluated, Proposal, ranked
from fewstep.space import OdeSchedule, ProgramSchedule
from fewstep.space.baselines import baseline
from fewstep.space.errors import ScheduleError, StudyError, blamed
from fewstep.space.growing import grown
from fewstep.space.noise import NoiseSchedule

if TYPE_CHECKING:
    from fewstep.search.run import Search

_STRONG = 2.0  # guidance scale above which a fit also starts at half of it


def finish_rungs(run: Search) -> dict[int, int]:
    """Improve the starts of every NFE and tell the results; network evaluations by NFE.

    All NFEs at once, the longest first. With [refine] grow one after another, from the fewest
    calls on, so that each learns from the one before.
    """
    upwards = sorted(run.rungs)
    if not (run.config.finish == "refine" and run.config.refine.grow):
        return _improve(run, upwards[::-1])
    spent: dict[int, int] = {}
    for below, nfe in zip([None, *upwards], upwards, strict=False):
        start = None if below is None else _grown(run.rungs[below], nfe, run.display)
        spent |= _improve(run, [nfe], start)
    return spent


def fitted(run: Search) -> dict[int, Evaluated]:
    """By NFE the program fitted from the start given (none if that failed), else the best one."""
    if run.config.search.cost:
        return {}  # programs of equal cost need not have the same numbers
    found = {}
    for nfe, rung in run.rungs.items():
        given = f"refine:{run.starts[nfe].source}" if nfe in run.starts else "refine:"
        made = [e for e in ranked(rung.known) if e.source.startswith(given)]
        if programs := [e for e in made if isinstance(e.schedule, ProgramSchedule)]:
            found[nfe] = programs[0]
        elif nfe in run.starts:
            run.display.note(f"NFE {nfe}: not fitted from {given[7:]}: this scale is not in cpr/")
    return found


def _grown(rung: Rung, nfe: int, display: Display) -> Evaluated | None:
    """The best schedule of a rung with calls added; its score stays, as its samples do."""
    best = best_of(rung.known)
    if best is None or not isinstance(best.schedule, OdeSchedule | ProgramSchedule):
        return None
    try:
        longer = grown(best.schedule, nfe)
    except ScheduleError as error:
        display.note(f"NFE {nfe}: {best.source} of NFE {rung.nfe} is no start: {error}")
        return None
    return Evaluated(longer, best.score, "ok", source=f"grown:nfe{rung.nfe:02d}")


def _improve(run: Search, nfes: list[int], start: Evaluated | None = None) -> dict[int, int]:
    """The stage at some NFEs at once, in their order; `start` competes with the candidates.

    Each NFE's results are scored and kept as soon as its tasks have ended.
    """
    config, display = run.config, run.display
    stage, spent = config.finish or "", dict[int, int]()
    groups: dict[int, list[list[Evaluated]]] = {}
    for nfe in nfes:
        rung = run.rungs[nfe]
        found = [] if rung.refined_before else _starts(run, rung, start)
        alone = config.finish == "compensation" or bool(config.search.cost) or not found
        groups[nfe] = [[one] for one in found] if alone else [found]
        if nfe in run.starts and not alone:
            groups[nfe].append([run.starts[nfe]])
    total, done = sum(map(len, groups.values())), 0
    display.stage(f"{stage} of {total} schedules")
    tasks = {nfe: [_task(run, group) for group in at] for nfe, at in groups.items()}
    for nfe, results in run.pool.map_groups(tasks):
        rung, made = run.rungs[nfe], []
        for group, result in zip(groups[nfe], results, strict=True):
            display.advance(result.calls)
            display.saved(task_cost(config, nfe, len(group), halved(run)) - result.calls)
            done += 1
            if result.message:
                line = f"{stage} of {group[0].source} failed ({result.message})"
                display.note(f"{config.search.word} {nfe}: {line}")
                rung.failures.append(line)
                continue
            source = f"{stage}:{group[result.start].source}"
            made.append(Proposal(result.schedule, source, _note(stage, group, result)))
        spent[nfe] = _tell(stage, rung, made, display)
        display.stage(f"{stage} of {total} schedules, {done} done")
    return spent


def _note(stage: str, starts: list[Evaluated], found: Fitted) -> dict[str, Any]:
    """What the trial of an improved schedule says of its fit."""
    said: dict[str, Any] = {"starts": [start.source for start in starts]}
    said |= {"before": found.before, "after": found.after, "calls": found.calls}
    note = {f"{stage}_{name}": value for name, value in said.items()}
    if stage == "refine":
        source = starts[found.start].schedule.digest
        note |= {"refined_from": source, "refine_samples": found.samples}
        return note | {"refine_halved": True} if found.halved else note
    assert isinstance(found.schedule, OdeSchedule)
    return note | {"ratios": [step.compensation for step in found.schedule.steps]}


def _tell(stage: str, rung: Rung, proposals: list[Proposal], display: Display) -> int:
    """Score and keep the improved schedules of an NFE (those kept by a resumed search)."""
    display.stage(f"{rung.name}: scoring the schedules of {stage}")
    told = rung.extend(proposals)
    for p in told:
        before, after = p.note[f"{stage}_before"], p.note[f"{stage}_after"]
        line = f"{p.source} {before:.4g} -> {after:.4g} (loss on held-out noise)"
        display.note(f"{rung.name}: {line}")
    return sum(int(p.note.get(f"{stage}_calls", 0)) for p in told)


def _task(run: Search, group: list[Evaluated]) -> StageTask:
    config = run.config
    bare = tuple(start.schedule.model_copy(update={"provenance": {}}) for start in group)
    if config.finish == "compensation":
        return CompensationTask(bare, config.compensation)
    # the constant image: what the best start brings along, else the search's
    image = run.mean if bare[0].constant is None else bare[0].constant
    table = config.refine.keeping_sorts() if config.search.cost else config.refine
    task = RefineTask(bare, table, image, config.objective.name == "frechet")
    if not halved(run) or bare[0].program.guidance is not None:
        return task
    teacher = baseline(config.teacher.solver, bare[0].noise, config.teacher.nfe)
    return replace(task, teacher=teacher)


def halved(run: Search) -> bool:
    """Whether refinement also starts from a fit at half the guidance scale.

    Not where it goes on from another scale, or keeps what costs: there scales are numbers, too.
    """
    config, scale = run.config, getattr(run.problem, "guidance", None)
    every = config.finish == "refine" and config.refine.knobs != ("times",)
    free = not run.starts and not config.search.cost and "guidance" not in config.refine.knobs
    return every and free and scale is not None and scale > _STRONG


def _starts(run: Search, rung: Rung, start: Evaluated | None) -> list[Evaluated]:
    """What the stage improves: the bases that the study names, else the best candidates."""
    config, table = run.config, run.config.compensation
    if config.finish != "compensation":
        known = rung.known if start is None else [start, *rung.known]
        return best_starts(known, config.refine.top, rung.named_known(), run.mean)
    if not table.base:
        steps = ((e, getattr(e.schedule, "n_steps", 0)) for e in rung.known)
        return best_starts([e for e, n in steps if n > table.order], table.top)
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
        with blamed("compensation.base"):
            found[name] = baseline(name, noise, nfe)
        if found[name].program.stochastic:
            raise StudyError(f"compensation.base: {name} adds fresh noise: name another")
    return found


def streams(config: StudyConfig) -> list[tuple[str, int]]:
    """The noise of the stage, for which workers need the teacher's end points: (name, samples)."""
    if config.finish == "refine" or config.search.cost:
        return [(TRAIN, config.refine.samples), (HELD, config.refine.held)]
    return [(COMPENSATE, config.compensation.samples)] if config.finish else []


def task_cost(config: StudyConfig, nfe: int, starts: int, halved: bool = False) -> int:
    """Network evaluations of one task, as announced."""
    if config.search.cost:  # some of the calls are guided
        return (config.refine.top + 1) * refine_cost(config.refine, round(nfe / 1.5)) // 2
    if config.finish == "refine":
        return refine_cost(config.refine, nfe, 2 * halved)
    return compensation_cost(config.compensation, nfe, starts)
