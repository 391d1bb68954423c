"""What a study's factory returns: a model, and what makes its samples good.

`Problem` is searched for ODE schedules, `MaskedProblem` for masked ones (with a `target`, of
populations of weighted sequences), `ParticleProblem` for those of weighted particles. A `Problem`
is scored against its own teacher; the two others, whose samples are drawn, bring a measure:
numbers per sample, from which a score is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.samplers.denoiser import Denoiser
from fewstep.samplers.masked import sample_masked
from fewstep.samplers.masked_particles import TiltedLaw, sample_tilted
from fewstep.samplers.particles import Particles
from fewstep.samplers.targets import Target
from fewstep.samplers.token_denoiser import TokenDenoiser, start_masked
from fewstep.space.errors import StudyError
from fewstep.space.masked import MaskedNoise, MaskedSchedule
from fewstep.space.particles import ParticleStep
from fewstep.space.program import ProgramSchedule
from fewstep.space.schedule import OdeSchedule

__all__ = [
    "AnyProblem",
    "MaskedProblem",
    "ParticleProblem",
    "Problem",
    "conditions",
    "device_of",
    "prompts",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """A diffusion model to find ODE schedules for.

    Args:
        denoiser: the model behind the Denoiser contract.
        shape: shape of one sample, without the batch axis.
        cond: sample indices (B,) -> conditioning tensors with leading axis B, so that sample i has
            the same conditions in every candidate; None for an unconditional model.
        guidance: the guidance scale samples are made with, None for a model without guidance.
        fingerprint: a short name and hash of the weights, written into schedule files; "" if
            unknown.
        features: images (B, *shape) -> (B, F), for the Frechet objective; None if there is none.
        picture: images (B, *shape) -> (B, H, W) or (B, H, W, 3) in 0..1, for contact sheets; None
            for a default.
        decode: samples (B, *shape) -> images (B, 3, H, W) or videos (B, F, 3, H, W) in 0..1, for a
            study's own feature function; None where samples are what it is given.
        plain_start: the first call is asked with the start noise as it is (p_0 = 1, no image), as
            pipelines do that do not scale their input.
        baselines: network calls -> further schedules by name that a search must beat, such as the
            one in use today; None if there are none.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    cond: Callable[[Tensor], dict[str, Tensor]] | None = None
    guidance: float | None = None
    fingerprint: str = ""
    features: Callable[[Tensor], Tensor] | None = None
    picture: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    plain_start: bool = False
    baselines: Callable[[int], Mapping[str, OdeSchedule | ProgramSchedule]] | None = None


@dataclass(frozen=True, kw_only=True)
class MaskedProblem:
    """A masked diffusion model to find schedules for; a sample is one sequence.

    With a `target` a sample is one population of weighted sequences (`sample_tilted`), and counts,
    temperatures and orders are searched.

    Args:
        denoiser: the model behind the TokenDenoiser contract.
        length: tokens of a sequence, a prompt included.
        objective: name of the score, e.g. "fcd"; smaller is better.
        measure: sequences (B, length) -> numbers (B, K), or with a target B populations
            (`Particles`). With a `score`, a row of NaN is a sample that has none, such as a string
            that is no molecule, and is left out.
        score: the measures (N, K) of the samples that have them -> the score. None takes the mean
            of column 0 and compares schedules sample by sample.
        facts: measures (N, K) -> further numbers by name, reported beside the final score.
        noise: the masking schedule; matters to networks that are told the time.
        prompt: sample indices (B,) -> sequences (B, length) with the mask id where a token is
            wanted, as many in each; None is all mask.
        curve: h(m), the model's cross-entropy of a masked token with m random ones visible, for
            every number of free positions m (see `samplers.curve`); the counts of least expected
            divergence are then among the named schedules, as "dp". None is unknown.
        fingerprint: a short name and hash of the weights; "" if unknown.
        picture: sequences (B, length) -> (B, H, W) or (B, H, W, 3) in 0..1; None if there is none.
        target: what populations are weighed towards; None draws from the schedule's law.
        particles: sequences of a population, with a target.
        step: how weights are used after every call; None resamples a population where its
            effective size falls below one half.
    """

    denoiser: TokenDenoiser
    length: int
    objective: str
    measure: Callable[[Any], Tensor]
    score: Callable[[Array], float] | None = None
    facts: Callable[[Array], dict[str, float]] | None = None
    noise: MaskedNoise = field(default_factory=MaskedNoise)
    prompt: Callable[[Tensor], Tensor] | None = None
    curve: Sequence[float] | None = None
    fingerprint: str = ""
    picture: Callable[[Tensor], Tensor] | None = None
    target: TiltedLaw | None = None
    particles: int = 1
    step: ParticleStep | None = None

    def sample(
        self,
        schedule: MaskedSchedule,
        denoiser: TokenDenoiser,
        tokens: Tensor,
        *,
        u: Tensor,
        generator: torch.Generator,
    ) -> Tensor | Particles:
        """Samples of a schedule: what `measure` takes.

        Args:
            schedule: the schedule.
            denoiser: the problem's, or one that counts.
            tokens: sequences to complete, (B, length).
            u: their uniforms, for sequences.
            generator: source of all randomness, for populations.
        """
        if self.target is None:
            return sample_masked(schedule, denoiser, tokens, u=u)
        many = tokens[:, None].repeat(1, self.particles, 1)
        shared: dict[str, Any] = {"steps": self.step, "generator": generator, "warn_ess": 0.0}
        return sample_tilted(schedule, denoiser, self.target, many, **shared)


@dataclass(frozen=True, kw_only=True)
class ParticleProblem:
    """A target to find particle schedules for; a sample is one population of K particles.

    Args:
        target: what the particles are weighted towards.
        shape: shape of one particle.
        particles: K.
        objective: name of the score, e.g. "energy_distance"; smaller is better.
        measure: P populations, and a seed for each that is the same in every schedule (for what
            the measure itself draws) -> numbers (P, K'), finite.
        score: as in `MaskedProblem`.
        facts: as in `MaskedProblem`.
        exact_start: weigh the start states to the target (see `sample_particles`).
        fingerprint: a short name of the target; "" if unknown.
        picture: states (P, K, *shape) -> (P, H, W) or (P, H, W, 3) in 0..1; None if there is none.
    """

    target: Target
    shape: tuple[int, ...]
    particles: int
    objective: str
    measure: Callable[[Particles, Sequence[int]], Tensor]
    score: Callable[[Array], float] | None = None
    facts: Callable[[Array], dict[str, float]] | None = None
    exact_start: bool = False
    fingerprint: str = ""
    picture: Callable[[Tensor], Tensor] | None = None


AnyProblem = Problem | MaskedProblem | ParticleProblem


def device_of(problem: AnyProblem) -> torch.device:
    """Where the network runs, as its denoiser's `device` says; the CPU where it says nothing."""
    denoiser = problem.denoiser if isinstance(problem, Problem) else None
    return torch.device(getattr(denoiser, "device", None) or "cpu")


def conditions(problem: Problem, indices: Sequence[int]) -> dict[str, Tensor] | None:
    """The conditioning tensors of samples, or None for an unconditional model."""
    return None if problem.cond is None else problem.cond(torch.as_tensor(list(indices)))


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
