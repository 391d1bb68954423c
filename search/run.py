"""The driver: from a study to schedule files, and the evidence beside them.

    study -> problem, named solvers, spaces -> teacher -> per NFE: generations, stages -> verdict
    on fresh noise -> files, MLflow

Everything that decides a result comes from the study; what was already done comes from the store,
so a killed search goes on where it stopped and ends as if it had not been, and one that is given
more budget as if it had had it from the start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.predictors.between import Aligned
from fewstep.predictors.yardstick import Array, frechet_distance
from fewstep.samplers import Problem
from fewstep.samplers.prices import measured_prices, priced, prices_in_words
from fewstep.search.cluster import address_of
from fewstep.search.config import StudyConfig
from fewstep.search.display import Display, duration
from fewstep.search.family import domain_of, readable, settled
from fewstep.search.objective import Frechet
from fewstep.search.pool import Pool, RayPool, gathered
from fewstep.search.preparing import (
    Speed,
    check_names,
    load_warm,
    open_pool,
    speed,
    starters,
    warm_start,
)
from fewstep.search.record import held, open_storage
from fewstep.search.results import schedule_path, write_results
from fewstep.search.rung import Rung, best_of, best_so_far
from fewstep.search.scoring import SEARCH, Scorer
from fewstep.search.stages.cpr import Stage, cpr_cost, regress, wanted
from fewstep.search.stages.improve import finish_rungs, fitted, streams
from fewstep.search.stages.tasks import TRAIN
from fewstep.search.store import Store
from fewstep.search.strategies import Evaluated, Proposer
from fewstep.search.teacher import Teacher
from fewstep.search.tracking import MlflowTracker, Tracker, beginning, tracking_uri
from fewstep.search.verdict import FRESH, Judge, Row, Verdict
from fewstep.search.work import Block, Evaluator
from fewstep.space import Program
from fewstep.space.costs import Prices, pattern
from fewstep.space.errors import StudyError
from fewstep.space.files import load_schedule, save_schedule, write_text


@dataclass(frozen=True)
class Outcome:
    """What a search ends with: a row and the files per NFE."""

    objective: str
    rows: tuple[Row, ...]
    out: Path
    seconds: float


def search(
    config: StudyConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    address: str | None = None,
    display: Display | None = None,
) -> Outcome:
    """Run a study.

    Args:
        config: the study.
        out: folder for everything it leaves.
        resume: go on with the search in `out`, or of this name in the study's storage.
        overwrite: discard the search in `out`; what a storage elsewhere holds stays.
        address: Ray cluster; None joins RAY_ADDRESS or starts one on loopback.
        display: shows progress, and draws pictures and the page at the end; None does neither.

    Raises:
        FewstepError: a study, a model or a folder that cannot be used.
    """
    display = display or Display()
    if config.search.workers != 0 or address is not None:
        address = address_of(address)
    with held(out, resume=resume, overwrite=overwrite):
        if len(config.search.guidance or ()) > 1:
            return _search_scales(config, out, resume, overwrite, address, display)
        return _search_one(config, out, resume, address, display, {})[0]


def _search_one(
    config: StudyConfig,
    out: Path,
    resume: bool,
    address: str | None,
    display: Display,
    starts: Mapping[int, Evaluated],
) -> tuple[Outcome, dict[int, Evaluated]]:
    """A search at one guidance scale, and by NFE the program it fitted from `starts`."""
    one = Search(config, out, display, address, starts)
    try:
        return one.run(resume), fitted(one)
    finally:
        if hasattr(one, "store"):
            one.store.close()


def _search_scales(
    config: StudyConfig,
    out: Path,
    resume: bool,
    overwrite: bool,
    address: str | None,
    display: Display,
) -> Outcome:
    """A search for each guidance scale, in a folder of its own, and what they found together.

        OUT/w7.5/...                       all that the search at scale 7.5 leaves
        OUT/schedules/nfe05_w7.5.json      every schedule found
        OUT/results.json                   all rows, each with its guidance
        OUT/cpr/nfe05_w7.5.json            fitted programs for the scales between (`stages.cpr`)
        OUT/cpr.json                       a regression for the settings between, if asked for

    A scale changes what the teacher samples, so the searches share the study alone, and each
    resumes by itself; but a fit also starts from the program that was fitted at the scale before.
    """
    begun, objective, rows = time.monotonic(), "", list[Row]()
    storage, scales = open_storage(config.search.storage, out), config.search.guidance or ()
    store = Store(storage, config.name, out, config.identity(budget=False), resume)
    write_text(out / "study.json", json.dumps(config.resolved(), indent=1) + "\n")
    off = {"cpr": config.cpr.model_copy(update={"fit": False})}
    aligned, starts = Aligned(), dict[int, Evaluated]()
    going_on = store.resumed and not overwrite
    try:
        for scale in scales:
            folder, part = out / f"w{scale:g}", config.at_guidance(scale).model_copy(update=off)
            display.note(f"guidance {scale:g}")
            with held(folder, resume=going_on, overwrite=overwrite):
                found, more = _search_one(part, folder, going_on, address, display, starts)
            for row in found.rows:
                save_schedule(load_schedule(schedule_path(folder, row)), schedule_path(out, row))
            rows, objective = [*rows, *found.rows], found.objective
            aligned.add(scale, {n: e.schedule for n, e in more.items()})
            starts |= {n: replace(e, source=f"w{scale:g}") for n, e in more.items()}
    finally:
        store.close(keep=any(out.glob("w*/study.json")))
    results = {"study": config.name, "objective": objective, "rows": [r.to_dict() for r in rows]}
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    if wanted(config) or aligned.programs:
        first = config.at_guidance(scales[0])
        evaluator = Evaluator.of(first)
        aligned.save(out / "cpr", study=config.name, model=evaluator.problem.fingerprint)
    if wanted(config) or aligned.inner():
        pool = open_pool(first, evaluator, address, display)
        with contextlib.closing(pool), display:
            display.total(cpr_cost(config, len(scales)) if wanted(config) else None)
            if aligned.inner():
                stage = Stage(config, evaluator.ode, pool, display)
                results["between"] = aligned.left_out(stage.sampled)
                write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
            if wanted(config):
                regress(config, out, rows, evaluator.ode, pool, display)
    return Outcome(objective, tuple(rows), out, time.monotonic() - begun)


class Search:
    """One search: everything its parts ask for.

    Attributes:
        solvers: named schedules by NFE.
        domains: search spaces by NFE.
        warm: candidates of search.warm by NFE, where they are still to be scored.
        starts: programs by NFE from which refinement makes a fit of its own.
        store: the trials.
        pool: does the work.
        scorer: evaluates schedules.
    """

    pool: Pool
    store: Store
    scorer: Scorer

    def __init__(
        self,
        config: StudyConfig,
        out: Path,
        display: Display,
        address: str | None,
        starts: Mapping[int, Evaluated],
    ) -> None:
        self.config, self.out, self.display, self.address = config, out, display, address
        self.starts, self.tracker = starts, Tracker()
        self.rungs: dict[int, Rung] = {}
        self.references: dict[str, Array] = {}
        self.endpoints: dict[str, Tensor] = {}
        self.mean: Tensor | None = None

    def run(self, resume: bool) -> Outcome:
        """From the study to its files."""
        self._prepare()
        per_call, piece = speed(self.evaluator, self.config)
        self._open_store(resume)
        known = self.store.notes  # scores depend on the piece: a search that goes on keeps it
        self.evaluator.set_piece(known.get("piece", piece))
        with self.display, ThreadPoolExecutor(1) as background:
            self.display.stage("starting workers")
            opening = background.submit(self._open_tracker)
            status = "FAILED"
            try:
                self.pool = open_pool(self._given, self.evaluator, self.address, self.display)
                opening.result()
                if "piece" not in known:
                    if isinstance(self.pool, RayPool) and self.address is not None:
                        per_call, piece = next(self.pool.map([Speed(self.config)]))
                        self.pool.piece = piece
                    self.store.note(piece=piece)
                self.display.begins(self, per_call)
                outcome = self._work()
                status = "FINISHED"
                return outcome
            except KeyboardInterrupt:
                status = "KILLED"
                raise
            finally:
                if hasattr(self, "pool"):
                    self.pool.close()
                wait([opening])
                self.tracker.close(status)

    def _prepare(self) -> None:
        """Load the model and check what can be checked before anything runs."""
        self._given = self.config  # as workers load it
        self.evaluator = Evaluator.of(self._given)
        self.problem = self.evaluator.problem
        self.config = settled(self.config, self.problem)
        self._open_spaces()

    def _open_spaces(self) -> None:
        """The spaces, the named solvers and the budget at each NFE or cost."""
        config = self.config
        settings = config.search.settings
        self.domains = {n: domain_of(config, self.problem, n) for n in settings}
        for nfe in settings:
            self.proposer(nfe, ())
        check_names(config, self.problem)
        self.solvers = {n: starters(config, self.problem, self.domains[n]) for n in settings}
        self.limits = config.candidates(self.problem.per_sample)
        if config.search.cost and self.limits is not None:  # of plans, beside the rivals
            self.limits = {n: k + len(self.solvers[n]) for n, k in self.limits.items()}

    def _open_store(self, resume: bool) -> None:
        config = self.config
        storage = open_storage(config.search.storage, self.out)
        identity = config.identity(budget=False)
        self.store = Store(storage, config.name, self.out, identity, resume)
        if resume and not self.store.resumed:
            where = config.search.storage or self.out / "study.journal"
            self.display.note(f"{where} holds no search {config.name}: a new one begins")
        study = json.dumps(readable(config, self.problem), indent=1)
        write_text(self.out / "study.json", f"{study}\n")
        if config.prices.measure is not None:
            self._measure_prices(config.prices.measure)
        elapsed, todo = 0.0, []
        for nfe in config.search.settings:
            kept = self.store.trials(nfe, domain=self.domains[nfe]).kept()
            elapsed = max([elapsed, *(k.elapsed for k in kept)])
            first = [k for k in kept if k.generation == 0]
            limit = first[0].size if first else 1
            if len(first) < min(limit, (self.limits or {}).get(nfe, limit)):
                todo.append(nfe)
        self._begun = time.monotonic() - elapsed
        files = load_warm(config, self.problem) if todo else {}
        self.warm = {n: warm_start(files, self.domains[n], self.solvers[n].values()) for n in todo}

    def _measure_prices(self, batch: int) -> None:
        """Prices by the clock instead of the study's, those of its beginning when it goes on."""
        found = self.store.notes.get("prices")
        if found is None:
            found = dataclasses.asdict(measured_prices(self.evaluator.ode, batch))
            self.store.note(prices=found)
        self.display.note(prices_in_words(Prices(**found), batch))
        prices = self.config.prices.model_copy(update=found)
        self.config = self.config.model_copy(update={"prices": prices})
        self._given = self._given.model_copy(update={"prices": prices})
        self.evaluator.prices = priced(Prices(**found), self.problem)
        self._open_spaces()

    def _open_tracker(self) -> None:
        config, out = self.config, self.out
        if config.tracking.enabled:
            begin = beginning(config, self.store.id, out)
            tracker = MlflowTracker(tracking_uri(config), begin, out, self.display.note)
            tracker.open()
            self.tracker = tracker

    def clock(self) -> float:
        """Seconds the search has run, earlier sessions included."""
        return time.monotonic() - self._begun

    def proposer(self, nfe: int, earlier: Sequence[Evaluated]) -> Proposer | None:
        """The strategy at an NFE; None for a stage alone, which needs none.

        Raises:
            StudyError: an unknown name or option.
        """
        config, domain = self.config, self.domains[nfe]
        if config.base_strategy is None:
            if config.search.options:
                raise StudyError(
                    "search.options are those of a strategy that proposes: "
                    f"{config.search.strategy} has its own table, [{config.finish}]"
                )
            return None
        seed = int(np.random.default_rng([config.search.seed, domain.nfe]).integers(2**31))
        options, size = config.search.options, config.search.generation
        shared: dict[str, Any] = {"earlier": earlier, "options": options, "size": size}
        return Proposer(config.base_strategy, domain, seed=seed, **shared)

    def _work(self) -> Outcome:
        config = self.config
        self.teacher: Teacher | None = None
        if self.problem.has_teacher:
            cache = Path(config.teacher.cache) if config.teacher.cache else self.out / "teacher"
            problem, advance = self.evaluator.ode, self.display.advance
            self.teacher = Teacher(problem, config, self.pool, cache, advance)
        self.scorer = Scorer(self)
        self._refer(SEARCH, config.search.samples)
        if config.search.cost:
            self._refer_fits()
        for nfe in config.search.settings:
            self._search(nfe)
        spent = self._finish()
        verdicts = self._judge(spent)
        self.display.stage("writing")
        rows = write_results(self, verdicts)
        if wanted(config):
            path = regress(config, self.out, rows, self.evaluator.ode, self.pool, self.display)
            if path is not None:
                self.tracker.file(None, path)
        return Outcome(config.objective.name or "", rows, self.out, self.clock())

    def _search(self, nfe: int) -> None:
        """The candidates of one NFE."""
        begun, search = time.monotonic(), self.config.search
        nfes, what = search.settings, f"{search.word} {nfe}"
        earlier = [e for rung in self.rungs.values() for e in rung.known]
        deadline = self.config.budget.seconds
        if deadline is not None:
            deadline *= sum(nfes[: nfes.index(nfe) + 1]) / sum(nfes)
        limit = None if self.limits is None else self.limits[nfe]
        climbs = search.ladder and not search.cost
        self.rungs[nfe] = rung = Rung(self, nfe, earlier if climbs else [], limit, deadline)
        for name, made in Counter(p.source for p in self.warm.get(nfe, ())).items():
            self.display.note(f"{what}: {made} candidates from {name}")
        self.display.stage(f"{what}: named solvers")
        rung.run()
        if limit is not None and search.race:
            full = limit * search.samples * nfe * self.problem.per_sample
            self.display.saved(full - sum(rung.costs))
        best, named = best_of(rung.known), best_of(rung.named_known())
        text = f"{what}: best {best.score:.4g} of {len(rung.known)} candidates" if best else what
        if named is not None:
            text += f", best named {named.score:.4g} (search noise)"
        self.display.note(f"{text}, {duration(time.monotonic() - begun)}")

    def _finish(self) -> dict[int, int]:
        """The last stage of the strategy; its network evaluations by NFE."""
        if self.config.finish is None:
            return {}
        self._refer_fits()
        return finish_rungs(self)

    def _refer_fits(self) -> None:
        """The teacher's samples on the noise that fits use, and their mean, if they may use it."""
        config = self.config
        for stream, size in streams(config):
            self._refer(stream, size)
        if TRAIN in self.endpoints and config.refine.mean:
            self.mean = self.endpoints[TRAIN].mean(0)

    def cost_of(self, schedule: Any) -> int:
        """Network evaluations of one sample of a schedule, by the study's prices if it has any."""
        prices, problem = self.evaluator.prices, self.problem
        if prices is None:
            return int(schedule.nfe) * self.problem.per_sample
        guided = isinstance(problem, Problem) and problem.guidance not in (None, 1)
        cost: float = schedule.program.cost(prices, guided=guided)
        return round(cost)

    def _judge(self, spent: Mapping[int, int]) -> list[Verdict]:
        """What was found against the named solvers, on fresh noise."""
        config, own_error = self.config, None
        self._refer(FRESH, config.final.samples)
        if self.teacher is not None:
            self.display.stage("teacher against itself")
            own_error = self.teacher.self_error(FRESH, self.endpoints[FRESH])
        objective, seed = self.evaluator.objective, config.search.seed
        judge = Judge(self.scorer, objective, config.final, self._refer, seed)
        verdicts = []
        for nfe, rung in self.rungs.items():
            self.display.stage(f"{config.search.word} {nfe}: fresh seeds")
            verdict = judge.verdict(nfe, rung.known, len(rung.named_known()))
            if verdict.row.note:
                self.display.note(f"{config.search.word} {nfe}: {verdict.row.note}")
            row = replace(
                verdict.row,
                teacher_self_error=own_error,
                calls_spent=sum(rung.costs) + spent.get(nfe, 0),
                guidance=config.scale,
                failed_stage="; ".join(rung.failures),
                **self._sorts(nfe, verdict),
            )
            verdicts.append(self._with_features(replace(verdict, row=row)))
        return verdicts

    def _sorts(self, nfe: int, verdict: Verdict) -> dict[str, Any]:
        """Calls, depth and cost of what was found."""
        program = getattr(verdict.found, "program", None)
        if not isinstance(program, Program):
            return {}
        if not self.config.search.cost:
            return {"depth": program.depth}
        told = {"cost": nfe, "calls": pattern(program, guided=program.guidance is not None)}
        return told | {"nfe": program.nfe, "depth": program.depth}

    def _with_features(self, verdict: Verdict) -> Verdict:
        """The verdict with its paired Frechet distances, where the problem has features."""
        evaluator = self.evaluator
        if (
            not self.problem.has_teacher
            or evaluator.ode.features is None
            or verdict.errors is None
        ):
            return verdict
        count = verdict.row.samples
        ends = self.endpoints[FRESH][:count]
        aim = Frechet(evaluator.features).measure(ends[None], ends)[0].double().cpu().numpy()
        if count <= 2 * aim.shape[1]:
            return verdict  # fewer samples than a covariance needs
        size, scores = self.config.search.block[1], []
        for schedule in (verdict.found, verdict.best_named):
            blocks = Block.cover([schedule], FRESH, range(count), size, want="features")
            scores.append(frechet_distance(gathered(self.pool, blocks), aim))
        frechet = dict(zip(("found", "named"), scores, strict=True))
        return replace(verdict, row=replace(verdict.row, frechet=frechet))

    def _refer(self, stream: str, samples: int) -> Array:
        """The teacher's end points of a stream, given to every worker, and their measures."""
        if len(self.references.get(stream, ())) >= samples:
            return self.references[stream][:samples]
        if self.teacher is None:
            self.references[stream] = np.zeros((samples, 0))
            return self.references[stream]
        self.display.stage(f"teacher, {self.config.teacher.nfe} calls ({stream})")
        endpoints = self.teacher.reference(stream, samples)
        self.endpoints[stream] = endpoints
        self.pool.share(stream, endpoints)
        objective = self.evaluator.objective
        if objective.per_sample and objective.statistic == "backward":
            gain = self.teacher.gain(stream, samples)
            self.references[stream] = gain
            return gain
        with torch.no_grad():
            measures = objective.measure(endpoints[None], endpoints)
        self.references[stream] = np.asarray(measures[0].to(torch.float32).to(torch.float64))
        return self.references[stream]

    def on_progress(self, rung: Rung, numbers: Mapping[str, float]) -> None:
        """Show and report where a rung is after a generation, and numbers of the generation."""
        nfe, known = rung.nfe, rung.known
        best, named = best_of(known), best_of(rung.named_known())
        self.tracker.curve(nfe, f"best_{self.config.objective.name}", best_so_far(known))
        for name, value in numbers.items():
            self.tracker.curve(nfe, name, [(len(known) - 1, value)])
        if best is None:
            return
        text = f"{self.config.search.word} {nfe}: {len(known)} candidates, "
        text += f"best {best.score:.3g}"
        if named is not None:
            share = best.score / named.score
            text += f" ({share:.2f} of {named.source})"
        self.display.stage(text)
