"""Schedules to scores: what a worker does with one block of candidates and samples.

A block is M candidates run on B samples that all of them share; of ODE schedules, M programs with
equal call counts, stacked. What a block of another kind does is in `search.drawn`.
Blocks are cut from a list of schedules by the study's settings alone: candidates in the order
given, M at a time, samples in index order, B at a time. A score belongs to its block; the number
of workers decides only where and when it runs. What goes wrong with one candidate (NaN, memory, an
exception) is a status of that candidate, found by running it alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers import AnyProblem, Denoiser, Problem, run
from fewstep.samplers.ode import start_scale
from fewstep.search.objective import Array, EndpointMSE, Frechet, Measured, Objective
from fewstep.search.problem import ModelSpec, conditions, import_path, noise_of, sample_seed
from fewstep.space import Program, stack
from fewstep.space.errors import ModelError, StudyError
from fewstep.space.noise import NoiseSchedule


@dataclass(frozen=True)
class EvaluatorSpec:
    """Everything a worker needs to become an evaluator; small, and sent once.

    Args:
        model: how to build the problem.
        objective: name of the objective; None is the problem's own.
        features: import path of the feature function, or None for the problem's own.
        seed: the study's seed.
    """

    model: ModelSpec
    objective: str | None
    features: str | None
    seed: int


Want = Literal["measures", "samples"]


class Block(Protocol):
    """What an evaluator runs: M candidates on samples start..stop-1 of a stream."""

    @property
    def candidates(self) -> int:
        """M."""
        ...

    @property
    def strict(self) -> bool:
        """Raise at the first thing that goes wrong, instead of recording it."""
        ...

    def only(self, index: int) -> Block:
        """The same block for one of its candidates."""
        ...

    def values(self, evaluator: Evaluator) -> np.ndarray:
        """(M, B, K) measures, or (M, B, *shape) samples."""
        ...


@dataclass(frozen=True)
class Task:
    """One block of ODE schedules: stacked programs on samples start..stop-1 of a stream.

    Args:
        program: M stacked programs; the scale of the start state is already in them (`scaled`).
        stream: which noise.
        start: first sample index.
        stop: one past the last.
        want: "measures" of the objective, or the "samples" themselves.
        options: run-time options of the executor, the same for all M.
        constant: the constant image of an analytical first step, or None.
        strict: raise at the first thing that is not finite, instead of recording it.
        guidance: scale where the program sets none; None is the problem's.
    """

    program: Program
    stream: str
    start: int
    stop: int
    want: Want = "measures"
    options: dict[str, Any] = field(default_factory=dict)
    constant: Tensor | None = None
    strict: bool = False
    guidance: float | None = None

    @property
    def candidates(self) -> int:
        """M."""
        return int(self.program.r.shape[0])

    def execute(self, evaluator: Evaluator) -> TaskResult:
        """Run on an evaluator."""
        return evaluator.run(self)

    def only(self, index: int) -> Task:
        """The same block for one of its candidates."""
        parts: dict[str, Any] = {f.name: getattr(self.program, f.name) for f in fields(Program)}
        one: dict[str, Any] = {
            name: None if v is None else v[index : index + 1] for name, v in parts.items()
        }
        return replace(self, program=Program(**one))

    def values(self, evaluator: Evaluator) -> np.ndarray:
        """Run the programs; float32 samples, or measures."""
        problem, indices = evaluator.ode, range(self.start, self.stop)
        z = noise_of(evaluator.seed, self.stream, indices, problem.shape)
        generator = None
        if self.program.stochastic:
            generator = torch.Generator().manual_seed(
                sample_seed(evaluator.seed, f"{self.stream}/steps", self.start)
            )
        denoiser = Counted(problem.denoiser)
        try:
            with torch.no_grad():
                x = run(
                    self.program,
                    denoiser,
                    z,
                    cond=conditions(problem, indices),
                    guidance=problem.guidance if self.guidance is None else self.guidance,
                    m=self.constant,
                    generator=generator,
                    options=self.options,
                    check=self.strict,
                    share=self.program.r.ndim == 2,
                )
        finally:
            evaluator.evaluations += denoiser.evaluations
        if self.want == "samples":
            return x.to(torch.float32).cpu().numpy()
        reference = evaluator.reference(self.stream)[self.start : self.stop].to(x)
        return kept(evaluator.objective.measure(x, reference))


class Single:
    """A task that is its own only candidate: a block of one to the pool."""

    strict: ClassVar[bool] = False
    candidates: ClassVar[int] = 1
    start: ClassVar[int] = 0
    stop: ClassVar[int] = 1

    def only(self, index: int) -> Self:
        """The task of one candidate: this one."""
        return self


def kept(measures: Tensor) -> np.ndarray:
    """Measures as they are kept: float64 that hold float32 numbers."""
    return measures.to(torch.float32).to(torch.float64).cpu().numpy()


@dataclass(frozen=True)
class TaskResult:
    """What came of a block.

    Args:
        values: (M, B, K) measures, float64 holding float32 numbers; or (M, B, *shape) samples,
            float32. NaN where a candidate failed.
        status: M times "ok", "diverged", "oom", "timeout" or "error".
        message: M times why, "" if ok.
        evaluations: images sent through the denoiser.
        seconds: wall time on the worker.
    """

    values: np.ndarray
    status: tuple[str, ...]
    message: tuple[str, ...]
    evaluations: int
    seconds: float


class Counted:
    """A denoiser that counts the images it is asked for."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.noise, self.evaluations = inner, inner.noise, 0

    def __call__(self, x: Tensor, t: Tensor, *, cond: Any = None, guidance: Any = None) -> Tensor:
        """See `Denoiser`."""
        self.evaluations += len(x)
        return self.inner(x, t, cond=cond, guidance=guidance)


