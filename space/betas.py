"""Tables of discrete noise schedules: log alpha at the N training steps, float64.

The named beta schedules are those that published checkpoints name: "linear" and "scaled_linear"
(Ho et al. 2020, arXiv 2006.11239; latent diffusion), "squaredcos_cap_v2" (Nichol and Dhariwal
2021, 2102.09672, eq. 17, betas capped at .999) and "sigmoid" (GeoDiff). `zero_snr` rescales the
square roots of the products so that the last training step holds no data (Lin et al. 2023,
2305.08891, algorithm 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")

ALPHA_FLOOR = 2.0**-24
"""alpha squared of the last training step after `zero_snr`, which would else be 0: log alpha stays
finite. The value is the smallest half-precision number, as samplers of such models take it."""


def named_betas(name: str, start: float, end: float, n: int) -> Tensor:
    """The n betas of a named schedule, float64.

    Args:
        name: one of `BETAS`.
        start: first beta; "squaredcos_cap_v2" ignores it.
        end: last beta; "squaredcos_cap_v2" ignores it.
        n: training steps.
    """
    if name == "linear":
        return torch.linspace(start, end, n, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
    if name == "sigmoid":
        ramp = torch.linspace(-6, 6, n, dtype=torch.float64)
        return torch.sigmoid(ramp) * (end - start) + start
    edges = torch.arange(n + 1, dtype=torch.float64) / n
    left = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - left[1:] / left[:-1]).clamp(max=0.999)


def log_alpha_of(betas: Tensor, *, zero_snr: bool = False) -> Tensor:
    """log alpha at the labels 0..N-1, float64.

    Args:
        betas: N betas, float64, within (0, 1).
        zero_snr: rescale to no signal at the last training step.
    """
    if not zero_snr:
        return 0.5 * torch.log(torch.cumprod(1 - betas, dim=0))
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    squared = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    squared[-1] = ALPHA_FLOOR
    return 0.5 * torch.log(squared)
