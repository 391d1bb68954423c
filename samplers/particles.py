"""Weighted particles: one stochastic differential equation for every target and noise scale.

In the frame y = x/alpha, rho = sigma/alpha, lam = -log rho, with D the data prediction of the
target's score (`samplers.targets`) and any zeta >= 0 per step,

    dy = (1 + zeta^2) (D - y) dlam + zeta^2 rho^2 b grad r dlam + zeta rho sqrt(2) dW

and the log-weight of a particle grows by (dw/dlam) dlam, which does NOT depend on zeta.
A reward weighed by its path needs no gradient: with z the noise of a step x -> x' of deviation
s, and delta what the guide u moved it by (b u in place of b grad r above), the weight is

    b' r' - b r - <z, delta>/s - |delta|^2/(2 s^2)

The last two terms are the log-likelihood ratio of the step without and with the guide: exact for
steps of any length, whatever u is. What is drawn is then the unguided sampler's own law times
exp(b r), with no error of a quadrature.

Expectations under the target are sums with softmax(w). With churn (a solver whose steps have
eta > 0) a step goes below its end and adds noise to come back; noising carries the opposite
weight, so the weight is that of the base gap lam_i .. lam_{i+1} alone, whatever was denoised.

Log-weights and their sums are float64; states are at least float32. References: Skreta et al.
2503.02819, propositions 3.1 to 3.4 and algorithm 1 (zeta = 1 and the a-family); that the weight
is free of zeta, and the base gap, follow from the forward equation of p_t. Wang et al. 2605.17850
(URGE) for weights of paths; the discrete form is the ratio of two Gaussian steps.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.samplers.ode import advance_row, rows_of
from fewstep.samplers.particle_steps import Coefficients, euler, exponential
from fewstep.samplers.particle_weights import ParticleCollapse, Weights
from fewstep.samplers.resampling import log_mean, systematic
from fewstep.samplers.rewards import require_numbers
from fewstep.samplers.targets import Seen, Target, look
from fewstep.space.errors import ModelError, ScheduleError
from fewstep.space.particles import ParticleSchedule, ramp_share
from fewstep.space.program import Program

__all__ = ["ParticleCollapse", "Particles", "sample_particles", "start_particles"]


@dataclass(frozen=True)
class Particles:
    """P populations of K weighted particles.

    Args:
        x: states, shape (P, K, *shape).
        log_weights: shape (P, K), float64; left over since the last resampling, -inf for dead
            particles.
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
    return math.sqrt(target.start_variance(target.strengths(schedule)[0], prior)) * z


@torch.no_grad()
def sample_particles(
    schedule: ParticleSchedule,
    target: Target,
    x_T: Tensor,
    *,
    generator: torch.Generator | None = None,
    exact_start: bool = False,
    warn_ess: float = 0.01,
) -> Particles:
    """Run the particles.

    Args:
        schedule: the schedule.
        target: what they are weighted towards.
        x_T: start states, shape (P, K, *shape), from `start_particles`.
        generator: source of all randomness, on x_T's device.
        exact_start: weigh the start states to the target at the first time, for targets that are
            not yet normal there; needs every model's log_density.
        warn_ess: warn with `ParticleCollapse`, once, if an effective sample size fell below this
            share of K or below two particles, or a population descends from one particle; 0
            never warns.

    Returns:
        The particles at the last time. With zeta = 0, no resampling and one model with b = 1 they
        are the solver's samples bit for bit, equally weighted.

    Raises:
        ScheduleError: models on another noise schedule, or a changing b (or exact start) without
            the densities it needs; before any network call.
        ModelError: an output that is not finite, a reward or a weight that is NaN or +inf (the
            particle and the call are named), or a population whose particles are all dead when
            it is resampled or returned.
    """
    if x_T.ndim < 3 or 0 in x_T.shape:
        raise ScheduleError(f"x_T has shape {tuple(x_T.shape)}: (P, K, *shape) is needed")
    run = _ParticleRun(schedule, target, x_T, generator)
    run.check(exact_start)
    run.begin(exact_start)
    for i in range(schedule.n_steps):
        seen = look(target, run.x, schedule.times[i], run.P)
        run.settle(i, seen)
        run.advance(i)
    run.settle(schedule.n_steps, None)
    found = run.result()
    problem = run.weights.collapse(warn_ess, run.remedy)
    if problem is not None:
        warnings.warn(problem, ParticleCollapse, stacklevel=3)
    return found