class Evaluator:
    """Runs tasks on a problem that is loaded once.

    Args:
        problem: the user's model.
        objective: what to measure.
        seed: the study's seed.

    `evaluations` counts what was sent through the network: images, sequences or particles.
    """

    def __init__(self, problem: AnyProblem, objective: Objective, seed: int) -> None:
        self.problem, self.objective, self.seed = problem, objective, seed
        self.evaluations = 0
        self._references: dict[str, Tensor] = {}

    @classmethod
    def from_spec(cls, spec: EvaluatorSpec) -> Evaluator:
        """Load the problem and the objective."""
        problem = spec.model.load()
        return cls(problem, make_objective(spec, problem), spec.seed)

    @property
    def ode(self) -> Problem:
        """The problem, where only ODE schedules make sense.

        Raises:
            StudyError: it is of another kind.
        """
        if not isinstance(self.problem, Problem):
            raise StudyError(f"a {type(self.problem).__name__} has no ODE schedules")
        return self.problem

    def share(self, stream: str, reference: Tensor) -> None:
        """Take the teacher's end points of a stream, sample i at row i."""
        self._references[stream] = reference

    def reference(self, stream: str) -> Tensor:
        """The teacher's end points of a stream."""
        return self._references[stream]

    def run(self, task: Block) -> TaskResult:
        """Run a block; a candidate that fails is found by running each alone."""
        before, begun = self.evaluations, time.perf_counter()
        if task.strict:
            values = task.values(self)
            parts = [(values[m], "ok", "") for m in range(task.candidates)]
        else:
            parts = self._guarded(task)
        status, message = [p[1] for p in parts], [p[2] for p in parts]
        filled = _fill([p[0] for p in parts])
        for m, block in enumerate(filled):
            missing = np.isnan(block).all(-1) if self.objective.partial else False
            if status[m] == "ok" and not (np.isfinite(block).all(-1) | missing).all():
                status[m], message[m] = "diverged", "a sample is not finite"
        spent = self.evaluations - before
        return TaskResult(
            filled, tuple(status), tuple(message), spent, time.perf_counter() - begun
        )

    def _guarded(self, task: Block) -> list[tuple[np.ndarray | None, str, str]]:
        try:
            values = task.values(self)
        except Exception as error:
            if task.candidates == 1:
                memory = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
                line = f"{type(error).__name__}: {' '.join(str(error).split())}"
                return [(None, "oom" if memory else "error", line[:300])]
            return [part for m in range(task.candidates) for part in self._guarded(task.only(m))]
        return [(values[m], "ok", "") for m in range(task.candidates)]


def _fill(parts: Sequence[np.ndarray | None]) -> np.ndarray:
    shape = next((p.shape for p in parts if p is not None), (1, 1))
    return np.stack([np.full(shape, np.nan) if p is None else p for p in parts])


