"""Masked diffusion models small enough to enumerate."""

import itertools

import torch
from torch import Tensor

from fewstep.samplers.token_denoiser import from_subs

LENGTH, TOKENS = 4, 3
MASK = TOKENS


def random_joint(seed: int = 0, length: int = LENGTH, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gamma = torch._standard_gamma(
        torch.full((tokens**length,), 0.3, dtype=torch.float64), generator=generator
    )
    return (gamma / gamma.sum()).reshape((tokens,) * length)


class TableModel:
    """The exact conditionals of an enumerated joint: the optimal masked diffusion model."""

    def __init__(self, joint: Tensor) -> None:
        self.length, self.tokens = joint.ndim, joint.shape[0]
        states = itertools.product(range(self.tokens + 1), repeat=self.length)
        self.table = torch.stack([self._row(joint, s) for s in states])
        self.powers = (self.tokens + 1) ** torch.arange(self.length - 1, -1, -1)

    def _row(self, joint: Tensor, state: tuple[int, ...]) -> Tensor:
        seen = joint[tuple(v if v < self.tokens else slice(None) for v in state)]
        free = [i for i, v in enumerate(state) if v == self.tokens]
        row = torch.zeros(self.length, self.tokens + 1, dtype=torch.float64)
        for axis, i in enumerate(free):
            marginal = seen.sum([a for a in range(len(free)) if a != axis]) if free[1:] else seen
            row[i, : self.tokens] = marginal / seen.sum()
        return row.log()

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.table[(tokens * self.powers).sum(-1)]


JOINT = random_joint()


def table_denoiser(joint: Tensor = JOINT):
    return from_subs(TableModel(joint), joint.shape[0], length=joint.ndim)


def blank(batch: int, length: int = LENGTH, mask: int = MASK) -> Tensor:
    return torch.full((batch, length), mask)


def variation(samples: Tensor, joint: Tensor, weights: Tensor | None = None) -> float:
    base = joint.shape[0] ** torch.arange(joint.ndim - 1, -1, -1)
    weights = torch.ones(len(samples), dtype=torch.float64) if weights is None else weights
    law = torch.bincount((samples * base).sum(-1), weights, minlength=joint.numel())
    return float((law / weights.sum() - joint.flatten()).abs().sum() / 2)
