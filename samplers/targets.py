"""Targets made of several models: annealed, product, averaged, guided, rewarded.

At every time the target is  p_t(x) proportional to  prod_i q_i(x)^{b_i} exp(b r(x)),  with q_i the
models' marginals at that time. With eps_i = (x - alpha D_i)/sigma (eps_i = -sigma score_i), lam
the half log-SNR, y = x/alpha, rho = sigma/alpha, B = sum b_i, and particles that follow the drift
of `samplers.particles` with any noise scale, the log-weight grows by

    dw/dlam = |sum b_i eps_i|^2 - sum b_i |eps_i|^2
            = (B-1) sum b_i |eps_i|^2 - sum_{i<j} b_i b_j |eps_i - eps_j|^2

up to a number common to all particles (the divergence of the drift, zero in the frame of y). The
second form is used: it is exactly 0 for one model with b = 1 and for equal models with B = 1.
A reward (`samplers.rewards`) multiplies the target by exp(b r) and is weighed in one of two ways,
with D = (1-B) y + sum b_i D_i the data prediction of the combined score:

* by its gradient, on the state only: b <grad r(y), D - y> is added to dw/dlam;
* by its path: w += b r - (b r of the step before) + log(q(x'|x)/q_u(x'|x)), the last term
  being the likelihood ratio of the step without and with the guide (`samplers.particles`).

A changing strength is a jump: w += log(p_new/p_old).

References: Skreta et al. 2503.02819, propositions 3.1 to 3.4 (zeta = 1); Singhal et al. 2501.06848
for potentials of the data prediction; Wang et al. 2605.17850 (URGE) for weights of paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, Denoiser, bcast
from fewstep.samplers.rewards import Guide, Reward, scalar
from fewstep.space.errors import ModelError, ScheduleError
from fewstep.space.noise import NoiseSchedule, noise_to_dict
from fewstep.space.particles import ParticleSchedule, ramp_share

__all__ = ["Factor", "Target", "anneal", "average", "guidance", "product", "reward"]

Density = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Factor:
    """One model of a target.

    Args:
        denoiser: the model; all factors share one noise schedule.
        cond: conditioning tensors with leading axis P (one row per population) or 1.
        guidance: the model's own guidance scale; with a scale other than 1 the model is no longer
            the score of a density, and the weights are those of what it claims to be.
        log_density: (x (B, *shape), t (B,)) -> (B,), log q_t(x) of the state x; needed only where
            the strength changes along a schedule, and for an exact start.
    """

    denoiser: Denoiser
    cond: Cond | None = None
    guidance: float | None = None
    log_density: Density | None = None


@dataclass(frozen=True)
class Target:
    """What particles are weighted towards; made by `anneal`, `product`, `average`, ...

    Args:
        factors: the models.
        strength: the number a schedule's per-step b replaces.
        exponents: strength -> (b_1, ..., b_m).
        reward: a reward, whose factor b is then the strength.
    """

    factors: tuple[Factor, ...]
    strength: float
    exponents: Callable[[float], tuple[float, ...]] = field(repr=False)
    reward: Reward | None = None

    def __post_init__(self) -> None:
        if not self.factors:
            raise ScheduleError("a target needs at least one model")
        self.powers(self.strength)

    @property
    def noise(self) -> NoiseSchedule:
        """The noise schedule of the models."""
        return self.factors[0].denoiser.noise

    def require_noise(self, noise: NoiseSchedule) -> None:
        """Raise a ScheduleError naming the first model whose noise schedule is not `noise`."""
        for i, factor in enumerate(self.factors):
            if factor.denoiser.noise != noise:
                found, wanted = noise_to_dict(factor.denoiser.noise), noise_to_dict(noise)
                raise ScheduleError(
                    f"model {i} has noise {str(found)[:120]} but the schedule has "
                    f"{str(wanted)[:120]}: all models of a target share the schedule's noise"
                )

    def powers(self, strength: float) -> tuple[float, ...]:
        """The exponents b_i at a strength.

        Raises:
            ScheduleError: a number that is not finite, or exponents that do not sum to > 0.
        """
        b = self.exponents(strength)
        if not all(math.isfinite(x) for x in (*b, strength)):
            raise ScheduleError(f"strength {strength} gives exponents {b}: they must be finite")
        if not sum(b) > 0:
            raise ScheduleError(
                f"exponents {b} sum to {sum(b):g}: the target has no start, use a sum above 0"
            )
        return b

    @property
    def ramp(self) -> float:
        """Scale of the rise of the strength where a schedule does not set it; inf is none."""
        return math.inf if self.reward is None else self.reward.ramp

    def strengths(self, schedule: ParticleSchedule) -> list[float]:
        """The strength during each step of a schedule, and the target's own at the end.

        Raises:
            ScheduleError: the schedule sets a ramp and there is no reward.
        """
        if schedule.ramp is not None and self.reward is None:
            raise ScheduleError(f"ramp {schedule.ramp:g} is for a reward, and the target has none")
        scale = self.ramp if schedule.ramp is None else schedule.ramp
        shares = ramp_share(schedule.noise, schedule.times[:-1], scale)
        steps = zip(schedule.steps, shares, strict=True)
        own = self.strength
        return [own * share if s.b is None else s.b for s, share in steps] + [own]

    def start_variance(self, strength: float, prior: float) -> float:
        """Variance of the start state, prior^2 / B: each model is N(0, prior^2) there."""
        return prior**2 / sum(self.powers(strength))

    def require_densities(self, old: float, new: float, where: str) -> None:
        """Raise a ScheduleError if a change of strength needs a density that nobody gave."""
        for i, (a, b) in enumerate(zip(self.powers(old), self.powers(new), strict=True)):
            if a != b and self.factors[i].log_density is None:
                raise ScheduleError(
                    f"{where}: b changes from {old:g} to {new:g}, which needs log_density of "
                    f"model {i}: give it in Factor, or keep b the same in all steps"
                )

    def log_powers(self, x: Tensor, t: Tensor, change: Sequence[float], alpha: float) -> Tensor:
        """sum_i change_i log q_i in the frame of y = x/alpha, shape (B,), float64."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for factor, c in zip(self.factors, change, strict=True):
            if c != 0 and factor.log_density is not None:
                value = scalar(factor.log_density(x, t), len(x), "log_density")
                total = total + c * (value + x[0].numel() * math.log(alpha))
        return total


