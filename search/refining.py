"""Refinement inside a search: the best few candidates of every NFE, on the workers, all at once.

One task refines at one NFE, from several starts, on noise of its own ("train", "held"), which
neither ranks candidates nor reports results. What becomes of it: `finishing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.ode import start_scale
from fewstep.search.config import RefineTable
from fewstep.search.problem import conditions, noise_of
from fewstep.search.strategies import Evaluated
from fewstep.search.strategies.closed_form import by_closed_form
from fewstep.search.strategies.fitting import Batch, Settings
from fewstep.search.strategies.knobs import open_knobs
from fewstep.search.strategies.refine import refine_best
from fewstep.search.work import Evaluator, Single
from fewstep.space import OdeSchedule, load_schedule

TRAIN, HELD = "train", "held"


@dataclass(frozen=True)
class Improved:
    """What a stage made of its starts.

    Args:
        schedule: the file form; None if it failed.
        note: numbers for the trial.
        start_used: which start it came from.
        message: why it failed, "" if it did not.
        evaluations: network evaluations.
    """

    schedule: dict[str, Any] | None = None
    note: dict[str, Any] = field(default_factory=dict)
    start_used: int = 0
    message: str = ""
    evaluations: int = 0


@dataclass(frozen=True)
class RefineTask(Single):
    """The starts of one NFE, to refine.

    Args:
        schedules: the starts' file forms; all have one scale of x_T.
        constant: the constant image that they start from or may use, if there is one.
        table: the study's [refine].
        seed: of the minibatches.
        featured: minimise the distance of the objective's features instead of the samples'.
    """

    schedules: tuple[dict[str, Any], ...]
    constant: Tensor | None
    table: RefineTable
    seed: int
    featured: bool

    def failed(self, status: str, message: str) -> Improved:
        """See `Work`: a stage that fails is said and left out."""
        return Improved(message=f"{message} ({status})")

    def run(self, evaluator: Evaluator) -> Improved:
        """Refine on the evaluator's problem."""
        table = self.table
        denoiser = evaluator.ode.denoiser
        starts: list[OdeSchedule] = [load_schedule(s) for s in self.schedules]
        if self.constant is not None:
            starts = [s.with_constant(self.constant) if s.first == "mean" else s for s in starts]
        settings = Settings(
            knobs=open_knobs(table.knobs),
            method=table.method,
            steps=table.steps,
            rounds=table.rounds,
            batch=table.batch,
            rate=table.rate,
            history=table.history,
            checkpointed=table.checkpointed,
            features=evaluator.ode.features if self.featured else None,
        )
        scale = start_scale(starts[0])
        train = self._batch(evaluator, TRAIN, table.samples, scale)
        held = self._batch(evaluator, HELD, table.held, scale)
        begins, spent = starts, 0
        if table.closed_form:
            fitted = [by_closed_form(s, denoiser, train, held, settings) for s in starts]
            begins, spent = [f.schedule for f in fitted], sum(f.calls for f in fitted)
        at, found = refine_best(begins, denoiser, train, held, settings, seed=self.seed)
        before = fitted[at].before if table.closed_form else found.before
        note = {
            "refined_from": starts[at].digest,
            "refine_before": before,
            "refine_after": found.after,
            "refine_method": found.method,
            "refine_calls": spent + found.calls,
        }
        return Improved(found.schedule.to_dict(), note, at, evaluations=spent + found.calls)

    def _batch(self, evaluator: Evaluator, stream: str, size: int, scale: float) -> Batch:
        problem, indices = evaluator.ode, range(size)
        z = noise_of(evaluator.seed, stream, indices, problem.shape).to(evaluator.device)
        cond = {k: v.to(z.device) for k, v in (conditions(problem, indices) or {}).items()}
        target = evaluator.reference(stream)[:size]
        return Batch(scale * z, target.to(torch.float32), cond, problem.guidance, self.constant)


def best_starts(
    known: Sequence[Evaluated],
    top: int,
    named: Sequence[Evaluated] = (),
    constant: Tensor | None = None,
) -> list[Evaluated]:
    """The best `top` distinct candidates, and the best of `named`: scored, deterministic.

    All have the best one's scale of x_T and run-time options, and its constant image, `constant`
    where it has none, or none: they share the noise they are fitted on.
    """
    found: dict[str, Evaluated] = {}

    def take(candidates: Sequence[Evaluated], limit: int) -> None:
        for e in sorted((e for e in candidates if e.status == "ok"), key=lambda e: e.score):
            if len(found) >= limit:
                return
            s = e.schedule
            if not isinstance(s, OdeSchedule) or s.program.stochastic or "time_shift" in s.options:
                continue
            first = next(iter(found.values()), e).schedule
            if start_scale(s) != start_scale(first) or s.options != first.options:
                continue
            image = constant if first.constant is None else first.constant
            theirs = s.constant
            if theirs is None:
                shared = constant is not None or image is None
            else:
                shared = image is not None and torch.equal(theirs, image)
            if shared:
                found.setdefault(s.digest, e)

    take(known, top)
    take(named, len(found) + 1)
    return list(found.values())


def refine_cost(table: RefineTable, nfe: int) -> int:
    """Network evaluations of refining at one NFE, at most (a backward pass counts twice)."""
    if table.method == "adam":
        looks = table.steps // Settings.every + 2
        full = nfe * (3 * table.steps * table.batch + looks * table.held)
        return full + (table.top + 1) * full // 5
    image = 1 if table.mean else 0  # a weight more in every row, and two of the start
    jacobian = sum((c + 2 + image) * (nfe - 1 - c) + nfe - c for c in range(nfe))
    jacobian += (4 + 2 * image) * nfe
    few, last = min(table.batch, table.samples), max(1, table.rounds // 2)
    tried, polished = (table.top + 2) * table.rounds, (table.top + 1) * last * (1 + image)
    on_all = (2 + image) * last
    looks = (tried + polished + on_all + 4) * table.held * nfe
    return jacobian * (few * (tried + polished) + table.samples * on_all) + looks
