"""The stage that refines the best candidates of every NFE, on the workers.

One task refines at one NFE, from several starts (`stages.fit`), on noise of its own ("train",
"held"), which neither ranks candidates nor reports results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.ode import start_scale
from fewstep.search.problem import conditions, noise_of
from fewstep.search.stages.fit import Startable, refine
from fewstep.search.strategies import Evaluated
from fewstep.search.strategies.gauss_newton import Batch
from fewstep.search.tables import RefineTable
from fewstep.search.work import Evaluator, Work
from fewstep.space import OdeSchedule, ProgramSchedule

TRAIN, HELD = "train", "held"


@dataclass(frozen=True)
class Improved:
    """What a stage made of its starts.

    Args:
        schedule: None if it failed.
        note: numbers for the trial.
        start_used: which start it came from.
        message: why it failed, "" if it did not.
        evaluations: network evaluations.
    """

    schedule: Startable | None = None
    note: dict[str, Any] = field(default_factory=dict)
    start_used: int = 0
    message: str = ""
    evaluations: int = 0


@dataclass(frozen=True)
class RefineTask(Work):
    """The starts of one NFE, to refine.

    Args:
        schedules: the starts; all have one scale of x_T.
        constant: the constant image that they start from or may use, if there is one.
        table: the study's [refine].
        featured: minimise the distance of the problem's features instead of the samples'.
    """

    schedules: tuple[Startable, ...]
    constant: Tensor | None
    table: RefineTable
    featured: bool

    def limit(self, block: float | None) -> float | None:
        """See `Work`."""
        return self.table.timeout

    def failed(self, status: str, message: str) -> Improved:
        """See `Work`: a stage that fails is said and left out."""
        return Improved(message=f"{message} ({status})")

    def run(self, evaluator: Evaluator) -> Improved:
        """Refine on the evaluator's problem."""
        table, starts = self.table, self.schedules
        shared: dict[str, Any] = {
            "scale": start_scale(starts[0]),
            "constant": self.constant,
            "options": starts[0].options,
            "features": evaluator.features if self.featured else None,
            "piece": table.batch,
        }
        train = batch_of(evaluator, TRAIN, table.samples, **shared)
        held = batch_of(evaluator, HELD, table.held, **shared)
        found = refine(starts, evaluator.ode.denoiser, train, held, table)
        note = {
            "refined_from": starts[found.start].digest,
            "refine_before": found.before,
            "refine_after": found.after,
            "refine_samples": found.samples,
            "refine_calls": found.calls,
        }
        return Improved(found.schedule, note, found.start, evaluations=found.calls)


def batch_of(
    evaluator: Evaluator,
    stream: str,
    size: int,
    *,
    reference: str | None = None,
    scale: float = 1.0,
    **more: Any,
) -> Batch:
    """The first samples of a stream on the model's device, and the teacher's of them.

    Args:
        evaluator: has the problem, and the teacher's end points.
        stream: which noise.
        size: how many samples.
        reference: name of the end points [the stream's].
        scale: of x_T.
        more: further fields of `Batch`; guidance is the problem's where none is given.
    """
    problem, indices = evaluator.ode, range(size)
    z = noise_of(evaluator.seed, stream, indices, problem.shape).to(evaluator.device)
    target = evaluator.reference(reference or stream)[:size].to(torch.float32)
    cond = {k: v.to(z.device) for k, v in (conditions(problem, indices) or {}).items()}
    return Batch(scale * z, target, cond, **({"guidance": problem.guidance} | more))


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
            if not isinstance(s, OdeSchedule | ProgramSchedule) or s.program.stochastic:
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
            if shared and "time_shift" not in s.options:
                found.setdefault(s.digest, e)

    take(known, top)
    take(named, len(found) + 1)
    return list(found.values())


def refine_cost(table: RefineTable, nfe: int) -> int:
    """Network evaluations of refining at one NFE, as fits usually go.

    All samples are needed, and two thirds of the rounds.
    """
    image = 1 if table.mean else 0  # a weight more in every row, and one of the start
    jacobian = sum((c + 2 + image) * (nfe - 1 - c) + nfe - c for c in range(nfe))
    jacobian += (5 + image) * nfe  # the start's numbers, and the steps tried
    few, rounds = min(table.batch, table.samples), max(1, 2 * table.rounds // 3)
    on_more, starts = max(1, table.rounds // 3), table.top + 1
    seen, size, looks = few * rounds * starts, few, rounds * starts
    while size < table.samples:
        size = min(4 * size, table.samples)
        seen, looks = seen + on_more * size, looks + on_more
    return jacobian * seen + table.held * nfe * looks
