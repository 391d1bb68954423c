"""What a study's factory returns: a model, and what makes its samples good.

`Problem` is searched for ODE schedules, `MaskedProblem` for masked ones (with a `target`, of
populations of weighted sequences), `ParticleProblem` for those of weighted particles. A `Problem`
is scored against its own teacher; the two others, whose samples are drawn, bring a measure:
numbers per sample, from which a score is made. Each says which schedules are for it (`check`), and
which of them are named (`named`): what a search must beat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.samplers.denoiser import Denoiser
from fewstep.samplers.masked import sample_masked
from fewstep.samplers.masked_particles import TiltedLaw, sample_tilted
from fewstep.samplers.particles import Particles
from fewstep.samplers.sample_noise import noise_of
from fewstep.samplers.targets import Target
from fewstep.samplers.token_denoiser import TokenDenoiser, start_masked
from fewstep.space.baselines import named as named_solvers
from fewstep.space.errors import ModelError, StudyError, blamed
from fewstep.space.masked import MaskedNoise, MaskedSchedule
from fewstep.space.masked_domain import MaskedDomain
from fewstep.space.particle_policies import named_policies
from fewstep.space.particles import ParticleSchedule, ParticleStep
from fewstep.space.program import ProgramSchedule
from fewstep.space.schedule import OdeSchedule

__all__ = [
    "AnyProblem",
    "MaskedProblem",
    "ParticleProblem",
    "Problem",
    "conditions",
    "device_of",
    "model_key",
    "prompts",
]

Array = NDArray[np.float64]


class _Asks:
    """What problems have in common.

    Attributes:
        kind: the kind that schedule files for it name.
        has_teacher: whether samples are scored against a teacher's; only then can schedules be
            refined.
        per_sample: network evaluations of one sample and one call.
    """

    kind: ClassVar[str]
    has_teacher: ClassVar[bool] = False

    @property
    def per_sample(self) -> int:
        """One, or the sequences of a population."""
        return int(getattr(self, "particles", 1))

    def check(self, schedule: Any, name: str) -> None:
        """Raise a FewstepError if a schedule from a file is not for this problem."""
        if schedule.kind != self.kind:
            raise StudyError(
                f"{name} is a schedule of kind {schedule.kind!r}, and the study's model needs "
                f"kind {self.kind!r}"
            )


@dataclass(frozen=True)
class Problem(_Asks):
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
    kind: ClassVar[str] = "ode"
    has_teacher: ClassVar[bool] = True

    def named(self, nfe: int) -> dict[str, Any]:
        """The problem's own baselines, and every named solver on every grid: "name/variant"."""
        own = {} if self.baselines is None else self.baselines(nfe)
        return {**own, **named_solvers(self.denoiser.noise, nfe)}

    def check(self, schedule: Any, name: str) -> None:
        """Raise a FewstepError if a schedule from a file is not for this problem."""
        super().check(schedule, name)
        if schedule.noise != self.denoiser.noise:
            raise ModelError(
                f"{name} was made for noise schedule {schedule.noise.type}, and the study's model "
                f"has another ({self.denoiser.noise.type}): search for this model"
            )


@dataclass(frozen=True, kw_only=True)
class MaskedProblem(_Asks):
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
    kind: ClassVar[str] = "masked"

    @property
    def free(self) -> int:
        """Positions to decide in a sequence.

        Raises:
            StudyError: the prompt leaves none.
        """
        count = int((prompts(self, range(1)) == self.denoiser.mask).sum())
        if count == 0:
            raise StudyError("the prompt leaves no position to decide: put the mask id where a "
                             "token is wanted")  # fmt: skip
        return count

    @property
    def settled(self) -> dict[str, Any]:
        """What the problem says of its schedules: fields of `MaskedDomain`."""
        return {"noise": self.noise, "curve": None if self.curve is None else tuple(self.curve)}

    def named(self, nfe: int) -> dict[str, Any]:
        """The named counts, the same choices at every call.

        Raises:
            StudyError: more calls than positions.
        """
        tilted = self.target is not None
        choices: dict[str, Any] = {
            "modes": ("parallel",) if tilted else ("parallel", "extrapolate"),
            "positions": ("uniform", "confidence"),
        }
        with blamed("search.nfe"):
            every = MaskedDomain(self.free, nfe, **self.settled, **choices)
        return dict(every.baselines())

    def check(self, schedule: Any, name: str) -> None:
        """Raise a FewstepError if a schedule from a file is not for this problem."""
        super().check(schedule, name)
        assert isinstance(schedule, MaskedSchedule)
        if schedule.length != self.free:
            raise ModelError(
                f"{name} decides {schedule.length} positions, and the study's sequences have "
                f"{self.free} free ones: search for this model"
            )

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
class ParticleProblem(_Asks):
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
    kind: ClassVar[str] = "particles"

    @property
    def per_sample(self) -> int:
        """A population of K particles, asked of every model."""
        return self.particles * len(self.target.factors)

    @property
    def two_ways(self) -> bool:
        """Whether the target's reward can be weighed by its gradient as well as by its path."""
        reward = self.target.reward
        return reward is not None and reward.integrable

    def named(self, nfe: int) -> dict[str, Any]:
        """The authors' policies, with both integrators, on three grids."""
        target = self.target
        strength = 1.0 if target.reward is not None else target.strength
        return dict(named_policies(target.noise, nfe, b=strength, paths=self.two_ways))

    def check(self, schedule: Any, name: str) -> None:
        """Raise a FewstepError if a schedule from a file is not for this problem."""
        super().check(schedule, name)
        assert isinstance(schedule, ParticleSchedule)
        self.target.require_noise(schedule.noise)


AnyProblem = Problem | MaskedProblem | ParticleProblem


def device_of(problem: AnyProblem) -> torch.device:
    """Where the network runs, as its denoiser's `device` says; the CPU where it says nothing."""
    denoiser = problem.denoiser if isinstance(problem, Problem) else None
    return torch.device(getattr(denoiser, "device", None) or "cpu")


def conditions(problem: Problem, indices: Sequence[int]) -> dict[str, Tensor] | None:
    """The conditioning tensors of samples, or None for an unconditional model."""
    return None if problem.cond is None else problem.cond(torch.as_tensor(list(indices)))


def model_key(problem: Problem) -> str:
    """What tells one model from another: its fingerprint and its answer to one probe."""
    z = noise_of(0, "probe", range(2), problem.shape)
    t_start, t_end = problem.denoiser.noise.t_range
    t = torch.full((2,), (t_start + t_end) / 2, dtype=torch.float64)
    guidance = problem.guidance
    with torch.no_grad():
        out = problem.denoiser(z, t, cond=conditions(problem, range(2)), guidance=guidance)
    probe = hashlib.sha256(out.to(torch.float32).cpu().contiguous().numpy().tobytes()).hexdigest()[
        :12
    ]
    return f"{problem.fingerprint}/{probe}/{guidance}"


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
