"""The driver: from a study to schedule files, and the evidence beside them.

    study -> problem, named solvers, space, strategy -> teacher -> per NFE: generations -> verdict
    on fresh noise -> files, MLflow

Everything that decides a result comes from the study; what was already done comes from the log, so
a killed search goes on where it stopped and ends as if it had not been.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.search.config import StudyConfig
from fewstep.search.display import Display, Silent, count, duration
from fewstep.search.family import family_of
from fewstep.search.guided import regress_all, search_each
from fewstep.search.objective import Frechet, frechet_distance
from fewstep.search.pool import Pool, cpus
from fewstep.search.preparing import (
    check_names,
    evaluator_spec,
    freeze,
    make_strategy,
    open_pool,
    speed,
    starters,
)
from fewstep.search.record import Record, prepare_out
from fewstep.search.results import drawn, write_results
from fewstep.search.rung import SEARCH, Progress, Rung, best_so_far
from fewstep.search.scoring import Scorer
from fewstep.search.stages.cpr import cpr_cost, regress, wanted
from fewstep.search.stages.improve import finish_cost, finish_rungs
from fewstep.search.stages.refine import HELD, TRAIN
from fewstep.search.strategies import Proposal, Strategy
from fewstep.search.study import TrialTable, open_storage, study_name
from fewstep.search.teacher import Teacher
from fewstep.search.tracking import MlflowTracker, NoTracker, Tracker
from fewstep.search.verdict import FRESH, Judge, Row, Verdict, final_cost, with_frechet
from fewstep.search.warm import load_warm, warm_start
from fewstep.search.work import Evaluator
from fewstep.search.yardstick import Array
from fewstep.space.protocol import Domain

log = logging.getLogger(__name__)


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
        resume: go on with the search in `out`.
        overwrite: discard the search in `out`.
        address: Ray cluster; None joins RAY_ADDRESS or starts one on loopback.
        display: where progress is shown.

    Returns:
        The rows of results.json.

    Raises:
        FewstepError: a study, a model or a folder that cannot be used.
    """
    display = display or Silent()
    with Record(prepare_out(out, resume=resume, overwrite=overwrite)) as record:
        if len(config.search.guidance or ()) < 2:
            return _Search(config, out, record, display, address).run()
        freeze(config, out, record)
        seconds, objective = 0.0, ""

        def one(part: StudyConfig, folder: Path, begun: bool) -> Sequence[Row]:
            nonlocal seconds, objective
            going = begun and not overwrite
            found = search(
                part, folder, resume=going, overwrite=overwrite, address=address, display=display
            )
            seconds, objective = seconds + found.seconds, found.objective
            return found.rows

        rows = search_each(config, out, one, display)
        begun = time.monotonic()
        if wanted(config):
            regress_all(config, out, rows, address, display)
        seconds += time.monotonic() - begun
        return Outcome(objective, tuple(rows), out, seconds)


