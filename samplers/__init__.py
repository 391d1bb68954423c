"""Run a schedule on a model. Needs torch only; never imports what finds schedules."""

from fewstep.samplers.denoiser import Denoiser, ModelDenoiser, Problem, fingerprint, from_model
from fewstep.samplers.ode import run, sample, start
from fewstep.samplers.particles import Particles, sample_particles, start_particles

__all__ = [
    "Denoiser",
    "ModelDenoiser",
    "Particles",
    "Problem",
    "fingerprint",
    "from_model",
    "run",
    "sample",
    "sample_particles",
    "start",
    "start_particles",
]
