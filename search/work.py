"""Work: what is sent out, and the evaluator that does it. `pool.map(works)` is the only way out.

A `Work` is a small picklable value with four methods:

    run(evaluator)           does it, on a worker; returns any picklable result
    parts()                  works of a part each, to find the guilty one where the whole kills its
                             worker or hangs; empty where it cannot be divided
    join(results)            the result of the whole from those of its parts
    failed(status, message)  the result of work that was given up ("oom", "timeout", "error": its
                             worker died), or raises where the search cannot go on without it

`Block` is the work of scoring: M schedules on samples start..stop-1 of a stream of noise that all
of them share. Stages (refinement, compensation, CPR) send works of their own.
What goes wrong with one candidate of a block is its status, found by running it alone: numbers
that are not finite, memory, what the user's model or measure raises (`ModelError`). Any other
exception is a fault of ours and ends the search. Blocks are cut by the study's settings alone
(`streams.cut`, `Block.cover`), so the number of workers decides only where and when a block runs.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from fewstep.predictors.yardstick import Array
from fewstep.samplers import AnyProblem, MaskedProblem, ParticleProblem, Problem
from fewstep.samplers.denoiser import Counted
from fewstep.samplers.factory import guarded, import_path, made_by, watched
from fewstep.samplers.prices import priced
from fewstep.samplers.problems import device_of, prompts
from fewstep.samplers.sample_noise import sample_seed
from fewstep.samplers.streams import Span, masked_samples, ode_samples, particle_samples
from fewstep.search.config import StudyConfig
from fewstep.search.objective import EndpointMSE, Frechet, Measured, Objective
from fewstep.space.costs import Prices
from fewstep.space.errors import FewstepError, ModelError, StudyError, one_line

Want = Literal["measures", "samples", "features"]


class Work(ABC):
    """What a pool takes; see the module's first lines. By default it has no parts."""

    @abstractmethod
    def run(self, evaluator: Evaluator) -> Any:
        """Do it."""

    def parts(self) -> Sequence[Work]:
        """Works of a part each; empty where it cannot be divided."""
        return ()

    def join(self, results: Sequence[Any]) -> Any:
        """The result of the whole from those of its parts."""
        raise NotImplementedError

    def limit(self, block: float | None) -> float | None:
        """Seconds after which it counts as hung, given those of a block; None never."""
        return None

    def failed(self, status: str, message: str) -> Any:
        """The result of work that was given up; by default the search cannot go on without it."""
        raise StudyError(f"a task could not be done: {message} ({status})")


@dataclass(frozen=True)
class BlockResult:
    """What came of a block, its candidates in order.

    Args:
        values: (M, B, K) measures, float64 holding float32 numbers; or (M, B, *shape) samples,
            float32. NaN where a candidate failed.
        status: M times "ok", "diverged", "oom", "timeout" or "error".
        message: M times why, "" if ok.
        evaluations: images, sequences or particles sent through the network.
        seconds: wall time on the worker.
    """

    values: np.ndarray
    status: tuple[str, ...]
    message: tuple[str, ...]
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """The evaluation of one schedule.

    Args:
        score: the number minimised; inf unless status is "ok".
        status: "ok", "diverged", "oom", "timeout" or "error".
        message: why, "" if ok.
        per_sample: per-sample scores in sample order, or None where the objective has none.
        measures: (N, K) measures of all samples; None if not kept.
        calls: network evaluations spent on it (samples x NFE).
        seconds: its share of the workers' wall time.
        samples: N.
    """

    score: float
    status: str = "ok"
    message: str = ""
    per_sample: Array | None = None
    measures: Array | None = None
    calls: int = 0
    seconds: float = 0.0
    samples: int = 0


