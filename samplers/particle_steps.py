"""One step of the particles' equation without its weights: the coefficients of two integrators.

Frame: y = x/alpha, rho = sigma/alpha, h = lam' - lam; B is the sum of the target's exponents. All
numbers are float64; the state x is in the model's own scale, hence the factors alpha'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Coefficients", "euler", "exponential"]


@dataclass(frozen=True)
class Coefficients:
    """x' = x * state + D * (pull or data prediction) + slope * b grad r + z * noise."""

    x: float
    D: float
    slope: float
    z: float


def exponential(
    zeta: float,
    total: float,
    alpha: tuple[float, float],
    sigma: tuple[float, float],
    h: float,
) -> Coefficients:
    """Exact for a data prediction that stands still; kappa = (1 + zeta^2) B.

    y' = e^{-kappa h} y + (1 - e^{-kappa h})/B sum b_i D_i + zeta rho' sqrt((1 - e^{-2(kappa-1)h})
    /(kappa-1)) z; the reward's part is zeta^2 rho'^2 (e^{(2-kappa)h} - 1)/(2-kappa). For zeta = 1
    and B = 1 it is the ancestral step, for zeta = 0 DDIM.
    """
    kappa = (1 + zeta**2) * total
    ratio = torch.tensor([alpha[1], sigma[1]], dtype=torch.float64)
    ratio = ratio / torch.tensor([alpha[0], sigma[0]], dtype=torch.float64)
    state = float(ratio[0] ** (1 - kappa) * ratio[1] ** kappa)
    shrink = -math.expm1(-kappa * h) if math.isfinite(h) else 1.0
    fresh = slope = 0.0
    if sigma[1] > 0 and zeta > 0:
        fresh = zeta * sigma[1] * math.sqrt(_integral(kappa - 1, 2 * h))
        slope = zeta**2 * sigma[1] ** 2 / alpha[1] * _integral(kappa - 2, h)
    return Coefficients(state, alpha[1] * shrink / total, slope, fresh)


def _integral(k: float, h: float) -> float:
    """(1 - e^{-k h})/k, h at k = 0."""
    return -math.expm1(-k * h) / k if abs(k) > 1e-9 else h


def euler(
    zeta: float,
    total: float,
    alpha: tuple[float, float],
    sigma: tuple[float, float],
    h: float,
) -> Coefficients:
    """Euler-Maruyama in rho^2, G = rho^2 - rho'^2 (2503.02819, algorithm 1).

    y' = y + (1 + zeta^2)/2 (G/rho^2) (D - y) + zeta^2 (G/2) b grad r + zeta sqrt(G) z.
    """
    share = -math.expm1(-2 * h) if math.isfinite(h) else 1.0
    rho = sigma[0] / alpha[0]
    f = (1 + zeta**2) / 2 * share
    slope = zeta**2 * rho**2 * share / 2
    fresh = zeta * rho * math.sqrt(share)
    return Coefficients(
        alpha[1] / alpha[0] * (1 - f), alpha[1] * f, alpha[1] * slope, alpha[1] * fresh
    )
