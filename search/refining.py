"""Refinement inside a search: the best few candidates of every NFE, on the workers, all at once.

One task refines one schedule on noise of its own ("train", "held"), which neither ranks candidates
nor reports results. What becomes of it: `finishing`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers.ode import start_scale
from fewstep.search.config import RefineTable
from fewstep.search.evaluate import Evaluator, TaskResult
from fewstep.search.problem import conditions, noise_of
from fewstep.search.strategies import Evaluated
from fewstep.search.strategies.knobs import open_knobs
from fewstep.search.strategies.refine import Batch, Settings, refine
from fewstep.space import OdeSchedule, load_schedule

TRAIN, HELD = "train", "held"


@dataclass(frozen=True)
class RefineResult(TaskResult):
    """What refining one schedule gave; `schedule` is None if it failed."""

    schedule: dict[str, Any] | None = None
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RefineTask:
    """One schedule to refine; what a pool asks of a block, it answers as a block of one.

    Args:
        schedule: the schedule's file form.
        constant: its constant image, if it has one.
        table: the study's [refine].
        seed: of the minibatches.
        featured: minimise the distance of the objective's features instead of the samples'.
    """

    schedule: dict[str, Any]
    constant: Tensor | None
    table: RefineTable
    seed: int
    featured: bool
    strict: bool = False
    candidates: int = 1
    start: int = 0
    stop: int = 1

    def only(self, index: int) -> RefineTask:
        """The task of one candidate: this one."""
        return self

    def execute(self, evaluator: Evaluator) -> RefineResult:
        """Refine on the evaluator's problem."""
        begun, table = time.perf_counter(), self.table
        schedule: OdeSchedule = load_schedule(self.schedule)
        if self.constant is not None:
            schedule = schedule.with_constant(self.constant)
        features = evaluator.ode.features if self.featured else None
        settings = Settings(
            knobs=open_knobs(table.knobs),
            method=table.method,
            steps=table.steps,
            rounds=table.rounds,
            batch=table.batch,
            rate=table.rate,
            history=table.history,
            checkpointed=table.checkpointed,
            features=features,
        )
        scale = start_scale(schedule)
        train = self._batch(evaluator, TRAIN, table.samples, scale)
        held = self._batch(evaluator, HELD, table.held, scale)
        [found] = refine([schedule], evaluator.ode.denoiser, train, held, settings, seed=self.seed)
        note = {
            "refined_from": schedule.digest,
            "refine_before": found.before,
            "refine_after": found.after,
            "refine_method": found.method,
            "refine_calls": found.calls,
        }
        values = np.full((1, 1, 1), found.after)
        seconds = time.perf_counter() - begun
        body = found.schedule.to_dict()
        return RefineResult(values, ("ok",), ("",), found.calls, seconds, body, note)

    def _batch(self, evaluator: Evaluator, stream: str, size: int, scale: float) -> Batch:
        problem, indices = evaluator.ode, range(size)
        z = noise_of(evaluator.seed, stream, indices, problem.shape)
        cond = conditions(problem, indices) or {}
        target = evaluator.reference(stream)[:size]
        return Batch(scale * z, target.to(torch.float32), cond, problem.guidance)


def best_starts(known: Sequence[Evaluated], top: int) -> list[Evaluated]:
    """The best `top` distinct candidates that can be refined: scored, deterministic."""
    found: dict[str, Evaluated] = {}
    for e in sorted((e for e in known if e.status == "ok"), key=lambda e: e.score):
        if isinstance(e.schedule, OdeSchedule) and not e.schedule.program.stochastic:
            found.setdefault(e.schedule.digest, e)
        if len(found) == top:
            break
    return list(found.values())


def refine_cost(table: RefineTable, nfe: int) -> int:
    """Network evaluations of refining at one NFE, at most (Adam; a backward pass counts twice)."""
    looks = table.steps // Settings.every + 2
    return table.top * nfe * (3 * table.steps * table.batch + looks * table.held)
