"""The weights of populations of particles, and what resampling does to them.

A log-weight is the sum of finite increments, and of a potential that is replaced as a whole: the
last one counts. A potential of -inf makes a particle dead, which is kept beside the sum so that
nothing is ever -inf minus -inf: a dead particle weighs 0, is never copied, and counts again if it
lives to see a finite potential. All numbers are float64, shape (P, K).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.samplers.resampling import Clocks, effective, log_mean, systematic
from fewstep.samplers.rewards import require_numbers
from fewstep.space.errors import ModelError
from fewstep.space.particles import ParticleStep

__all__ = ["ParticleCollapse", "Weights"]


class ParticleCollapse(UserWarning):
    """The weights of a population amount to next to no particles: its law is not to be trusted."""


class Weights:
    """Weights, normalisers and ancestors of P populations of K particles.

    Args:
        size: (P, K).
        generator: source of the draws, on `device`.
        device: where the numbers live.
        clocks: whether steps resample by birth-death clocks.
    """

    def __init__(
        self,
        size: tuple[int, int],
        generator: torch.Generator | None,
        device: torch.device,
        *,
        clocks: bool = False,
    ) -> None:
        self.P, self.K = size
        self._generator = generator
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._potential = torch.zeros_like(self._sum)
        self._dead = torch.zeros_like(self._sum, dtype=torch.bool)
        self._clocks = Clocks(self._sum, generator) if clocks else None
        self.log_z = torch.zeros(self.P, dtype=torch.float64, device=device)
        self.ancestors = torch.arange(self.K, device=device).expand(self.P, self.K)
        self.ess: list[Tensor] = []
        self.resampled: list[Tensor] = []

    @property
    def log(self) -> Tensor:
        """Log-weights, -inf where dead."""
        return torch.where(self._dead, -math.inf, self._sum)

    def change(self, potential: Tensor) -> Tensor:
        """Replace the potential, (P K,) and finite or -inf; the increment that takes, (P K,)."""
        new = potential.reshape(self.P, self.K)
        self._dead = new == -math.inf
        new = torch.where(self._dead, self._potential, new)
        old, self._potential = self._potential, new
        return (new - old).flatten()

    def add(self, increment: Tensor, where: str) -> None:
        """Add increments (P K,), finite or -inf.

        Raises:
            ModelError: one that is not, naming the particle and `where`.
        """
        require_numbers(increment, self.K, "log-weight", where)
        self._sum = self._sum + increment.reshape(self.P, self.K)

    def settle(self, step: ParticleStep, where: str) -> Tensor | None:
        """Resample as a step says.

        Returns:
            Indices (P, K) by which everything attached to a particle must be gathered, or None
            where nothing moves.

        Raises:
            ModelError: a population to be resampled has no particle alive.
        """
        log = self.log
        ess = effective(log)
        if self._clocks is not None and step.resample == "clocks":
            self._require_alive(log, torch.ones_like(ess, dtype=torch.bool), where)
            index, due = self._clocks.ring(log)
            self._restart(log, torch.ones_like(due))
        else:
            due = torch.zeros(self.P, dtype=torch.bool, device=log.device)
            if step.resample == "always":
                due = ~due
            elif step.resample == "ess":
                due = ess < step.ess
            if bool(due.any()):
                self._require_alive(log, due, where)
                drawn = systematic(torch.softmax(log, dim=1), self._generator)
                stay = torch.arange(self.K, device=log.device).expand_as(drawn)
                index = torch.where(due[:, None], drawn, stay)
                self._restart(log, due)
        self.ess.append(ess)
        self.resampled.append(due)
        if not bool(due.any()):
            return None
        self.ancestors = self.ancestors.gather(1, index)
        self._potential = self._potential.gather(1, index)
        self._dead = self._dead.gather(1, index)
        return index

    def _restart(self, log: Tensor, due: Tensor) -> None:
        """Put what the weights say of the normaliser aside and make them equal."""
        self.log_z = torch.where(due, self.log_z + log_mean(log), self.log_z)
        self._sum = torch.where(due[:, None], torch.zeros_like(self._sum), self._sum)

    def _require_alive(self, log: Tensor, due: Tensor, where: str) -> None:
        lost = due & (log.amax(1) == -math.inf)
        if bool(lost.any()):
            raise ModelError(
                f"all particles of population {int(lost.nonzero()[0])} are dead {where}, of "
                "rewards or densities of -inf: let the reward act later (schedule.late, or b = 0 "
                "in the steps before), give it a floor, or use more particles"
            )

    def finish(self, where: str) -> Tensor:
        """Log-weights at the end.

        Raises:
            ModelError: a population without a particle alive.
        """
        log = self.log
        self._require_alive(log, torch.ones_like(self.log_z, dtype=torch.bool), where)
        return log

    def collapse(self, bound: float, remedy: Callable[[int], str]) -> str | None:
        """What to warn of, or None.

        Args:
            bound: share of K, 0 or more; a population also counts as collapsed below two
                particles, or when all its particles descend from one. Sizes count where they
                decide: at a resampling and at the end. 0 looks at nothing.
            remedy: index of the step with the smallest effective sample size -> what to change.
        """
        if bound <= 0 or self.K < 3:
            return None
        ess, decides = torch.stack(self.ess), torch.stack(self.resampled)
        decides[-1] = True
        ess = torch.where(decides, ess, torch.ones_like(ess))
        least, p = ess.amin(0).min(0)
        step = int(ess[:, p].argmin())
        alone = sum(len(row.unique()) == 1 for row in self.ancestors)
        if float(least) * self.K >= max(2.0, bound * self.K) and not alone:
            return None
        return (
            f"effective sample size fell to {float(least) * self.K:.1f} of {self.K} particles at "
            f"step {step} (population {int(p)}); {alone} of {self.P} populations descend from one "
            f"particle each: {remedy(step)}"
        )