@dataclass(frozen=True)
class Seen:
    """What the models said at one time, per particle.

    Args:
        y: x/alpha, shape (B, *shape).
        outputs: the models' data predictions.
        squares: |eps_i|^2, each (B,), float64.
        gaps: |eps_i - eps_j|^2 for i < j, each (B,), float64.
    """

    y: Tensor
    outputs: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]
    gaps: dict[tuple[int, int], Tensor]

    def pull(self, b: Sequence[float]) -> Tensor:
        """sum b_i D_i, shape (B, *shape)."""
        total = b[0] * self.outputs[0]
        for power, D in zip(b[1:], self.outputs[1:], strict=True):
            total = total + power * D
        return total

    def data(self, b: Sequence[float]) -> Tensor:
        """D = (1-B) y + sum b_i D_i, the data prediction of the combined score."""
        excess = 1 - sum(b)
        total = self.pull(b)
        return total if abs(excess) < 1e-12 else total + excess * self.y

    def rate(self, b: Sequence[float]) -> Tensor:
        """dw/dlam of the models (module docstring), shape (B,), float64."""
        excess = sum(b) - 1
        total = torch.zeros_like(self.squares[0])
        if abs(excess) >= 1e-12:
            for power, square in zip(b, self.squares, strict=True):
                total = total + excess * power * square
        for (i, j), gap in self.gaps.items():
            total = total - b[i] * b[j] * gap
        return total


