"""Weighted particles: one stochastic differential equation for every target and noise scale.

In the frame y = x/alpha, rho = sigma/alpha, lam = -log rho, with D the data prediction of the
target's score (`samplers.targets`) and any zeta >= 0 per step,

    dy = (1 + zeta^2) (D - y) dlam + zeta^2 rho^2 b grad r dlam + zeta rho sqrt(2) dW

and the log-weight of a particle grows by (dw/dlam) dlam, which does NOT depend on zeta.
Expectations under the target are sums with softmax(w). With churn (a solver whose steps have
eta > 0) a step goes below its end and adds noise to come back; noising carries the opposite
weight, so the weight is that of the base gap lam_i .. lam_{i+1} alone, whatever was denoised.

Log-weights and their sums are float64; states are at least float32. References: Skreta et al.
2503.02819, propositions 3.1 to 3.4 and algorithm 1 (zeta = 1 and the a-family); that the weight
is free of zeta, and the base gap, follow from the forward equation of p_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.samplers.ode import advance_row, rows_of
from fewstep.samplers.particle_steps import euler, exponential
from fewstep.samplers.resampling import Clocks, effective, log_mean, systematic
from fewstep.samplers.targets import Seen, Target, look
from fewstep.space.errors import ModelError, ScheduleError
from fewstep.space.particles import ParticleSchedule
from fewstep.space.program import Program

__all__ = ["Particles", "sample_particles", "start_particles"]


@dataclass(frozen=True)
class Particles:
    """P populations of K weighted particles.

    Args:
        x: states, shape (P, K, *shape).
        log_weights: shape (P, K), float64; left over since the last resampling.
        log_normalizer: shape (P,), float64: estimate of log of the integral of the target's
            prod q_i^{b_i} exp(b r) over y; exp of it is unbiased up to discretisation. NaN where
            weights were left out ("none").
        ess: effective sample size as a share of K after each step's weight, before its
            resampling, shape (N, P).
        resampled: where a population was resampled, shape (N, P), bool.
        ancestors: the starting particle each one descends from, shape (P, K), int64.
        calls: network calls per particle, all models together; cost is K times this.
    """

    x: Tensor
    log_weights: Tensor
    log_normalizer: Tensor
    ess: Tensor
    resampled: Tensor
    ancestors: Tensor
    calls: int

    @property
    def weights(self) -> Tensor:
        """Normalised weights, shape (P, K), float64."""
        return torch.softmax(self.log_weights, dim=1)

    @property
    def unique_ancestors(self) -> Tensor:
        """How many starting particles have descendants, shape (P,)."""
        return torch.tensor([len(row.unique()) for row in self.ancestors])

    def mean(self, values: Tensor) -> Tensor:
        """Weighted mean in each population.

        Args:
            values: a function of the states, shape (P, K, ...).

        Returns:
            Shape (P, ...), float64.
        """
        values = values.to(torch.float64)
        w = self.weights.reshape(*self.weights.shape, *(1,) * (values.ndim - 2))
        return (w * values).sum(1)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` equally weighted samples of each population, shape (P, count, *shape).

        Systematic, so no particle is drawn more often than its weight says, rounded up.
        """
        index = systematic(self.weights, generator, count=count)
        rows = torch.arange(len(index), device=index.device)[:, None]
        return self.x[rows, index]


def start_particles(schedule: ParticleSchedule, target: Target, z: Tensor) -> Tensor:
    """Start states from unit noise: N(0, s^2/B), s the prior's scale, B the sum of exponents.

    Args:
        schedule: the schedule to start.
        target: the target.
        z: standard normal, shape (P, K, *shape).
    """
    prior = schedule.noise.prior_scale(schedule.times[0])
    return math.sqrt(target.start_variance(_strengths(schedule, target)[0], prior)) * z