@dataclass(frozen=True)
class Block(Work):
    """M schedules on samples start..stop-1 of a stream.

    Args:
        schedules: of one kind, and such that they run as one batch (`streams.cut`).
        stream: which noise.
        start: first sample index.
        stop: one past the last.
        want: "measures" of the objective, the "samples" themselves, or the problem's "features".
        strict: raise at the first thing that goes wrong, instead of recording it.
        guidance: scale where a schedule sets none; None is the problem's.
    """

    schedules: tuple[Any, ...]
    stream: str
    start: int
    stop: int
    want: Want = "measures"
    strict: bool = False
    guidance: float | None = None

    @classmethod
    def cover(
        cls, schedules: Sequence[Any], stream: str, samples: range, size: int, **more: Any
    ) -> list[Block]:
        """The blocks of a range of samples, `size` at a time in index order."""
        edges = [*range(samples.start, samples.stop, size), samples.stop]
        group = tuple(schedules)
        return [cls(group, stream, a, b, **more) for a, b in pairwise(edges)]

    def parts(self) -> list[Block]:
        """The same block for each of its candidates."""
        if len(self.schedules) == 1:
            return []
        return [replace(self, schedules=(schedule,)) for schedule in self.schedules]

    def limit(self, block: float | None) -> float | None:
        """See `Work`; the teacher's blocks, of many more calls, have none."""
        return None if self.strict else block

    def join(self, results: Sequence[BlockResult]) -> BlockResult:
        """See `Work`."""
        return BlockResult(
            _filled([r.values[0] if r.status[0] == "ok" else None for r in results]),
            tuple(r.status[0] for r in results),
            tuple(r.message[0] for r in results),
            sum(r.evaluations for r in results),
            sum(r.seconds for r in results),
        )

    def failed(self, status: str, message: str) -> BlockResult:
        """See `Work`.

        Raises:
            StudyError: the block is strict.
        """
        if self.strict:
            raise StudyError(f"the teacher could not be computed: {message}")
        count = len(self.schedules)
        nothing = np.full((count, self.stop - self.start, 1), np.nan)
        return BlockResult(nothing, (status,) * count, (message,) * count, 0, 0.0)

    def run(self, evaluator: Evaluator) -> BlockResult:
        """Run on an evaluator; a candidate that fails is found by running each alone."""
        before, begun = evaluator.evaluations, time.perf_counter()
        if self.strict:
            done = [(values, "ok", "") for values in self.values(evaluator)]
        else:
            done = self._guarded(evaluator)
        status, message = [d[1] for d in done], [d[2] for d in done]
        values = _filled([d[0] for d in done])
        for m, part in enumerate(values):
            missing = np.isnan(part).all(-1) if evaluator.objective.partial else False
            if status[m] == "ok" and not (np.isfinite(part).all(-1) | missing).all():
                status[m], message[m] = "diverged", "a sample is not finite"
        spent, seconds = evaluator.evaluations - before, time.perf_counter() - begun
        return BlockResult(values, tuple(status), tuple(message), spent, seconds)

    def _guarded(self, evaluator: Evaluator) -> list[tuple[np.ndarray | None, str, str]]:
        try:
            return [(values, "ok", "") for values in self.values(evaluator)]
        except (MemoryError, torch.OutOfMemoryError) as error:
            status, line = "oom", reason(error)
        except (ModelError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            status, line = "error", reason(error)
        if len(self.schedules) == 1:
            return [(None, status, line)]
        return [done for part in self.parts() for done in part._guarded(evaluator)]

    def _span(self, evaluator: Evaluator) -> Span:
        return Span(evaluator.seed, self.stream, range(self.start, self.stop))

    @torch.no_grad()
    def values(self, evaluator: Evaluator) -> np.ndarray:
        """(M, B, K) measures, or (M, B, *shape) samples: float32, or token ids."""
        problem = evaluator.problem
        if isinstance(problem, Problem):
            return self._ode(evaluator, problem)
        if isinstance(problem, MaskedProblem):
            return np.stack([self._masked(evaluator, problem, s) for s in self.schedules])
        return np.stack([self._particles(evaluator, problem, s) for s in self.schedules])

    def _ode(self, evaluator: Evaluator, problem: Problem) -> np.ndarray:
        """State, history and measure of all candidates stay on the model's device."""
        denoiser = Counted(problem.denoiser, evaluator.prices)
        guidance = problem.guidance if self.guidance is None else self.guidance
        asked: dict[str, Any] = {"denoiser": denoiser, "guidance": guidance, "strict": self.strict}
        try:
            x = ode_samples(problem, self.schedules, self._span(evaluator), **asked)
        finally:
            evaluator.evaluations += denoiser.evaluations
        if self.want == "samples":
            return x.to(torch.float32).cpu().numpy()
        if self.want == "features":
            return kept(Frechet(evaluator.features).measure(x, x))
        reference = evaluator.reference(self.stream)[self.start : self.stop]
        return kept(evaluator.objective.measure(x, reference.to(x)))

    def _masked(self, evaluator: Evaluator, problem: MaskedProblem, schedule: Any) -> np.ndarray:
        """One masked schedule; later draws of a population are the block's."""
        span = self._span(evaluator)
        tokens = prompts(problem, span.indices)
        generator = span.generator(tokens.device)
        done, sequences = masked_samples(problem, schedule, span, tokens, generator)
        evaluator.evaluations += sequences
        if self.want == "samples":
            one = done if isinstance(done, torch.Tensor) else done.draw(1, generator)[:, 0]
            return one.cpu().numpy()
        return self._checked(problem.measure(done), problem.objective)

    def _particles(
        self, evaluator: Evaluator, problem: ParticleProblem, schedule: Any
    ) -> np.ndarray:
        """One particle schedule; a sample is a population, its later draws the block's."""
        span = self._span(evaluator)
        generator = span.generator()
        found, particles = particle_samples(problem, schedule, span, generator)
        evaluator.evaluations += particles
        if self.want == "samples":
            even = found.draw(problem.particles, generator)
            return even.to(torch.float32).cpu().numpy()
        seeds = [sample_seed(evaluator.seed, f"{self.stream}/measure", i) for i in span.indices]
        return self._checked(problem.measure(found, seeds), problem.objective)

    def _checked(self, measures: Tensor, name: str) -> np.ndarray:
        if measures.ndim != 2 or len(measures) != self.stop - self.start:
            raise StudyError(
                f"the measure of objective {name} returned {tuple(measures.shape)} for "
                f"{self.stop - self.start} samples: (B, K) is needed"
            )
        return kept(measures)


def kept(measures: Tensor) -> np.ndarray:
    """Measures as they are kept: float64 that hold float32 numbers."""
    return measures.to(torch.float32).cpu().to(torch.float64).numpy()


def reason(error: BaseException) -> str:
    """An exception in one line; one of ours speaks for itself."""
    named = "" if isinstance(error, FewstepError) else f"{type(error).__name__}: "
    return f"{named}{one_line(error)}"[:300]


def _filled(parts: Sequence[np.ndarray | None]) -> np.ndarray:
    """The values of all candidates in one array, NaN for those that have none."""
    shape = next((p.shape for p in parts if p is not None), (1, 1))
    return np.stack([np.full(shape, np.nan) if p is None else p for p in parts])


class Evaluator:
    """A problem that is loaded once, its objective, and the teacher's end points by stream.

    What the user's model raises reaches us as a ModelError. `evaluations` counts what was sent
    through the network: images, sequences or particles; with `prices`, what they cost.
    """

    def __init__(
        self, problem: AnyProblem, objective: Objective, seed: int, prices: Prices | None = None
    ) -> None:
        self.problem, self.objective, self.seed = watched(problem), objective, seed
        self.prices = None if prices is None else priced(prices, problem)
        self.device = device_of(problem)
        self.evaluations = 0
        self.piece: int | None = None
        self._references: dict[str, Callable[[], Tensor]] = {}

    @classmethod
    def of(cls, config: StudyConfig) -> Self:
        """The evaluator of a study as it was given, unsettled."""
        problem = load_problem(config)
        prices = Prices(**config.prices.listed) if config.search.cost else None
        objective = make_objective(config, watched(problem))
        return cls(problem, objective, config.search.seed, prices)

    def set_piece(self, images: int | None) -> None:
        """Let network calls of stacked ODE candidates hold at most so many images."""
        if images is not None and isinstance(self.problem, Problem):
            self.piece = self.problem.denoiser.piece = images  # type: ignore[attr-defined]

    @property
    def ode(self) -> Problem:
        """The problem, where only ODE schedules make sense.

        Raises:
            StudyError: it is of another kind.
        """
        if not isinstance(self.problem, Problem):
            raise StudyError(f"a {type(self.problem).__name__} has no ODE schedules")
        return self.problem

    @property
    def features(self) -> Callable[[Tensor], Tensor]:
        """The problem's features.

        Raises:
            StudyError: it has none.
        """
        if self.ode.features is None:
            raise StudyError("the problem has no features")
        return self.ode.features

    def share(self, stream: str, reference: Tensor | Callable[[], Tensor]) -> None:
        """Take the teacher's end points of a stream, sample i at row i, or what fetches them."""
        fetch = reference if callable(reference) else lambda: reference
        self._references[stream] = fetch

    def reference(self, stream: str) -> Tensor:
        """The teacher's end points of a stream, on the model's device."""
        found = self._references[stream]().to(self.device)
        self._references[stream] = lambda: found
        return found


def load_problem(config: StudyConfig) -> AnyProblem:
    """The problem of a study, at its guidance scale; see `factory.made_by`."""
    how, model = config.search, config.model.built_by(config.folder)
    problem = made_by(*model, config.folder, autocast=how.autocast, backend=how.compile)
    if isinstance(problem, Problem) and config.scale is not None:
        return replace(problem, guidance=config.scale)
    return problem


def make_objective(config: StudyConfig, problem: AnyProblem) -> Objective:
    """The objective that a study names.

    Raises:
        StudyError: an unknown name, or frechet without features.
    """
    table = config.objective
    if table.statistic is not None and table.name not in (None, "endpoint_mse"):
        raise StudyError(
            f"objective.statistic = {table.statistic!r} is one of the errors of endpoint_mse; the "
            f"objective {table.name} has its own score: leave it out"
        )
    if not isinstance(problem, Problem):
        own, kind = problem.objective, type(problem).__name__
        if table.name not in (None, own):
            raise StudyError(
                f"objective.name = {table.name!r}: a {kind} brings its own, {own!r}: leave it out"
            )
        if table.features is not None:
            raise StudyError(
                f"objective.features: a {kind} measures its samples itself: leave it out"
            )
        return Measured(problem)
    if table.name not in (None, "endpoint_mse", "frechet"):
        raise StudyError(f"objective.name = {table.name!r}: use endpoint_mse or frechet")
    if table.name != "frechet":
        return EndpointMSE(table.statistic or "geometric")
    features: Callable[[Tensor], Tensor] | None = problem.features
    if table.features is not None:
        named = import_path(table.features, config.folder, "objective.features")
        features = _of_samples(guarded(named, "objective.features"), problem)
    if features is None:
        raise StudyError(
            "objective frechet needs features: name a function in objective.features, or give the "
            "Problem some"
        )
    return Frechet(features)


def _of_samples(features: Callable[[Tensor], Tensor], problem: Problem) -> Any:
    """A study's feature function as one of samples: latents are decoded first."""
    decode = problem.decode
    return features if decode is None else lambda x: features(decode(x)).to(x.device)
