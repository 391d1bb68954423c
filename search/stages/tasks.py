"""What is fitted on workers: the starts of one NFE to refine, a base to compensate, a plan.

All fit on noise of their own, which neither ranks candidates nor reports results
(`predictors.refine`, `predictors.compensate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.predictors.compensate import compensate
from fewstep.predictors.gauss_newton import Batch
from fewstep.predictors.refine import Fitted, Startable, refine
from fewstep.predictors.settings import CompensationTable, RefineTable
from fewstep.samplers.denoiser import Counted
from fewstep.samplers.ode import start_scale
from fewstep.samplers.streams import Span, begun, ode_samples
from fewstep.search.config import StudyConfig
from fewstep.search.strategies import Evaluated, ranked
from fewstep.search.work import Evaluator, Work, reason
from fewstep.space import OdeSchedule, ProgramSchedule
from fewstep.space.costs import stages
from fewstep.space.errors import FewstepError
from fewstep.space.plans import PlanDomain, widened_to

TRAIN, HELD, COMPENSATE = "train", "held", "compensate"
"""The streams of noise."""


@dataclass(frozen=True)
class StageTask(Work):
    """Starts to fit, by the study's table; one that fails or hangs is said and left out."""

    schedules: tuple[Startable, ...]
    table: RefineTable | CompensationTable

    def limit(self, block: float | None) -> float | None:
        """See `Work`."""
        return self.table.timeout

    def failed(self, status: str, message: str) -> Fitted:
        """See `Work`."""
        return Fitted(self.schedules[0], message=f"{message} ({status})")


@dataclass(frozen=True)
class RefineTask(StageTask):
    """The starts of one NFE, to refine.

    Args:
        schedules: the starts; all have one scale of x_T.
        table: the study's [refine].
        constant: the constant image that they start from or may use, if there is one.
        featured: minimise the distance of the problem's features instead of the samples'.
        teacher: where it is given, the best start is also fitted at half the guidance scale, to
            this schedule's samples, and the result is one more start: under strong guidance a fit
            can get further from there (`experiments/RESULTS.md`).
    """

    table: RefineTable
    constant: Tensor | None
    featured: bool
    teacher: OdeSchedule | None = None

    def run(self, evaluator: Evaluator) -> Fitted:
        """Refine on the evaluator's problem."""
        denoiser = Counted(evaluator.ode.denoiser, evaluator.prices)
        starts = (*self.schedules, *self._halved(evaluator, denoiser))
        batches = self._batches(evaluator, self.table)
        found = refine(starts, denoiser, *batches, self.table)
        halved = found.start == len(self.schedules)
        begun = 0 if halved else found.start
        return replace(found, start=begun, halved=halved, calls=denoiser.evaluations)

    def _halved(self, evaluator: Evaluator, denoiser: Counted) -> tuple[Startable, ...]:
        """The first start fitted at half the guidance scale, where that is asked for."""
        problem, few = evaluator.ode, min(self.table.batch, self.table.samples)
        if self.teacher is None or problem.guidance is None:
            return ()
        half = problem.guidance / 2
        for stream in (TRAIN, HELD):
            span = Span(evaluator.seed, stream, range(few))
            asked: dict[str, Any] = {"denoiser": denoiser, "guidance": half, "strict": True}
            ends = ode_samples(problem, [self.teacher], span, **asked)[0]
            evaluator.share(f"{stream}/halved", ends)
        table = self.table.model_copy(update={"samples": few, "held": few})
        batches = self._batches(evaluator, table, "/halved", guidance=half)
        return (refine(self.schedules[:1], denoiser, *batches, table).schedule,)

    def _batches(
        self, evaluator: Evaluator, table: RefineTable, of: str = "", **more: Any
    ) -> tuple[Batch, Batch]:
        """Noise to fit on and to choose by, with the end points called so."""
        first = self.schedules[0]
        more |= {"scale": start_scale(first), "options": first.options}
        more |= {"constant": self.constant, "piece": self.table.batch}
        more["features"] = evaluator.features if self.featured else None
        train = batch_of(evaluator, TRAIN, table.samples, reference=TRAIN + of, **more)
        return train, batch_of(evaluator, HELD, table.held, reference=HELD + of, **more)


