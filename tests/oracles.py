"""Models whose data prediction is known exactly: isotropic Gaussian mixtures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.samplers.denoiser import bcast
from fewstep.space import noise as noises
from fewstep.space.noise import NoiseSchedule

REFERENCE = Path(__file__).parent / "reference"


@dataclass
class Mixture:
    """x0 ~ sum_k w_k N(m_k, v_k I); a Denoiser (exact posterior mean) for any noise schedule."""

    noise: NoiseSchedule
    weights: Tensor
    means: Tensor
    variances: Tensor
    calls: int = 0

    def __call__(self, x, t, *, cond=None, guidance=None):
        self.calls += 1
        t = t.to(torch.float64)
        alpha, sigma = bcast(self.noise.alpha(t), x), bcast(self.noise.sigma(t), x)
        return (x - sigma * self.eps(x, alpha, sigma)) / alpha

    def eps(self, x, alpha, sigma):
        dim = self.means[0].numel()
        k = len(self.weights)
        shape = (k, *(1,) * x.ndim)
        w, v = self.weights.to(x).reshape(shape), self.variances.to(x).reshape(shape)
        centred = x[None] - alpha * self.means.to(x)[:, None]
        spread = alpha**2 * v + sigma**2
        square = (centred**2).flatten(2).sum(-1).reshape(k, len(x), *(1,) * (x.ndim - 1))
        r = torch.softmax(
            torch.log(w) - dim / 2 * torch.log(spread) - square / (2 * spread), dim=0
        )
        return sigma * (r * centred / spread).sum(0)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def recorded_mixture(noise: NoiseSchedule, folder: Path = REFERENCE) -> Mixture:
    """The mixture of the reference cases."""
    data = json.loads((folder / "mixture.json").read_text())
    parts = (torch.tensor(data[k], dtype=torch.float64) for k in ("weights", "means", "variances"))
    return Mixture(noise, *parts)


def two_modes(noise: NoiseSchedule) -> Mixture:
    """The one-dimensional mixture of the order tests."""
    return Mixture(noise, f64(0.3, 0.7), f64(-1.0, 1.2)[:, None], f64(0.09, 0.16))


def gaussian(noise: NoiseSchedule, mean: float = 0.7, variance: float = 0.25) -> Mixture:
    """One Gaussian."""
    return Mixture(noise, f64(1.0), f64(mean)[:, None], f64(variance))


def reference_noise(name: str) -> NoiseSchedule:
    """The noise schedule of a reference frame."""
    return {
        "edm": noises.EDM(),
        "vp_linear": noises.VPLinear(),
        "score_sde": noises.VPLinear(label_scale=999.0),
        "sd_discrete": noises.VPDiscrete(),
        "ddpm_linear": noises.VPDiscrete(betas="linear", beta_start=1e-4, beta_end=0.02),
        "imagenet256": noises.VPDiscrete(betas="linear", beta_start=1e-4, beta_end=0.02),
        "lsun": noises.VPDiscrete(beta_start=0.0015, beta_end=0.0195),
        "stable_diffusion": noises.VPDiscrete(),
    }[name]
