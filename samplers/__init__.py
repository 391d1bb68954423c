"""Run a schedule on a model. Needs torch only; never imports what finds schedules."""

from fewstep.samplers.denoiser import Denoiser, ModelDenoiser, fingerprint, from_model
from fewstep.samplers.masked import sample_masked
from fewstep.samplers.ode import run, run_candidates, sample, start
from fewstep.samplers.particles import Particles, sample_particles, start_particles
from fewstep.samplers.problems import AnyProblem, MaskedProblem, ParticleProblem, Problem
from fewstep.samplers.token_denoiser import (
    TokenDenoiser,
    from_hf_masked_lm,
    from_subs,
    start_masked,
)

__all__ = [
    "AnyProblem",
    "Denoiser",
    "MaskedProblem",
    "ModelDenoiser",
    "ParticleProblem",
    "Particles",
    "Problem",
    "TokenDenoiser",
    "fingerprint",
    "from_hf_masked_lm",
    "from_model",
    "from_subs",
    "run",
    "run_candidates",
    "sample",
    "sample_masked",
    "sample_particles",
    "start",
    "start_masked",
    "start_particles",
]