class _Search:
    def __init__(
        self, config: StudyConfig, out: Path, record: Record, display: Display, address: str | None
    ) -> None:
        self.config, self.out, self.record, self.display, self.address = (
            config,
            out,
            record,
            display,
            address,
        )
        self._begun = time.monotonic() - record.elapsed
        self._references: dict[str, Array] = {}
        self._endpoints: dict[str, Tensor] = {}
        self._warm: dict[int, list[Proposal]] = {}

    def clock(self) -> float:
        """Seconds the search has run, earlier sessions included."""
        return time.monotonic() - self._begun

    def run(self) -> Outcome:
        spec = evaluator_spec(self.config)
        evaluator = Evaluator.from_spec(spec)
        self.family = family = family_of(evaluator.problem)
        self.config = config = family.settle(self.config)
        freeze(config, self.out, self.record)
        domains = {nfe: family.domain(config, nfe) for nfe in config.search.nfe}
        strategies = {nfe: make_strategy(config, domain) for nfe, domain in domains.items()}
        check_names(config, family)
        solvers = {nfe: starters(config, family, nfe) for nfe in config.search.nfe}
        per_call = speed(evaluator, config, family)
        begin = [nfe for nfe in config.search.nfe if self._first_time(nfe)]
        files = load_warm(config, family) if begin else {}
        self._warm = {n: warm_start(files, domains[n], solvers[n].values()) for n in begin}
        storage = open_storage(config.search.storage, self.out)
        tracker: Tracker = NoTracker()
        if config.tracking.enabled:
            tracker = MlflowTracker(
                config.tracking.uri, config.tracking.experiment, config.search.nfe
            )
        with self.display, ThreadPoolExecutor(1) as background:
            self.display.stage("starting workers")
            opening = background.submit(self._open_tracker, tracker)
            status, pool = "FAILED", None
            try:
                pool = open_pool(config, spec, evaluator, self.address)
                runs = opening.result()
                self._announce(per_call, pool, list(next(iter(solvers.values()))))
                outcome = self._work(
                    evaluator, pool, tracker, runs, storage, domains, strategies, solvers
                )
                status = "FINISHED"
                return outcome
            except KeyboardInterrupt:
                status = "KILLED"
                raise
            finally:
                if pool is not None:
                    pool.close()
                wait([opening])
                tracker.close(status)

    def _open_tracker(self, tracker: Tracker) -> dict[str, str]:
        runs = tracker.open(
            self.config.name, self.config.identity(), self.record.notes.get("mlflow", {})
        )
        if runs and runs != self.record.notes.get("mlflow"):
            self.record.note(mlflow=runs)
        return runs

    def _announce(self, per_call: float, pool: Pool, solvers: list[str]) -> None:
        config, final, weight = self.config, self.config.final, self.family.per_sample
        reference = 0
        if self.family.has_teacher:
            check = 2 * min(config.teacher.check, final.samples)
            reference = (config.search.samples + 2 * final.samples + check) * config.teacher.nfe
        verdict = weight * sum(final_cost(nfe, final) for nfe in config.search.nfe)
        candidates = config.candidates(weight)
        at_once = max(1, min(pool.workers, cpus()) if self.address is None else pool.workers)
        where = f"{pool.workers} workers" if pool.workers else "this process"
        if candidates is None and config.budget.calls is not None:
            total = config.budget.calls + reference + verdict + self._last()
            self.display.total(total)
            self.display.note(
                f"{config.name}: {count(config.budget.calls)} network evaluations of racing "
                f"candidates, {count(total)} in all on {where}, about "
                f"{duration(total * per_call / at_once)} ({per_call * 1e6:.0f} µs each, measured) "
                "and the strategy's own time"
            )
            return
        if candidates is None:
            seconds = (config.budget.seconds or 0) + (reference + verdict) * per_call / at_once
            self.display.total(None)
            self.display.note(
                f"{config.name}: {config.budget.seconds:g} s of search on {where}, about "
                f"{duration(seconds)} in all; "
                "a budget in seconds makes the result depend on the machine"
            )
            return
        if config.base_strategy is None:
            candidates = {
                nfe: min(n, len(solvers) + len(self._warm.get(nfe, ())))
                for nfe, n in candidates.items()
            }
        trials = config.search.samples * sum(nfe * n for nfe, n in candidates.items())
        total = weight * trials + reference + verdict + self._last()
        self.display.total(total)
        asked = ", ".join(f"{n} at NFE {nfe}" for nfe, n in candidates.items())
        each, most = f"each on {config.search.samples} samples", ""
        if config.search.race:
            each, most = f"racing on {' -> '.join(map(str, config.search.levels))} samples", "≤ "
        self.display.note(
            f"{config.name}: {asked}, {each}; "
            f"{most}{count(total)} network evaluations on {where}, about "
            f"{duration(total * per_call / at_once)} ({per_call * 1e6:.0f} µs each, measured) "
            "and the strategy's own time"
        )

    def _last(self) -> int:
        """Network evaluations of the last stages, at most."""
        fitting = cpr_cost(self.config, 1) if wanted(self.config) else 0
        return finish_cost(self.config) + fitting

    def _work(
        self,
        evaluator: Evaluator,
        pool: Pool,
        tracker: Tracker,
        runs: Mapping[str, str],
        storage: Any,
        domains: Mapping[int, Domain],
        strategies: Mapping[int, Strategy | None],
        solvers: Mapping[int, Mapping[str, Any]],
    ) -> Outcome:
        config, family = self.config, self.family
        teacher = self._teacher(evaluator, pool) if family.has_teacher else None
        limits = config.candidates(family.per_sample)
        scorer = Scorer(
            pool,
            evaluator.objective,
            family,
            self.record,
            self._references,
            block=config.search.block,
            clock=self.clock,
            advance=self.display.advance,
        )

        def refer(stream: str, samples: int) -> Array:
            return self._refer(teacher, evaluator, pool, stream, samples)

        refer(SEARCH, config.search.samples)
        rungs: dict[int, Rung] = {}
        for k, nfe in enumerate(config.search.nfe):
            fresh = not self.record.generations
            table = TrialTable(
                storage,
                study_name(config.name, nfe),
                domains[nfe],
                fresh=fresh or self._first_time(nfe),
            )
            table.remember(
                mlflow_run=runs.get(str(nfe), ""), mlflow_parent_run=runs.get("parent", "")
            )
            begun = time.monotonic()
            earlier = [e for rung in rungs.values() for e in rung.known]
            rungs[nfe] = rung = Rung(
                nfe,
                config,
                solvers[nfe],
                strategies[nfe],
                scorer=scorer,
                record=self.record,
                table=table,
                earlier=earlier if config.search.ladder else [],
                clock=self.clock,
                limit=None if limits is None else limits[nfe],
                deadline=self._deadline(k),
                told=self._teller(nfe, tracker),
                warm=self._warm.get(nfe, ()),
            )
            for name, made in Counter(p.source for p in self._warm.get(nfe, ())).items():
                self.display.note(f"NFE {nfe}: {made} candidates from {name}")
            self.display.stage(f"NFE {nfe}: named solvers")
            rung.run()
            self._say_rung(nfe, rung, time.monotonic() - begun)
        extra: dict[int, int] = {}
        if config.finish == "refine":
            for stream, size in ((TRAIN, config.refine.samples), (HELD, config.refine.held)):
                refer(stream, size)
        if config.finish is not None:
            wants_mean = config.finish == "refine" and config.refine.mean
            mean = self._endpoints[TRAIN].mean(0) if wants_mean else None
            extra = finish_rungs(config, pool, rungs, self.display, mean)
        own_error = None
        refer(FRESH, config.final.samples)
        if teacher is not None:
            self.display.stage("teacher against itself")
            own_error = teacher.self_error(FRESH, self._endpoints[FRESH], self.display.advance)
        judge = Judge(scorer, evaluator.objective, config.final, refer, config.search.seed)
        verdicts: list[Verdict] = []
        for nfe in config.search.nfe:
            self.display.stage(f"NFE {nfe}: fresh seeds")
            verdict = judge.verdict(
                nfe,
                rungs[nfe].known,
                len(rungs[nfe].named_known()),
                teacher_self_error=own_error,
                calls_spent=sum(rungs[nfe].costs) + extra.get(nfe, 0),
            )
            if verdict.row.note:
                self.display.note(f"NFE {nfe}: {verdict.row.note}")
            row = replace(verdict.row, guidance=config.scale)
            verdicts.append(self._with_features(replace(verdict, row=row), evaluator, pool))
        self.display.stage("writing")
        rows = write_results(
            config,
            self.out,
            evaluator.problem,
            family,
            pool,
            tracker,
            runs,
            verdicts,
            found={nfe: rung.known for nfe, rung in rungs.items()},
            named={nfe: len(rung.named_known()) for nfe, rung in rungs.items()},
            endpoints=self._endpoints.get(FRESH),
        )
        if wanted(config):
            path = regress(config, self.out, rows, evaluator.ode, pool, self.display)
            if path is not None:
                tracker.file(None, path)
        return Outcome(config.objective.name or "", rows, self.out, self.clock())

    def _with_features(self, verdict: Verdict, evaluator: Evaluator, pool: Pool) -> Verdict:
        """The verdict with its paired Frechet distances, where the problem has features."""
        if not self.family.has_teacher or evaluator.ode.features is None or verdict.errors is None:
            return verdict
        count = verdict.row.samples
        ends = self._endpoints[FRESH][:count]
        aim = Frechet(evaluator.features).measure(ends[None], ends)[0].double().cpu().numpy()
        if count <= 2 * aim.shape[1]:
            return verdict  # fewer samples than a covariance needs
        block = self.config.search.block[1]
        features = (
            drawn(pool, s, FRESH, count, "features", block)
            for s in (verdict.found, verdict.best_named)
        )
        found, named = (frechet_distance(each, aim) for each in features)
        return with_frechet(verdict, found, named)

    def _teacher(self, evaluator: Evaluator, pool: Pool) -> Teacher:
        config = self.config
        cache = Path(config.teacher.cache) if config.teacher.cache else self.out / "teacher"
        return Teacher(
            evaluator.ode,
            config.teacher,
            pool,
            cache,
            seed=config.search.seed,
            block=config.search.block[1],
        )

    def _first_time(self, nfe: int) -> bool:
        return (nfe, 0) not in self.record.generations

    def _deadline(self, k: int) -> float | None:
        if self.config.budget.seconds is None:
            return None
        nfes = self.config.search.nfe
        return self.config.budget.seconds * sum(nfes[: k + 1]) / sum(nfes)

    def _refer(
        self, teacher: Teacher | None, evaluator: Evaluator, pool: Pool, stream: str, samples: int
    ) -> Array:
        """The teacher's end points of a stream, given to every worker, and their measures."""
        if stream in self._references and len(self._references[stream]) >= samples:
            return self._references[stream][:samples]
        if teacher is None:
            self._references[stream] = np.zeros((samples, 0))
            return self._references[stream]
        self.display.stage(f"teacher, {self.config.teacher.nfe} calls ({stream})")
        endpoints = teacher.reference(stream, samples, self.display.advance).samples
        self._endpoints[stream] = endpoints
        pool.share(stream, endpoints)
        if evaluator.objective.per_sample and evaluator.objective.statistic == "backward":
            self._references[stream] = teacher.gain(stream, samples, self.display.advance)
            return self._references[stream]
        with torch.no_grad():
            measures = evaluator.objective.measure(endpoints[None], endpoints)
        self._references[stream] = np.asarray(measures[0].to(torch.float32).to(torch.float64))
        return self._references[stream]

    def _teller(self, nfe: int, tracker: Tracker) -> Callable[[Progress], None]:
        def told(progress: Progress) -> None:
            tracker.curve(nfe, f"best_{self.config.objective.name}", progress.curve)
            for name, value in progress.numbers.items():
                tracker.curve(nfe, name, [(progress.trials - 1, value)])
            if progress.best is not None:
                text = f"NFE {nfe}: {progress.trials} candidates, best {progress.best.score:.3g}"
                if progress.named is not None:
                    share = progress.best.score / progress.named.score
                    text += f" ({share:.2f} of {progress.named.source})"
                self.display.stage(text)

        return told

    def _say_rung(self, nfe: int, rung: Rung, seconds: float) -> None:
        points = best_so_far(rung.known)
        named_points = best_so_far(rung.named_known())
        text = f"NFE {nfe}: best {points[-1][1]:.4g} of {len(rung.known)} candidates"
        if named_points:
            text += f", best named {named_points[-1][1]:.4g} (search noise)"
        self.display.note(f"{text}, {duration(seconds)}")
