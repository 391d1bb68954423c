"""What a study's factory returns: a model, and what makes its samples good.

`Problem` is searched for ODE schedules, `MaskedProblem` for masked ones, `ParticleProblem` for
those of weighted particles. A `Problem` is scored against its own teacher; the two others, whose
samples are drawn, bring a measure: numbers per sample, from which a score is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fewstep.samplers.denoiser import Denoiser
from fewstep.samplers.particles import Particles
from fewstep.samplers.targets import Target
from fewstep.samplers.token_denoiser import TokenDenoiser
from fewstep.space.masked import MaskedNoise
from fewstep.space.program import ProgramSchedule
from fewstep.space.schedule import OdeSchedule

__all__ = ["AnyProblem", "MaskedProblem", "ParticleProblem", "Problem"]

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
    baselines: Callable[[int], Mapping[str, OdeSchedule | ProgramSchedule]] | None = None


@dataclass(frozen=True, kw_only=True)
class MaskedProblem:
    """A masked diffusion model to find schedules for; a sample is one sequence.

    Args:
        denoiser: the model behind the TokenDenoiser contract.
        length: tokens of a sequence, a prompt included.
        objective: name of the score, e.g. "fcd"; smaller is better.
        measure: sequences (B, length) -> numbers (B, K). With a `score`, a row of NaN is a sample
            that has none, such as a string that is no molecule, and is left out.
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
    """

    denoiser: TokenDenoiser
    length: int
    objective: str
    measure: Callable[[Tensor], Tensor]
    score: Callable[[Array], float] | None = None
    facts: Callable[[Array], dict[str, float]] | None = None
    noise: MaskedNoise = field(default_factory=MaskedNoise)
    prompt: Callable[[Tensor], Tensor] | None = None
    curve: Sequence[float] | None = None
    fingerprint: str = ""
    picture: Callable[[Tensor], Tensor] | None = None


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
