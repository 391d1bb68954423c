"""Refinement: all numbers of a schedule's program fitted end to end to the teacher's samples.

A fit begins on few samples, where a round is cheap, and goes on with four times as many until the
training and the held-out error agree, or the samples end: then more noise would teach nothing.
Every start is fitted on the few, and the one that got furthest goes on. Where all numbers at once
gain nothing on held-out noise, because the noise cannot tell so many, the start's times are fitted
first, which are few, and all numbers after. A constant image joins after the few samples, which
would not tell its weights, and at once where there are no more. The iterate with the least
held-out error is kept.

The result is a fitted program (`ProgramSchedule`), with the image beside it, and in its provenance
the schedule it started from.

References: learned times and coefficients by back-propagation through the sampler, LD3 (arXiv
2405.15506), S4S (2502.17423), DyWeight (2603.11607); here by Gauss-Newton, without gradients of
the network (`predictors.gauss_newton`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.predictors.gauss_newton import Batch, Fit
from fewstep.predictors.settings import RefineTable
from fewstep.samplers import Denoiser
from fewstep.space import OdeSchedule, Program, ProgramSchedule
from fewstep.space.errors import StudyError
from fewstep.space.unknowns import FreeProgram, Retimed, Unknowns, canonical

_AGREE = 1.1  # held-out over training error below which more noise teaches nothing
_GROWTH = 4
_HUBER = 1.0  # errors beyond so many medians count by their root
Startable = OdeSchedule | ProgramSchedule


@dataclass(frozen=True)
class Fitted:
    """What a fit to the teacher's end points gave.

    Args:
        schedule: the result; the start itself if nothing better was found, or it failed.
        start: which of the starts it came from.
        before: held-out error of this start, the mean of the fit's loss; `after`, of the result.
        samples: training samples that the last fit saw.
        calls: network evaluations spent on all starts.
        curve: (training samples, held-out error) after every round of the best start's fits.
        halved: the start was first fitted at half the guidance scale.
        message: why it failed; "" if it did not.
    """

    schedule: Startable
    start: int = 0
    before: float = math.inf
    after: float = math.inf
    samples: int = 0
    calls: int = 0
    curve: tuple[tuple[int, float], ...] = ()
    halved: bool = False
    message: str = ""


def refine(
    starts: Sequence[Startable],
    denoiser: Denoiser,
    train: Batch,
    held: Batch,
    table: RefineTable,
    on_round: Callable[[], None] | None = None,
) -> Fitted:
    """Refine the best of several starts of equal calls.

    Args:
        starts: schedules without fresh noise, with the same start level and run-time options.
        denoiser: the model.
        train: noise to fit on; the few samples that a fit begins on come first.
        held: noise to choose iterates by; must not overlap `train`.
        table: the study's [refine].
        on_round: called after every round.

    Raises:
        StudyError: starts that cannot be fitted together; the reason is named.
    """
    _check(starts)
    few = min(table.batch, len(train))
    runs = [_Refinement(s, denoiser, train, held, table, on_round) for s in starts]
    for run in runs:
        run.begin(few)
    at = min(range(len(runs)), key=lambda i: runs[i].trial)
    best = runs[at]
    best.go_on(few)
    after, before, calls = best.error, best.before, sum(run.calls for run in runs)
    made = best.schedule if after < before else starts[at]
    after = min(after, before)
    return Fitted(made, at, before, after, best.samples, calls, tuple(best.curve))


def _check(starts: Sequence[Startable]) -> None:
    first = starts[0]
    if len({s.nfe for s in starts}) != 1:
        raise StudyError("refine: schedules of different NFE cannot be starts of one fit")
    for s in starts:
        if s.program.stochastic:
            raise StudyError("refine: a schedule that adds fresh noise has no program to fit")
        if s.options != first.options or "time_shift" in s.options:
            raise StudyError(
                "refine: starts with other run-time options cannot be fitted together, and one "
                "with options.time_shift has no program to fit: leave them out"
            )


@dataclass
class _Refinement:
    """The fits from one start, one after another; its best program so far."""

    start: Startable
    denoiser: Denoiser
    train: Batch
    held: Batch
    table: RefineTable
    on_round: Callable[[], None] | None
    calls: int = 0
    samples: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.noise = self.start.noise
        self.program: Program = canonical(self.start.program)
        few = self.train.constant is not None and len(self.train) <= self.table.batch
        self.imaged = few or bool((self.program.k != 0).any() or self.program.init[1] != 0)
        self.guided = "guidance" in self.table.knobs and self.program.guidance is not None
        self.before = self.error = self._held(self.program)
        self.trial = math.inf
        self.schedule: Startable = self.start

    def begin(self, few: int) -> None:
        """Fit on the few samples; `trial` is the error that says how far this start gets."""
        if self.table.knobs == ("times",):
            self._times(few)
        else:
            self._all(few)
            if self.error >= self.before and isinstance(self.start, OdeSchedule):
                self._times(few)  # too many numbers for so little noise: the few that matter most
                self._all(few)
        self.trial = self.error

    def go_on(self, few: int) -> None:
        """Fit on more and more samples, until training and held-out error agree."""
        size, fit = few, self._times if self.table.knobs == ("times",) else self._all
        joins = self.train.constant is not None and not self.imaged and fit == self._all
        self.imaged = self.imaged or joins
        while size < len(self.train):
            size = min(_GROWTH * size, len(self.train))
            fit(size)
            if self._agree(size):
                break

    def _agree(self, size: int) -> bool:
        """Whether more noise would teach nothing: the held-out error is that on the noise seen."""
        seen = self._errors(self.program, self.train.first(size))
        return self.error <= _AGREE * self._loss(seen)

    def _all(self, size: int) -> None:
        free = (self.guided, self.imaged, self.table.stages, self.train.constant is None)
        model = FreeProgram(self.program, self.noise, *free)
        theta = model.nearer() if not self.curve else torch.zeros(model.size).double()
        self._fit(model, theta, size)

    def _times(self, size: int) -> None:
        if not isinstance(self.schedule, OdeSchedule):
            raise StudyError(
                "refine.knobs = ['times'] needs the steps of a schedule, and a fitted program has "
                "none: open weights too"
            )
        model = Retimed(self.schedule)
        theta = self._fit(model, torch.zeros(model.size).double(), size)
        if theta is not None:
            self.schedule = model.at(theta)

    def _fit(self, model: Unknowns, theta: Tensor, size: int) -> Tensor | None:
        """One fit; keeps the iterate with the least held-out error, if it is lower than before."""
        batch = self.train.first(size)
        fit = Fit(model, self.denoiser, batch, self._delta(batch))

        def held(at: Tensor) -> float:
            error = self._held(model.program(at))
            self.curve.append((size, error))
            if self.on_round is not None:
                self.on_round()
            return error

        rounds = self.table.rounds if size <= self.table.batch else max(1, self.table.rounds // 3)
        best, self.error = fit.chosen(theta, rounds, held, self.error)
        self.calls, self.samples = self.calls + fit.calls, max(self.samples, size)
        if best is not None:
            self.program = canonical(model.program(best))
            self.schedule = self._written(self.program)
        return best

    def _delta(self, batch: Batch) -> float:
        """Huber's d for the program as it is; inf for the plain mean."""
        if self.table.loss == "mean":
            return math.inf
        return math.sqrt(_HUBER * float(self._errors(self.program, batch).median()))

    def _held(self, program: Program) -> float:
        return self._loss(self._errors(program, self.held))

    def _loss(self, errors: Tensor) -> float:
        """The loss of a program with these errors, by its own median: comparable with others'."""
        cut = _HUBER * errors.median()
        if self.table.loss == "huber":
            errors = torch.where(errors > cut, 2 * (cut * errors).sqrt() - cut, errors)
        found = float(errors.mean())
        return found if math.isfinite(found) else math.inf

    def _written(self, program: Program) -> ProgramSchedule:
        """The program as a schedule, with its image where it uses one."""
        start = self.start
        made = ProgramSchedule(
            **{name: getattr(start, name) for name in ("noise", "start", "end", "options")},
            program=program,
            provenance={"refined_from": start.digest},
        )
        image = self.train.constant
        return made.with_constant(image) if self.imaged and image is not None else made

    def _errors(self, program: Program, batch: Batch) -> Tensor:
        self.calls += program.nfe * len(batch)
        return batch.errors([program], self.denoiser)[0]


def refine_cost(table: RefineTable, nfe: int, more: int = 0) -> int:
    """Network evaluations of refining at one NFE, as fits usually go.

    All samples are needed, and two thirds of the rounds; `more` are fits on few samples beside
    those of the starts.
    """
    image = 1 if table.mean else 0  # a weight more in every row, and one of the start
    jacobian = sum((c + 2 + image) * (nfe - 1 - c) + nfe - c for c in range(nfe))
    jacobian += (5 + image) * nfe  # the start's numbers, and the steps tried
    few, rounds = min(table.batch, table.samples), max(1, 2 * table.rounds // 3)
    on_more, starts = max(1, table.rounds // 3), table.top + 1 + more
    seen, size, looks = few * rounds * starts, few, rounds * starts
    while size < table.samples:
        size = min(4 * size, table.samples)
        seen, looks = seen + on_more * size, looks + on_more
    return jacobian * seen + table.held * nfe * looks