def make_objective(spec: EvaluatorSpec, problem: AnyProblem) -> Objective:
    """The objective that a study names.

    Raises:
        StudyError: an unknown name, or frechet without features.
    """
    if not isinstance(problem, Problem):
        own, kind = problem.objective, type(problem).__name__
        if spec.objective not in (None, own):
            raise StudyError(
                f"objective.name = {spec.objective!r}: a {kind} brings its own, {own!r}: leave it "
                "out"
            )
        if spec.features is not None:
            raise StudyError(
                f"objective.features: a {kind} measures its samples itself: leave it out"
            )
        return Measured(problem)
    if spec.objective not in (None, "endpoint_mse", "frechet"):
        raise StudyError(f"objective.name = {spec.objective!r}: use endpoint_mse or frechet")
    if spec.objective != "frechet":
        return EndpointMSE()
    features: Callable[[Tensor], Tensor] | None = problem.features
    if spec.features is not None:
        features = import_path(spec.features, spec.model.folder, "objective.features")
    if features is None:
        raise StudyError(
            "objective frechet needs features: name a function in objective.features, or give the "
            "Problem some"
        )
    return Frechet(features)


def scaled(schedule: Any) -> Program:
    """The schedule's program as it acts on UNIT noise: p_0 and e times the scale of its start."""
    program: Program = schedule.program
    scale = start_scale(schedule)
    if scale == 1.0:
        return program
    init = program.init * torch.tensor([scale, 1.0], dtype=torch.float64)
    return replace(program, init=init, e=program.e * scale)


@dataclass(frozen=True)
class Chunk:
    """M candidates that run as one batch: their positions in a list, and what they share."""

    members: tuple[int, ...]
    program: Program
    options: dict[str, Any]
    constant: Tensor | None

    @property
    def nfe(self) -> int:
        """Network calls of each."""
        return self.program.nfe

    def tasks(
        self,
        stream: str,
        samples: int,
        block: int,
        want: Want = "measures",
        first: int = 0,
    ) -> Iterator[Task]:
        """The chunk's blocks of samples first..samples-1, in index order."""
        for start in range(first, samples, block):
            stop = min(start + block, samples)
            yield Task(self.program, stream, start, stop, want, self.options, self.constant)


def chunks(schedules: Sequence[Any], noise: NoiseSchedule, size: int) -> list[Chunk]:
    """Cut a list of schedules, in its order, into chunks of `size` that can run as one batch.

    Raises:
        ModelError: a schedule of another noise schedule than the model's.
    """
    groups: dict[str, list[int]] = {}
    for i, schedule in enumerate(schedules):
        if schedule.noise != noise:
            raise ModelError(
                "a schedule was made for another noise schedule than the model's: search or "
                "import it anew"
            )
        program = schedule.program
        shared = [program.nfe, program.guidance is not None, program.stochastic, schedule.options]
        alone = i if schedule.constant is not None else -1
        groups.setdefault(json.dumps([*shared, alone], sort_keys=True), []).append(i)
    found = []
    for members in groups.values():
        for k in range(0, len(members), size):
            part = tuple(members[k : k + size])
            first = schedules[part[0]]
            program = stack([scaled(schedules[i]) for i in part])
            found.append(Chunk(part, program, dict(first.options), first.constant))
    return found


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


def assemble(
    parts: Sequence[TaskResult],
    objective: Objective,
    reference: Array,
    before: Sequence[Result] | None = None,
) -> list[Result]:
    """The results of a chunk's candidates from its blocks, in sample order.

    Args:
        parts: the blocks.
        objective: turns measures into a score.
        reference: measures of the teacher's end points.
        before: results on the samples before the first block's, which these go on from.
    """
    results = []
    count = len(parts[0].status)
    for m in range(count):
        status = next((p.status[m] for p in parts if p.status[m] != "ok"), "ok")
        message = next((p.message[m] for p in parts if p.status[m] != "ok"), "")
        cost: dict[str, Any] = {
            "calls": sum(p.evaluations for p in parts) // count,
            "seconds": sum(p.seconds for p in parts) / count,
        }
        earlier: Array | None = None
        if before is not None:
            earlier = before[m].measures
            cost["calls"] += before[m].calls
            cost["seconds"] += before[m].seconds
        if status != "ok":
            results.append(Result(float("inf"), status, message, **cost))
            continue
        measures = np.concatenate([p.values[m] for p in parts])
        if earlier is not None:
            measures = np.concatenate([earlier, measures])
        score = objective.score(measures, reference)
        if not np.isfinite(score):
            results.append(Result(float("inf"), "diverged", "the score is not finite", **cost))
            continue
        per_sample = measures[:, 0] if objective.per_sample else None
        results.append(
            Result(score, "ok", "", per_sample, measures, samples=len(measures), **cost)
        )
    return results
