"""Weighted particles for masked models: sequences tilted by a reward, with discrete weights.

P is the law of a masked schedule and x a complete sequence. K sequences are unmasked side by side
and weighed towards

    P(x)^power exp(r(x)) / Z

A call that draws the token v from the law nu where the model predicts mu adds
power log mu_v - log nu_v, so temperatures are free (Zheng et al. 2409.02908 for the law; the
decoding order cancels). A partial sequence weighs what its completions are worth: with
x_1 .. x_m drawn from the product of the current predictions, its potential is

    log mean_j exp(b r(x_j)),

which replaces the one before; the last is r(x) itself. The potentials in between decide who is
resampled and never what is drawn, as a black box and however crude: the weights telescope.

References: Singhal et al. 2501.06848 for potentials of predicted samples; weights and resampling
as in `samplers.particles`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.samplers.categorical import draw, uniforms
from fewstep.samplers.masked import MaskedProgress, sample_masked
from fewstep.samplers.particle_weights import ParticleCollapse, Weights
from fewstep.samplers.particles import Particles
from fewstep.samplers.resampling import log_mean
from fewstep.samplers.rewards import require_numbers, scalar
from fewstep.samplers.token_denoiser import TokenDenoiser
from fewstep.space.errors import ScheduleError
from fewstep.space.masked import CallSpec, MaskedSchedule
from fewstep.space.particles import ParticleStep

__all__ = ["TiltedLaw", "sample_tilted"]


@dataclass(frozen=True)
class TiltedLaw:
    """The target P^power exp(r), P the law of a masked schedule.

    Args:
        reward: complete sequences (B, L), int64 -> r (B,), finite or -inf.
        power: > 0; other than 1 it needs counts of one and uniform positions, whose law is the
            model's.
        completions: m >= 1, completions drawn to value a partial sequence.
        floor: the least a completion counts for, as a value of b r; exp(floor) is what a sequence
            weighs whose completions all break a hard constraint (r = -inf). -inf kills it.
    """

    reward: Callable[[Tensor], Tensor]
    power: float = 1.0
    completions: int = 1
    floor: float = -math.inf

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise ScheduleError(f"power {self.power} must be a positive number")
        if self.completions < 1:
            raise ScheduleError(f"completions {self.completions} must be 1 or more")
        if not self.floor < math.inf:
            raise ScheduleError(f"floor {self.floor} must be a number or -inf")

    def value(self, sequences: Tensor, particles: int, where: str) -> Tensor:
        """r of complete sequences, shape (B,), float64; a ModelError where it is NaN or +inf."""
        r = scalar(self.reward(sequences), len(sequences), "reward")
        require_numbers(r, particles, "reward", where)
        return r


@torch.no_grad()
def sample_tilted(
    schedule: MaskedSchedule,
    denoiser: TokenDenoiser,
    target: TiltedLaw,
    tokens: Tensor,
    *,
    steps: ParticleStep | Sequence[ParticleStep] | None = None,
    generator: torch.Generator | None = None,
    warn_ess: float = 0.01,
) -> Particles:
    """Unmask populations of weighted sequences.

    Args:
        schedule: fixed counts that sum to the masks of every sequence, parallel, temperatures
            above 0, positions by any rule but "drawn"; nothing else.
        denoiser: the model.
        target: what the sequences are weighed towards.
        tokens: int64 ids (P, K, L), `denoiser.mask` where a token is wanted.
        steps: how weights are used, for all calls or one for each: `resample` and `ess` after the
            call, and `b`, the reward's strength with the prediction of the call (1 if None; the
            end has 1). zeta and weight mean nothing here. By default the populations are
            resampled where the effective sample size is below one half.
        generator: source of all randomness, on the tokens' device.
        warn_ess: see `sample_particles`.

    Returns:
        Particles whose `x` are int64 ids (P, K, L) without masks; exp(log_normalizer) is an
        unbiased estimate of the sum of P^power exp(r). With a reward of 0, power 1 and
        temperature 1 the sequences are those of `sample_masked`, equally weighted.

    Raises:
        ScheduleError: a schedule or steps that cannot be weighed; says which call.
        ModelError: a reward that is NaN or +inf, naming the particle and the call, or a population
            whose sequences are all dead when it is resampled or returned.
    """
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ScheduleError(f"tokens have shape {tuple(tokens.shape)}: (P, K, L) is needed")
    run = _MaskedRun(schedule, denoiser, target, tokens, _per_call(steps, schedule.nfe), generator)
    for k in range(schedule.nfe):
        run.call(k)
    found = run.result()
    problem = run.weights.collapse(warn_ess, lambda _: _REMEDY)
    if problem is not None:
        warnings.warn(problem, ParticleCollapse, stacklevel=3)
    return found


_REMEDY = (
    "weaken the reward, raise b from call to call, give it a floor if it is -inf for many, or use "
    "more completions or particles"
)


def _per_call(
    steps: ParticleStep | Sequence[ParticleStep] | None, calls: int
) -> tuple[ParticleStep, ...]:
    steps = ParticleStep(resample="ess") if steps is None else steps
    if isinstance(steps, ParticleStep):
        return (steps,) * calls
    if len(steps) != calls:
        raise ScheduleError(
            f"{len(steps)} steps for {calls} calls: give one, or one for each call"
        )
    return tuple(steps)


class _Fixed:
    """A TokenDenoiser that repeats logits it was given."""

    def __init__(self, denoiser: TokenDenoiser, logits: Tensor) -> None:
        self.mask, self.length, self._logits = denoiser.mask, denoiser.length, logits

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        return self._logits


class _MaskedRun:
    """One run: sequences are flat, (P K, L), population by population."""

    def __init__(
        self,
        schedule: MaskedSchedule,
        denoiser: TokenDenoiser,
        target: TiltedLaw,
        tokens: Tensor,
        steps: tuple[ParticleStep, ...],
        generator: torch.Generator | None,
    ) -> None:
        self.schedule, self.denoiser, self.target, self.steps = schedule, denoiser, target, steps
        self.P, self.K = tokens.shape[:2]
        self.generator, self.tokens = generator, tokens.flatten(0, 1)
        rules = [step.resample for step in steps]
        _require_weighable(schedule, target.power)
        free = (self.tokens == denoiser.mask).sum(-1)
        if bool((free != schedule.length).any()):
            raise ScheduleError(
                f"the counts sum to {schedule.length} but a sequence has {int(free.min())} to "
                f"{int(free.max())} free positions: use a schedule of that length"
            )
        self.weights = Weights(
            (self.P, self.K), generator, tokens.device, clocks="clocks" in rules
        )
        u = uniforms(
            len(self.tokens), 2, tokens.shape[-1], generator=generator, device=tokens.device
        )
        self.levels, self.draws = u[:, 0], u[:, 1]

    def call(self, k: int) -> None:
        """Ask the network, weigh what call k - 1 decided, resample, and decide call k's tokens."""
        masked = self.tokens == self.denoiser.mask
        levels = torch.where(masked, self.levels, -1.0)
        t = self.schedule.noise.time(levels.amax(-1)).clamp(min=torch.finfo(torch.float64).tiny)
        logits = self.denoiser(self.tokens, t)
        if k > 0:
            step = self.steps[k - 1]
            if step.resample != "never":
                b = 1.0 if self.steps[k].b is None else float(self.steps[k].b or 0.0)
                potential = self._potential(logits, masked, b, f"at call {k}")
                self.weights.add(self.weights.change(potential), f"at call {k}")
            index = self._settle(step, f"at call {k}")
            logits = logits if index is None else logits[index]
        self._decide(k, logits)

    def _potential(self, logits: Tensor, masked: Tensor, b: float, where: str) -> Tensor:
        """What the sequences' completions are worth, (P K,)."""
        if b == 0:
            return torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        mu = logits[masked].double().softmax(-1)
        worth = []
        for _ in range(self.target.completions):
            u = uniforms(len(mu), generator=self.generator, device=mu.device)
            completed = self.tokens.masked_scatter(masked, draw(mu, u))
            r = b * self.target.value(completed, self.K, where)
            worth.append(r.clamp(min=self.target.floor))
        return log_mean(torch.stack(worth, dim=1))

    def _settle(self, step: ParticleStep, where: str) -> Tensor | None:
        """Resample; the flat indices everything was gathered by, None where nothing moved."""
        index = self.weights.settle(step, where)
        if index is None:
            return None
        flat = (index + self.K * torch.arange(self.P, device=index.device)[:, None]).flatten()
        self.tokens, self.levels = self.tokens[flat], self.levels[flat]
        size = self.draws.shape  # copies go on with draws of their own
        self.draws = uniforms(*size, generator=self.generator, device=index.device)
        return flat

    def _decide(self, k: int, logits: Tensor) -> None:
        """Let the sampler decide call k's tokens from given logits, and weigh how it drew them.

        `sample_masked` runs a schedule of this call and one that completes the sequences; the
        second is not looked at.
        """
        call, rest = self.schedule.calls[k], sum(self.schedule.counts[k + 1 :])
        calls = (call, CallSpec(count=rest)) if rest else (call,)
        alone = self.schedule.model_copy(update={"length": call.count + rest, "calls": calls})
        seen: list[MaskedProgress] = []
        sample_masked(
            alone,
            _Fixed(self.denoiser, logits),
            self.tokens,
            u=torch.stack([self.levels, self.draws], dim=1),
            callback=seen.append,
        )
        first = seen[0]
        chance, own = (
            torch.where(first.valid, p.gather(2, first.drawn[..., None])[..., 0], 1.0).log()
            for p in (first.mu, first.law)
        )
        self.weights.add((self.target.power * chance - own).sum(-1), f"at call {k}")
        self.tokens = first.tokens

    def result(self) -> Particles:
        """Weigh the complete sequences by the reward itself."""
        where = "after the last call"
        r = self.target.value(self.tokens, self.K, where)
        self.weights.add(self.weights.change(r), where)
        self._settle(self.steps[-1], where)
        log_weights = self.weights.finish(where)
        return Particles(
            x=self.tokens.reshape(self.P, self.K, -1),
            log_weights=log_weights,
            log_normalizer=self.weights.log_z + log_mean(log_weights),
            ess=torch.stack(self.weights.ess),
            resampled=torch.stack(self.weights.resampled),
            ancestors=self.weights.ancestors,
            calls=self.schedule.nfe,
        )


def _require_weighable(schedule: MaskedSchedule, power: float) -> None:
    for k, call in enumerate(schedule.calls):
        plain = CallSpec(count=call.count, temperature=call.temperature, positions=call.positions)
        if call != plain or not call.temperature > 0 or call.positions == "drawn":
            raise ScheduleError(
                f"call {k}: weights need a fixed count, mode parallel, top_p 1 and a temperature "
                "above 0, without bounds, blocks, remasking or positions 'drawn'"
            )
        if power != 1 and (call.count != 1 or call.positions != "uniform"):
            raise ScheduleError(f"call {k}: power {power:g} needs count 1 and uniform positions")
