"""Resampling of weighted particles: systematic draws, effective sample size, birth-death clocks.

All weights are float64 with shape (P, K): P independent populations of K particles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Clocks", "effective", "log_mean", "systematic"]


def effective(log_weights: Tensor) -> Tensor:
    """Effective sample size 1/sum wbar^2 as a share of K, shape (P,), in [0, 1]; 0: all dead."""
    wbar = torch.softmax(log_weights, dim=1)
    share = 1 / (wbar.square().sum(1) * log_weights.shape[1])
    return torch.where(log_weights.amax(1) == -math.inf, torch.zeros_like(share), share)


def log_mean(log_weights: Tensor) -> Tensor:
    """Log of the mean weight, shape (P,)."""
    return torch.logsumexp(log_weights, dim=1) - math.log(log_weights.shape[1])


def systematic(
    weights: Tensor, generator: torch.Generator | None, *, count: int | None = None
) -> Tensor:
    """Systematic resampling: points (u + j)/n through the cumulative weights, one u each.

    Args:
        weights: normalised, shape (P, K).
        generator: source of u.
        count: draws n per population [K].

    Returns:
        Indices, shape (P, n), increasing: particle k occurs floor or ceil of n wbar_k times.
        Equal weights with n = K keep every particle.
    """
    size = weights.shape[1]
    n = size if count is None else count
    u = torch.rand(
        len(weights), 1, generator=generator, dtype=torch.float64, device=weights.device
    )
    points = u + torch.arange(n, dtype=torch.float64, device=weights.device)
    edges = weights.cumsum(1)
    edges = edges / edges[:, -1:] * n
    index = torch.searchsorted(edges, points, right=True).clamp(max=size - 1)
    # a draw must not land on a weight of 0 by rounding at the far end
    last = (weights > 0).long() * torch.arange(size, device=weights.device)
    index = torch.minimum(index, last.amax(1, keepdim=True))
    if n != size:
        return index
    equal = (weights == weights[:, :1]).all(1, keepdim=True)
    return torch.where(equal, torch.arange(n, device=weights.device), index)


class Clocks:
    """Birth-death clocks: particles of little weight die, copies of weighty ones take their place.

    With wbar the normalised weights of a step, a particle's death clock advances by
    (-log(K wbar))^+ and rings at an Exp(1) time, so it dies with probability (1 - K wbar)^+; it is
    then replaced by a particle drawn in proportion to (K wbar - 1)^+. A particle therefore has
    K wbar descendants on average, whatever the size of the step; in small steps the rates are
    the published ones, (mean - own)^+ and (own - mean)^+ of the increments. Weights are equal
    afterwards.

    Reference: the "BDC" of the code released with Skreta et al. 2503.02819, written from its
    description; the form that is exact for weights of any size is derived here.
    """

    def __init__(self, like: Tensor, generator: torch.Generator | None) -> None:
        self._generator = generator
        self.dead = torch.zeros_like(like)
        self.limit = self._exponential(like)

    def _exponential(self, like: Tensor) -> Tensor:
        u = torch.rand(like.shape, generator=self._generator, dtype=like.dtype, device=like.device)
        return -torch.log1p(-u)

    def ring(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Run the clocks by one step's log-weights, shape (P, K), some of them finite.

        Returns:
            Indices (P, K), and which populations changed, (P,).
        """
        excess = torch.softmax(log_weights, dim=1) * log_weights.shape[1]
        self.dead = self.dead + (-excess.log()).clamp(min=0)
        births = (excess - 1).clamp(min=0)
        rings = (self.dead > self.limit) & (births.sum(1, keepdim=True) > 0)
        due = rings.any(1)
        stay = torch.arange(log_weights.shape[1], device=log_weights.device).expand_as(rings)
        if not bool(due.any()):
            return stay, due
        parents = torch.multinomial(
            torch.where(due[:, None], births, torch.ones_like(births)),
            births.shape[1],
            replacement=True,
            generator=self._generator,
        )
        self.limit = torch.where(rings, self._exponential(self.limit), self.limit)
        self.dead = torch.where(rings, torch.zeros_like(self.dead), self.dead)
        return torch.where(rings, parents, stay), due