@torch.no_grad()
def sample_particles(
    schedule: ParticleSchedule,
    target: Target,
    x_T: Tensor,
    *,
    generator: torch.Generator | None = None,
    exact_start: bool = False,
) -> Particles:
    """Run the particles.

    Args:
        schedule: the schedule.
        target: what they are weighted towards.
        x_T: start states, shape (P, K, *shape), from `start_particles`.
        generator: source of all randomness, on x_T's device.
        exact_start: weigh the start states to the target at the first time, for targets that are
            not yet normal there; needs every model's log_density.

    Returns:
        The particles at the last time. With zeta = 0, no resampling and one model with b = 1 they
        are the solver's samples bit for bit, equally weighted.

    Raises:
        ScheduleError: models on another noise schedule, or a changing b (or exact start) without
            the densities it needs; before any network call.
        ModelError: an output that is not finite, or weights that are all zero or not a number;
            the step and the population are named.
    """
    if x_T.ndim < 3 or 0 in x_T.shape:
        raise ScheduleError(f"x_T has shape {tuple(x_T.shape)}: (P, K, *shape) is needed")
    run = _Run(schedule, target, x_T, generator)
    run.check(exact_start)
    run.begin(exact_start)
    for i in range(schedule.n_steps):
        seen = look(target, run.x, schedule.times[i], run.P)
        run.settle(i, seen)
        run.advance(i)
    run.settle(schedule.n_steps, None)
    return run.result()


def _strengths(schedule: ParticleSchedule, target: Target) -> list[float]:
    """The strength during every step, and the target's own at the end."""
    own = target.strength
    return [own if s.b is None else s.b for s in schedule.steps] + [own]