def look(target: Target, x: Tensor, t: float, populations: int) -> Seen:
    """Ask every model once.

    Args:
        target: the target.
        x: states, shape (P K, *shape), population by population.
        t: the time.
        populations: P.

    Raises:
        ModelError: a model returns a wrong shape or something not finite.
    """
    times = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
    alpha, sigma = bcast(target.noise.alpha(times), x), bcast(target.noise.sigma(times), x)
    outputs, eps = [], []
    for i, factor in enumerate(target.factors):
        cond = _spread(factor.cond, populations, len(x) // populations, i)
        D = factor.denoiser(x, times, cond=cond, guidance=factor.guidance)
        if D.shape != x.shape:
            raise ModelError(
                f"model {i} returned {tuple(D.shape)} for a state of shape {tuple(x.shape)}"
            )
        if not bool(torch.isfinite(D).all()):
            raise ModelError(
                f"the data prediction of model {i} at t = {t:.6g} is not finite: use more or "
                "smaller steps, a smaller zeta, or check the model's noise schedule"
            )
        outputs.append(D.to(x.dtype))
        eps.append(((x - alpha * outputs[-1]) / sigma).flatten(1).to(torch.float64))
    pairs = [(i, j) for j in range(len(eps)) for i in range(j)]
    return Seen(
        y=x / alpha,
        outputs=tuple(outputs),
        squares=tuple((e**2).sum(1) for e in eps),
        gaps={(i, j): ((eps[i] - eps[j]) ** 2).sum(1) for i, j in pairs},
    )


def _spread(cond: Cond | None, populations: int, count: int, i: int) -> dict[str, Tensor] | None:
    if not cond:
        return None
    spread = {}
    for name, value in cond.items():
        if len(value) not in (1, populations):
            raise ModelError(
                f"cond {name!r} of model {i} has {len(value)} rows: give 1 or one for each of "
                f"{populations} populations"
            )
        rows = value.expand(populations, *value.shape[1:]) if len(value) == 1 else value
        spread[name] = rows.repeat_interleave(count, dim=0)
    return spread


Model = Factor | Denoiser


def _factor(model: Model) -> Factor:
    return model if isinstance(model, Factor) else Factor(model)


def anneal(model: Model, b: float) -> Target:
    """q^b: sharper for b > 1 (temperature 1/b), flatter for b < 1.

    Args:
        model: a Denoiser or a Factor.
        b: exponent, > 0.
    """
    return Target((_factor(model),), float(b), lambda s: (s,))


def product(*models: Model, b: float = 1.0) -> Target:
    """(q_1 q_2 ...)^b: samples that every model finds likely.

    Args:
        models: two or more Denoisers or Factors.
        b: exponent, > 0.
    """
    m = len(models)
    return Target(tuple(map(_factor, models)), float(b), lambda s: (s,) * m)


def average(*models: Model, weights: Sequence[float] | None = None, b: float = 1.0) -> Target:
    """(q_1^{a_1} q_2^{a_2} ...)^b with a_i >= 0 that sum to 1: the geometric average.

    Args:
        models: Denoisers or Factors.
        weights: a_i, divided by their sum; equal by default.
        b: exponent, > 0.
    """
    a = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    if len(a) != len(models) or any(w < 0 for w in a) or not sum(a) > 0:
        raise ScheduleError(f"weights {a} for {len(models)} models: give one >= 0 for each")
    shares = tuple(w / sum(a) for w in a)
    return Target(tuple(map(_factor, models)), float(b), lambda s: tuple(s * w for w in shares))


def guidance(base: Model, guided: Model, w: float) -> Target:
    """base^{1-w} guided^w, what classifier-free guidance with scale w aims at.

    Args:
        base: the unconditional (or weaker) model.
        guided: the conditional (or stronger) model; w = 1 is this model.
        w: guidance scale.
    """
    return Target((_factor(base), _factor(guided)), float(w), lambda s: (1 - s, s))


def reward(
    target: Target | Model,
    r: Callable[[Tensor], Tensor],
    b: float = 1.0,
    *,
    at: Literal["state", "data"] = "state",
    guide: bool | Guide | None = None,
    ramp: float | None = None,
    floor: float = -math.inf,
) -> Target:
    """target * exp(b r).

    Args:
        target: a target without a reward, or one model.
        r: samples (B, *shape) in data units -> (B,), finite, or -inf for what must not be drawn.
        b: factor of the reward. A schedule's per-step b replaces it; no density is needed.
        at: see `Reward`.
        guide: see `Reward`; by default the gradient guides a reward on the state and nothing a
            reward on the data prediction. False makes a black box of r.
        ramp: see `Reward`; by default 1 for a reward on the state, whose noise it would mistake
            for data, and inf (b is held) for one on the data prediction. Give the data's
            standard deviation if it is far from 1.
        floor: see `Reward`.
    """
    base = (
        target if isinstance(target, Target) else Target((_factor(target),), 1.0, lambda s: (s,))
    )
    if base.reward is not None:
        raise ScheduleError("the target has a reward already: add the two rewards up instead")
    fixed = base.powers(base.strength)
    on_state = at == "state"
    made = Reward(
        value=r,
        at=at,
        guide=on_state if guide is None else guide,
        ramp=(1.0 if on_state else math.inf) if ramp is None else ramp,
        floor=floor,
    )
    return replace(base, strength=float(b), exponents=lambda _: fixed, reward=made)
