"""Blocks of schedules whose samples are drawn: masked sequences and weighted particles.

They are not linear in the network's outputs, so nothing is stacked: a block runs its candidates
one after the other on the same random numbers, those of its samples. Uniforms and start states
are a sample's own, whatever the block; what particles draw on the way belongs to the block, as for
stochastic ODE schedules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers import (
    MaskedProblem,
    ParticleProblem,
    sample_masked,
    sample_particles,
    start_masked,
    start_particles,
)
from fewstep.samplers.categorical import uniforms
from fewstep.samplers.token_denoiser import Counted
from fewstep.search.evaluate import Evaluator, TaskResult, Want, kept
from fewstep.search.problem import noise_of, sample_seed
from fewstep.space.errors import StudyError


@dataclass(frozen=True)
class DrawnTask(ABC):
    """One block: schedules on samples start..stop-1 of a stream.

    Args:
        schedules: the M candidates.
        stream: which random numbers.
        start: first sample index.
        stop: one past the last.
        want: "measures" of the problem, or the "samples" themselves.
        strict: raise at the first thing that goes wrong, instead of recording it.
    """

    schedules: tuple[Any, ...]
    stream: str
    start: int
    stop: int
    want: Want = "measures"
    strict: bool = False

    @property
    def candidates(self) -> int:
        """M."""
        return len(self.schedules)

    def execute(self, evaluator: Evaluator) -> TaskResult:
        """Run on an evaluator."""
        return evaluator.run(self)

    def only(self, index: int) -> Self:
        """The same block for one of its candidates."""
        return replace(self, schedules=self.schedules[index : index + 1])

    @torch.no_grad()
    def values(self, evaluator: Evaluator) -> np.ndarray:
        """(M, B, K) measures, or (M, B, *shape) samples: token ids, or states in float32."""
        return np.stack([self._one(evaluator, schedule) for schedule in self.schedules])

    @abstractmethod
    def _one(self, evaluator: Evaluator, schedule: Any) -> np.ndarray: ...

    def _kept(self, measures: Tensor, name: str) -> np.ndarray:
        if measures.ndim != 2 or len(measures) != self.stop - self.start:
            raise StudyError(
                f"the measure of objective {name} returned {tuple(measures.shape)} for "
                f"{self.stop - self.start} samples: (B, K) is needed"
            )
        return kept(measures)


@dataclass(frozen=True)
class MaskedTask(DrawnTask):
    """A block of masked schedules; a sample is a sequence."""

    def _one(self, evaluator: Evaluator, schedule: Any) -> np.ndarray:
        problem = evaluator.problem
        assert isinstance(problem, MaskedProblem)
        indices = range(self.start, self.stop)
        tokens = prompts(problem, indices)
        shape = (schedule.uniforms, problem.length)
        u = levels_of(evaluator.seed, self.stream, indices, shape)
        counted = Counted(problem.denoiser)
        done = sample_masked(schedule, counted, tokens, u=u.to(tokens.device))
        evaluator.evaluations += counted.sequences
        if self.want == "samples":
            return done.cpu().numpy()
        return self._kept(problem.measure(done), problem.objective)


@dataclass(frozen=True)
class ParticleTask(DrawnTask):
    """A block of particle schedules; a sample is a population."""

    def _one(self, evaluator: Evaluator, schedule: Any) -> np.ndarray:
        problem = evaluator.problem
        assert isinstance(problem, ParticleProblem)
        indices, seed = range(self.start, self.stop), evaluator.seed
        z = noise_of(seed, self.stream, indices, (problem.particles, *problem.shape))
        steps = sample_seed(seed, f"{self.stream}/steps", self.start)
        generator = torch.Generator().manual_seed(steps)
        found = sample_particles(
            schedule,
            problem.target,
            start_particles(schedule, problem.target, z),
            generator=generator,
            exact_start=problem.exact_start,
            warn_ess=0.0,
        )
        evaluator.evaluations += found.calls * problem.particles * len(indices)
        if self.want == "samples":
            even = found.draw(problem.particles, generator)
            return even.to(torch.float32).cpu().numpy()
        seeds = [sample_seed(seed, f"{self.stream}/measure", i) for i in indices]
        return self._kept(problem.measure(found, seeds), problem.objective)


@dataclass(frozen=True)
class DrawnChunk:
    """Candidates that run one after the other in a block; see `evaluate.Chunk`."""

    members: tuple[int, ...]
    schedules: tuple[Any, ...]
    task: type[DrawnTask]

    @property
    def nfe(self) -> int:
        """Network calls of each."""
        calls: int = self.schedules[0].nfe
        return calls

    def tasks(
        self,
        stream: str,
        samples: int,
        block: int,
        want: Want = "measures",
        first: int = 0,
    ) -> Iterator[DrawnTask]:
        """The chunk's blocks of samples first..samples-1, in index order."""
        for start in range(first, samples, block):
            yield self.task(self.schedules, stream, start, min(start + block, samples), want)


def drawn_chunks(
    schedules: tuple[Any, ...] | list[Any], size: int, task: type[DrawnTask]
) -> list[DrawnChunk]:
    """Cut a list of schedules into chunks of at most `size` with equal numbers of calls."""
    groups: dict[int, list[int]] = {}
    for i, schedule in enumerate(schedules):
        groups.setdefault(schedule.nfe, []).append(i)
    return [
        DrawnChunk(part, tuple(schedules[i] for i in part), task)
        for members in groups.values()
        for k in range(0, len(members), size)
        if (part := tuple(members[k : k + size]))
    ]


def prompts(problem: MaskedProblem, indices: range) -> Tensor:
    """The sequences that samples start from, `(B, length)`.

    Raises:
        StudyError: the problem's prompts have another shape.
    """
    if problem.prompt is None:
        return start_masked(problem.denoiser, len(indices), problem.length)
    tokens = problem.prompt(torch.as_tensor(list(indices)))
    if tokens.shape != (len(indices), problem.length):
        raise StudyError(
            f"the prompt returned {tuple(tokens.shape)} for {len(indices)} samples: (B, "
            f"{problem.length}) is needed"
        )
    return tokens


def levels_of(seed: int, stream: str, indices: range, shape: tuple[int, int]) -> Tensor:
    """The uniforms of the samples `indices` of a stream, float64 `(B, *shape)`.

    The rows that schedules have in common are the same.
    """
    draws = []
    for index in indices:
        generator = torch.Generator().manual_seed(sample_seed(seed, stream, index))
        draws.append(uniforms(*shape, generator=generator))
    return torch.stack(draws)
