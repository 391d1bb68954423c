"""Run a schedule on a model. Needs torch only; never imports what finds schedules."""

from fewstep.samplers.denoiser import Denoiser, ModelDenoiser, Problem, fingerprint, from_model
from fewstep.samplers.ode import run, sample, start

__all__ = [
    "Denoiser",
    "ModelDenoiser",
    "Problem",
    "fingerprint",
    "from_model",
    "run",
    "sample",
    "start",
]