@dataclass(frozen=True)
class PlanFit(RefineTask):
    """The short fit of one plan.

    A plan (`space.plans`) says little before its numbers are fitted: by itself it is a named
    solver whose calls were given other sorts. So every plan proposed is first fitted on few
    samples, and the program it becomes is scored like any candidate.

    Args:
        narrow: of a plan with stages, the program with one call of each, fitted first; the calls
            beside join it one by one and share its weight, as one that begins at 0 stays idle.
    """

    narrow: ProgramSchedule | None = None

    def run(self, evaluator: Evaluator) -> Fitted:
        """Fit on the evaluator's problem."""
        if self.narrow is None:
            return super().run(evaluator)
        plan, found = self.schedules[0].program, Fitted(self.narrow)
        for width in range(1, max(map(len, stages(plan))) + 1):
            start, paid = ProgramSchedule.of(found.schedule), found.calls
            wide = start if width == 1 else widened_to(plan, start, width)
            found = replace(self, schedules=(wide,), narrow=None).run(evaluator)
            found = replace(found, calls=paid + found.calls)
        return found

    @classmethod
    def of(
        cls,
        config: StudyConfig,
        domain: PlanDomain,
        member: ProgramSchedule,
        image: Tensor | None,
    ) -> PlanFit:
        """Of a member of a plan's domain; `image` is the constant image that it may use."""
        featured, narrow = config.objective.name == "frechet", domain.narrowed(member)
        bare = member.model_copy(update={"provenance": {}})
        return cls((bare,), config.refine.shortened(), image, featured, narrow=narrow)


@dataclass(frozen=True)
class CompensationTask(StageTask):
    """One base to compensate."""

    table: CompensationTable

    def run(self, evaluator: Evaluator) -> Fitted:
        """Compensate on the evaluator's problem; a base that cannot be is a failed result."""
        (given,), table = self.schedules, self.table
        changes = {"compensation_order": table.order, "compensation_variable": table.variable}
        try:
            base = given.model_copy(update=changes)
            assert isinstance(base, OdeSchedule)
            shared: dict[str, Any] = {"constant": base.constant, "options": base.options}
            shared["scale"] = start_scale(base)
            batch = batch_of(evaluator, COMPENSATE, table.samples, **shared)
            return compensate(base, evaluator.ode.denoiser, batch, table)
        except (FewstepError, RuntimeError) as error:
            return Fitted(given, message=reason(error))


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

    Their end points have the name `reference` [the stream's]; `scale` is that of x_T, `more` are
    further fields of `Batch`; guidance is the problem's where none is given.
    """
    problem = evaluator.ode
    z, cond = begun(problem, Span(evaluator.seed, stream, range(size)))
    target = evaluator.reference(reference or stream)[:size].to(torch.float32)
    return Batch(scale * z, target, cond or {}, **({"guidance": problem.guidance} | more))


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
        for e in ranked(candidates):
            if len(found) >= limit:
                return
            s, first = e.schedule, next(iter(found.values()), e).schedule
            if not isinstance(s, OdeSchedule | ProgramSchedule) or s.program.stochastic:
                continue
            if start_scale(s) != start_scale(first) or s.options != first.options:
                continue
            image = constant if first.constant is None else first.constant
            if s.constant is None:
                shared = constant is not None or image is None
            else:
                shared = image is not None and torch.equal(s.constant, image)
            if shared and "time_shift" not in s.options:
                found.setdefault(s.digest, e)

    take(known, top)
    take(named, len(found) + 1)
    return list(found.values())