class _ParticleRun:
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
        rules = [step.resample for step in schedule.steps]
        self.weights = Weights((self.P, self.K), generator, device, clocks="clocks" in rules)
        self.strengths = target.strengths(schedule)
        reward = target.reward
        self.integrates = reward is not None and (
            reward.integrable and schedule.reward_weight == "gradient"
        )
        t = torch.tensor(schedule.times, dtype=torch.float64)
        self.alpha = schedule.noise.alpha(t).tolist()
        self.sigma = schedule.noise.sigma(t).tolist()
        self.gaps = schedule.noise.lam(t).diff().tolist()
        self.program = None if schedule.solver is None else schedule.solver.program
        self.history: list[Tensor] = []
        flat = torch.zeros(self.P * self.K, dtype=torch.float64, device=device)
        self.rate = self.ratio = flat
        self.pull = self.data = self.x
        self.slope: Tensor | None = None

    def check(self, exact_start: bool) -> None:
        """Everything that can be refused before the network is asked."""
        self.target.require_noise(self.schedule.noise)
        last = len(self.strengths) - 1
        for i in range(last):
            where = f"step {i + 1}" if i + 1 < last else "the end"
            self.target.require_densities(self.strengths[i], self.strengths[i + 1], where)
        solver = self.schedule.solver
        if self.integrates and solver is not None and any(s.eta != 0 for s in solver.steps):
            raise ScheduleError(
                "a reward weighed by its gradient takes no solver with eta > 0: use zeta, or "
                "reward_weight 'path'"
            )
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
                self.weights.log_z += d / 2 * (1 - total) * (math.log(2 * math.pi) + log_s2)
                self.weights.log_z -= d / 2 * math.log(total)
            return
        t = torch.full((len(self.x),), self.schedule.times[0], dtype=torch.float64).to(
            self.x.device
        )
        variance = self.target.start_variance(self.strengths[0], prior)
        square = self.x.flatten(1).to(torch.float64).square().sum(1)
        proposal = -square / (2 * variance) - d / 2 * math.log(2 * math.pi * variance)
        density = self.target.log_powers(self.x, t, b, self.alpha[0])
        increment = density - proposal - d * math.log(self.alpha[0])
        self.weights.add(increment, "at the start")

    def _call(self, i: int) -> str:
        """Where settling at times[i] happens, for messages."""
        if i == self.schedule.n_steps:
            return "after the last call"
        return f"at call {i} (t = {self.schedule.times[i]:.6g})"

    def settle(self, i: int, seen: Seen | None) -> None:
        """At times[i]: finish step i-1's weight, change the target, resample, ready step i."""
        b, powers = self.strengths[i], self.target.powers(self.strengths[i])
        increment = self._jump(i)
        rate = None
        if seen is not None:
            rate, self.slope = self._rate(i, seen, b, powers)
        if i > 0:
            increment = increment + self._step_weight(i - 1, seen)
        if self.target.reward is not None and not self.integrates:
            increment = increment + self._path(i, seen, b, powers)
        if seen is not None and rate is not None:
            self.pull, self.data, self.rate = seen.pull(powers), seen.data(powers), rate
        self.weights.add(increment, self._call(i))
        if i > 0:
            index = self.weights.settle(self.schedule.steps[i - 1], self._call(i))
            if index is not None:
                self._take(index)

    def _rate(
        self, i: int, seen: Seen, b: float, powers: tuple[float, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """dw/dlam at times[i], and the gradient of a reward that is weighed by it."""
        rate, reward = seen.rate(powers), self.target.reward
        if reward is None or not self.integrates or b == 0:
            return rate, None
        r, slope = reward.pull(seen.y)
        assert slope is not None
        self._require_finite(r, i)
        along = (slope * (seen.data(powers) - seen.y)).flatten(1).to(torch.float64).sum(1)
        return rate + b * along, slope

    def _require_finite(self, r: Tensor, i: int) -> None:
        require_numbers(r, self.K, "reward", self._call(i))
        if bool((r == -math.inf).any()):
            p, k = divmod(int((r == -math.inf).nonzero()[0]), self.K)
            raise ModelError(
                f"the reward of particle {k} of population {p} is -inf {self._call(i)}, which "
                "has no gradient: set the schedule's reward_weight to 'path', or guide=False"
            )

    def _path(self, i: int, seen: Seen | None, b: float, powers: tuple[float, ...]) -> Tensor:
        """Increment of a reward weighed by its path, and the guide of step i.

        That is b r at times[i] for what it was before, and the likelihood ratio of step i-1.
        """
        reward, ratio = self.target.reward, self.ratio
        assert reward is not None
        self.slope, self.ratio = None, torch.zeros_like(ratio)
        if b == 0:
            return self.weights.change(torch.zeros_like(ratio)) + ratio
        points = self.x / self.alpha[i] if seen is None or reward.at == "state" else None
        if points is None:
            assert seen is not None
            points = seen.data(powers)
        guided = seen is not None and self.program is None and self.schedule.steps[i].zeta != 0
        r, slope = reward.pull(points) if guided else (reward(points), None)
        require_numbers(r, self.K, "reward", self._call(i))
        if slope is not None:
            dead = (r == -math.inf).reshape(-1, *(1,) * (slope.ndim - 1))
            slope = torch.where(dead & ~torch.isfinite(slope), torch.zeros_like(slope), slope)
            if not bool(torch.isfinite(slope).all()):
                raise ModelError(
                    f"the guide of the reward is not finite {self._call(i)}: give another guide, "
                    "or guide=False"
                )
            if reward.at == "data":
                slope = slope * ramp_share(self.schedule.noise, [self.schedule.times[i]], 1.0)[0]
            self.slope = slope
        potential = b * r if seen is None else (b * r).clamp(min=reward.floor)
        return self.weights.change(potential) + ratio

    def _step_weight(self, i: int, seen: Seen | None) -> Tensor:
        """The weight of step i over its base gap."""
        rule, h = self.schedule.steps[i].weight, self.gaps[i]
        if rule == "none":
            return torch.zeros_like(self.rate)
        if rule == "trapezoid" and seen is not None and math.isfinite(h):
            b = self.strengths[i]
            end, _ = self._rate(i + 1, seen, b, self.target.powers(b))
            return self.rate.add(end).mul(h / 2)
        return self.rate.mul(-math.expm1(-2 * h) / 2)

    def _jump(self, i: int) -> Tensor:
        """log(p_new/p_old) where the strength changes at times[i]."""
        new, reward = self.strengths[i], self.target.reward
        old = self.strengths[i - 1] if i > 0 else (0.0 if self.integrates else new)
        total = torch.zeros_like(self.rate)
        if old == new:
            return total
        pairs = zip(self.target.powers(new), self.target.powers(old), strict=True)
        change = [a - b for a, b in pairs]
        t = torch.full((len(self.x),), self.schedule.times[i], dtype=torch.float64)
        total = total + self.target.log_powers(self.x, t.to(self.x.device), change, self.alpha[i])
        if reward is not None and self.integrates:
            r = reward(self.x / self.alpha[i])
            self._require_finite(r, i)
            total = total + (new - old) * r
        return total

    def _take(self, index: Tensor) -> None:
        """Gather everything that belongs to a particle and is not in `weights`."""
        flat = (index + self.K * torch.arange(self.P, device=index.device)[:, None]).flatten()
        for name in ("x", "x_T", "rate", "pull", "data"):
            setattr(self, name, getattr(self, name)[flat])
        self.slope = None if self.slope is None else self.slope[flat]
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
        guided = self.slope is not None and zeta != 0
        if self.slope is not None and zeta != 0:
            x = x + self.strengths[i] * c.slope * self.slope
        if c.z == 0:
            self.x = x
            return
        z = self._noise()
        self.x = x + c.z * z
        if guided and not self.integrates:
            self._likelihood_ratio(i, c, z)

    def _likelihood_ratio(self, i: int, c: Coefficients, z: Tensor) -> None:
        """log of the step's density without the guide over that with it, at where it went."""
        assert self.slope is not None
        shift = (self.strengths[i] * c.slope / c.z * self.slope).flatten(1).to(torch.float64)
        drawn = z.flatten(1).to(torch.float64)
        self.ratio = -(shift * drawn).sum(1) - shift.square().sum(1) / 2

    def _advance_program(self, i: int, p: Program) -> None:
        """Row i of the solver's program (`samplers.ode`), on the target's data prediction."""
        self.history.append(self.data)
        fresh = self._noise() if p.g[i] != 0 else None
        self.x = advance_row(rows_of(p), i, self.x, self.x_T, None, self.history, fresh)

    def _noise(self) -> Tensor:
        x = self.x
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)

    def remedy(self, step: int) -> str:
        """What to change where the weights collapsed."""
        reward, b = self.target.reward, self.strengths
        if reward is None:
            return "use more particles, more steps or a larger zeta, or a target nearer the models"
        early = step < self.schedule.n_steps - 1 and b[0] >= 0.9 * b[-1] > 0
        if early and reward.at == "state":
            return (
                "the reward is strong while the states are noise: let it rise with "
                "reward(ramp=the data's standard deviation) or the steps' b"
            )
        return (
            "weaken the reward, let it rise more slowly (ramp, or the steps' b), guide the "
            "particles towards it (guide, zeta > 0), or use more particles"
        )

    def result(self) -> Particles:
        """What has been reached."""
        if not bool(torch.isfinite(self.x).all()):
            raise ModelError("the samples are not finite: use more steps or a smaller zeta")
        weighs = all(s.weight != "none" for s in self.schedule.steps)
        log_weights = self.weights.finish("at the end")
        log_z = self.weights.log_z + log_mean(log_weights)
        return Particles(
            x=self.x.reshape(self.P, self.K, *self.x.shape[1:]),
            log_weights=log_weights,
            log_normalizer=log_z if weighs else torch.full_like(log_z, math.nan),
            ess=torch.stack(self.weights.ess),
            resampled=torch.stack(self.weights.resampled),
            ancestors=self.weights.ancestors,
            calls=self.schedule.n_steps * len(self.target.factors),
        )
