"""Rewards: what particles are tilted by, and what moves them towards it.

A target may carry a factor exp(b r). r is a function of samples in data units, seen either at the
noisy state y = x/alpha or at the data prediction D. r(x) = -inf is a hard constraint: such a
particle is dead, it has weight 0 as long as the constraint is broken, and no copy of it is drawn.
Resampling before the end therefore also removes particles that would have come to obey, and the
law leans away from the constraint's border. It is exact where the constraint acts at the
end alone (b = 0 in all steps), and with a floor: exp(floor) is what a dead particle weighs until
then.

The guide is a vector field u that stands for grad r in the particles' equation: it adds
zeta^2 rho^2 b u dlam to dy. Weighed by paths (`samplers.particles`) every guide gives the same
target; a better one gives more even weights. At the data prediction the guide is multiplied by
`ramp_share` of scale 1, which stands for dD/dy, so that no derivative of the network is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.space.errors import ModelError, ScheduleError

__all__ = ["Guide", "Reward", "scalar"]

Guide = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reward:
    """A reward r and how particles follow it.

    Args:
        value: samples (B, *shape) in data units -> (B,), finite or -inf.
        at: "state" (r of y = x/alpha) or "data" (r of the data prediction).
        guide: True (the gradient of r, by automatic differentiation), False (nothing: r is a
            black box and only weighs), or a function of what r sees, (B, *shape) -> (B, *shape).
        ramp: scale of the rise of b in steps that do not set it, in data units, > 0; inf holds b.
        floor: the least b r counts for before the end, where it is weighed by its path; changes
            who survives, never the target. -inf lets the dead be dead at once.

    Raises:
        ScheduleError: another `at`, a ramp that is not above 0, or a floor that is NaN or +inf.
    """

    value: Callable[[Tensor], Tensor]
    at: Literal["state", "data"] = "state"
    guide: bool | Guide = True
    ramp: float = 1.0
    floor: float = -math.inf

    def __post_init__(self) -> None:
        if self.at not in ("state", "data"):
            raise ScheduleError(f"a reward at {self.at!r} is unknown: use 'state' or 'data'")
        if not self.ramp > 0:
            raise ScheduleError(f"ramp {self.ramp} must be above 0: inf holds b constant")
        if not self.floor < math.inf:
            raise ScheduleError(f"floor {self.floor} must be a number or -inf")

    @property
    def integrable(self) -> bool:
        """Whether its gradient may weigh it: a reward on the state that its gradient guides."""
        return self.at == "state" and self.guide is True

    def __call__(self, points: Tensor) -> Tensor:
        """r, shape (B,), float64."""
        return scalar(self.value(points), len(points), "reward")

    def pull(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """r, shape (B,), float64, and the guide, (B, *shape) or None where nothing guides.

        Raises:
            ModelError: r has no gradient but should guide, its gradient is 0 everywhere although
                r varies, or a guide of another shape.
        """
        if self.guide is False:
            return self(points), None
        if self.guide is not True:
            slope = self.guide(points)
            if slope.shape != points.shape:
                raise ModelError(
                    f"the guide returned {tuple(slope.shape)} for points {tuple(points.shape)}"
                )
            return self(points), slope.to(points.dtype)
        with torch.enable_grad():
            leaf = points.detach().requires_grad_(True)
            r = self.value(leaf)
            if not r.requires_grad:
                raise ModelError(
                    "the reward has no gradient to follow: give reward(..., guide=False) for a "
                    "black box, which is weighed by paths"
                )
            (slope,) = torch.autograd.grad(r.sum(), leaf)
        found = scalar(r.detach(), len(points), "reward")
        if not bool(slope.any()) and bool((found != found[0]).any()):
            raise ModelError(
                "the reward differs between particles but its gradient is 0: give "
                "reward(..., guide=False) for a black box, which is weighed by paths"
            )
        return found, slope.detach()


def scalar(value: Tensor, size: int, what: str) -> Tensor:
    """One number per sample in float64; a ModelError for another shape."""
    if value.shape != (size,):
        raise ModelError(
            f"the {what} returned {tuple(value.shape)} for {size} samples: ({size},) is needed"
        )
    return value.to(torch.float64)


def require_numbers(values: Tensor, particles: int, what: str, where: str) -> None:
    """Raise a ModelError naming the first of (P K,) values that is NaN or +inf."""
    bad = values.isnan() | (values == math.inf)
    if bool(bad.any()):
        p, k = divmod(int(bad.nonzero()[0]), particles)
        raise ModelError(
            f"the {what} of particle {k} of population {p} is {float(values[p * particles + k])} "
            f"{where}: it must be finite, or -inf for a particle that may not survive"
        )