class _Run:
    """One run: per-particle fields are flat, (P K, ...), population by population."""

    def __init__(
        self,
        schedule: ParticleSchedule,
        target: Target,
        x_T: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        self.schedule, self.target, self.generator = schedule, target, generator
        self.P, self.K = x_T.shape[:2]
        self.x = x_T.to(torch.promote_types(x_T.dtype, torch.float32)).flatten(0, 1)
        self.x_T = self.x
        device = x_T.device
        self.w = torch.zeros(self.P, self.K, dtype=torch.float64, device=device)
        self.log_z = torch.zeros(self.P, dtype=torch.float64, device=device)
        self.ancestors = torch.arange(self.K, device=device).expand(self.P, self.K)
        self.strengths = _strengths(schedule, target)
        t = torch.tensor(schedule.times, dtype=torch.float64)
        self.alpha = schedule.noise.alpha(t).tolist()
        self.sigma = schedule.noise.sigma(t).tolist()
        self.gaps = schedule.noise.lam(t).diff().tolist()
        self.program = None if schedule.solver is None else schedule.solver.program
        self.clocks = Clocks(self.w, generator) if self._any("clocks") else None
        self.ess: list[Tensor] = []
        self.resampled: list[Tensor] = []
        self.history: list[Tensor] = []
        flat = torch.zeros(self.P * self.K, dtype=torch.float64, device=device)
        self.rate = self.potential = flat
        self.pull = self.data = self.slope = self.x

    def _any(self, rule: str) -> bool:
        return any(step.resample == rule for step in self.schedule.steps)

    def check(self, exact_start: bool) -> None:
        """Everything that can be refused before the network is asked."""
        self.target.require_noise(self.schedule.noise)
        last = len(self.strengths) - 1
        for i in range(last):
            where = f"step {i + 1}" if i + 1 < last else "the end"
            self.target.require_densities(self.strengths[i], self.strengths[i + 1], where)
        reward, solver = self.target.reward, self.schedule.solver
        if reward is not None and reward.at == "state" and solver is not None:
            if any(step.eta != 0 for step in solver.steps):
                raise ScheduleError("a reward on the state takes no solver with eta > 0: use zeta")
        if exact_start:
            for i, factor in enumerate(self.target.factors):
                if factor.log_density is None:
                    raise ScheduleError(f"exact_start needs log_density of model {i}: give it")

    def begin(self, exact_start: bool) -> None:
        """The normaliser of the start law, or the weights that make the start exact."""
        b = self.target.powers(self.strengths[0])
        prior, d = self.schedule.noise.prior_scale(self.schedule.times[0]), self.x[0].numel()
        total = sum(b)
        if not exact_start:
            if abs(total - 1) > 1e-12:  # of prod N(y; 0, s^2)^{b_i}, s = prior/alpha
                log_s2 = 2 * math.log(prior / self.alpha[0]) if self.alpha[0] > 0 else math.inf
                self.log_z += d / 2 * (1 - total) * (math.log(2 * math.pi) + log_s2)
                self.log_z -= d / 2 * math.log(total)
            return
        t = torch.full((len(self.x),), self.schedule.times[0], dtype=torch.float64).to(
            self.x.device
        )
        variance = self.target.start_variance(self.strengths[0], prior)
        square = self.x.flatten(1).to(torch.float64).square().sum(1)
        proposal = -square / (2 * variance) - d / 2 * math.log(2 * math.pi * variance)
        density = self.target.log_powers(self.x, t, b, self.alpha[0])
        self._weigh(density - proposal - d * math.log(self.alpha[0]), 0)

    def settle(self, i: int, seen: Seen | None) -> None:
        """At times[i]: finish step i-1's weight, change the target, resample, ready step i."""
        b, powers = self.strengths[i], self.target.powers(self.strengths[i])
        increment = self._jump(i)
        rate = slope = None
        if seen is not None:
            rate, slope = self._rate(seen, b, powers)
        if i > 0:
            increment = increment + self._step_weight(i - 1, seen)
        increment = increment + self._new_potential(b, powers, seen)
        if seen is not None and rate is not None:
            self.pull, self.data, self.rate = seen.pull(powers), seen.data(powers), rate
            self.slope = self.x if slope is None else slope
        if i == 0:
            self._weigh(increment, 0)
        else:
            self._resample(i - 1, increment)

    def _rate(
        self, seen: Seen, b: float, powers: tuple[float, ...]
    ) -> tuple[Tensor, Tensor | None]:
        rate, reward = seen.rate(powers), self.target.reward
        if reward is None or reward.at == "data" or b == 0:
            return rate, None
        _, slope = reward.gradient(seen.y)
        along = (slope * (seen.data(powers) - seen.y)).flatten(1).to(torch.float64).sum(1)
        return rate + b * along, slope

    def _step_weight(self, i: int, seen: Seen | None) -> Tensor:
        """The weight of step i over its base gap."""
        rule, h = self.schedule.steps[i].weight, self.gaps[i]
        if rule == "none":
            return torch.zeros_like(self.rate)
        if rule == "trapezoid" and seen is not None and math.isfinite(h):
            b = self.strengths[i]
            end, _ = self._rate(seen, b, self.target.powers(b))
            return self.rate.add(end).mul(h / 2)
        return self.rate.mul(-math.expm1(-2 * h) / 2)

    def _jump(self, i: int) -> Tensor:
        """log(p_new/p_old) where the strength changes at times[i]."""
        new, reward = self.strengths[i], self.target.reward
        on_state = reward is not None and reward.at == "state"
        old = self.strengths[i - 1] if i > 0 else (0.0 if on_state else new)
        total = torch.zeros_like(self.rate)
        if old == new:
            return total
        pairs = zip(self.target.powers(new), self.target.powers(old), strict=True)
        change = [a - b for a, b in pairs]
        t = torch.full((len(self.x),), self.schedule.times[i], dtype=torch.float64)
        total = total + self.target.log_powers(self.x, t.to(self.x.device), change, self.alpha[i])
        if reward is not None and on_state:
            total = total + (new - old) * reward(self.x / self.alpha[i])
        return total

    def _new_potential(self, b: float, powers: tuple[float, ...], seen: Seen | None) -> Tensor:
        """Change of the potential of a reward on the data prediction."""
        reward = self.target.reward
        if reward is None or reward.at == "state":
            return torch.zeros_like(self.rate)
        clean = self.x / self.alpha[-1] if seen is None else seen.data(powers)
        old, self.potential = self.potential, b * reward(clean)
        return self.potential - old

    def _weigh(self, increment: Tensor, i: int) -> None:
        self.w = self.w + increment.reshape(self.P, self.K)
        top = self.w.amax(1)  # NaN where any weight is NaN
        if not bool(torch.isfinite(top).all()):
            p = int((~torch.isfinite(top)).nonzero()[0])
            what = "all zero" if float(top[p]) == -math.inf else "not finite"
            raise ModelError(
                f"the weights of population {p} are {what} at step {i}: use more or smaller "
                "steps, a larger zeta, or check the reward and the densities"
            )

    def _resample(self, i: int, increment: Tensor) -> None:
        """Add step i's weight, then resample as it says; every per-particle field moves along."""
        step = self.schedule.steps[i]
        index = torch.arange(self.K, device=self.w.device).expand(self.P, self.K)
        if step.resample == "clocks" and self.clocks is not None:
            self._weigh(increment, i)
            self.log_z = self.log_z + self.w.mean(1)
            index, due = self.clocks.ring(self.w)
            ess = torch.full_like(self.log_z, 1.0)
            self.w = torch.zeros_like(self.w)
        else:
            self._weigh(increment, i)
            ess = effective(self.w)
            due = torch.zeros(self.P, dtype=torch.bool, device=self.w.device)
            if step.resample == "always":
                due = ~due
            elif step.resample == "ess":
                due = ess < step.ess
            if bool(due.any()):
                drawn = systematic(torch.softmax(self.w, dim=1), self.generator)
                index = torch.where(due[:, None], drawn, index)
                self.log_z = torch.where(due, self.log_z + log_mean(self.w), self.log_z)
                self.w = torch.where(due[:, None], torch.zeros_like(self.w), self.w)
        self.ess.append(ess)
        self.resampled.append(due)
        if bool(due.any()):
            self._take(index)

    def _take(self, index: Tensor) -> None:
        self.ancestors = self.ancestors.gather(1, index)
        flat = (index + self.K * torch.arange(self.P, device=index.device)[:, None]).flatten()
        for name in ("x", "x_T", "rate", "potential", "pull", "data", "slope"):
            setattr(self, name, getattr(self, name)[flat])
        self.history = [D[flat] for D in self.history]

    def advance(self, i: int) -> None:
        """Move the states from times[i] to times[i+1]."""
        if self.program is not None:
            self._advance_program(i, self.program)
            return
        zeta, total = self.schedule.steps[i].zeta, sum(self.target.powers(self.strengths[i]))
        alpha, alpha_next = self.alpha[i], self.alpha[i + 1]
        move = exponential if self.schedule.integrator == "exponential" else euler
        c = move(
            zeta, total, (alpha, alpha_next), (self.sigma[i], self.sigma[i + 1]), self.gaps[i]
        )
        x = c.x * self.x
        x = x + (c.D * self.pull if move is exponential else c.D * self.data)
        reward, b = self.target.reward, self.strengths[i]
        if reward is not None and reward.at == "state" and b != 0 and zeta != 0:
            x = x + b * c.slope * self.slope
        self.x = x + c.z * self._noise() if c.z != 0 else x

    def _advance_program(self, i: int, p: Program) -> None:
        """Row i of the solver's program (`samplers.ode`), on the target's data prediction."""
        self.history.append(self.data)
        fresh = self._noise() if p.g[i] != 0 else None
        self.x = advance_row(rows_of(p), i, self.x, self.x_T, None, self.history, fresh)

    def _noise(self) -> Tensor:
        x = self.x
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)

    def result(self) -> Particles:
        """What has been reached."""
        if not bool(torch.isfinite(self.x).all()):
            raise ModelError("the samples are not finite: use more steps or a smaller zeta")
        weighs = all(s.weight != "none" for s in self.schedule.steps)
        log_z = self.log_z + log_mean(self.w)
        return Particles(
            x=self.x.reshape(self.P, self.K, *self.x.shape[1:]),
            log_weights=self.w,
            log_normalizer=log_z if weighs else torch.full_like(log_z, math.nan),
            ess=torch.stack(self.ess),
            resampled=torch.stack(self.resampled),
            ancestors=self.ancestors,
            calls=self.schedule.n_steps * len(self.target.factors),
        )
