"""Ancestral sampling of masked diffusion, plain and cached: the references first hitting beats.

One step t -> s, each masked position independently:

    P(stay masked) = (1 - a_s)/(1 - a_t),        P(token v) = (a_s - a_t)/(1 - a_t) mu_v

The decision "unmask?" is drawn first, in float64, and the token from mu only then, so no tiny
probability is ever compared and every precision of the network is safe. The cached sampler of
MDLM asks the network only after some sequence of the batch has changed; that is exact for
time-free networks alone. `sampling="fp32_gumbel"` reproduces the published precision fault.

The fault: an argmax over Gumbels g = -log(-log u) made from float32 uniforms cannot exceed M =
-log(2^-24) = 16.6355, because u <= 1 - 2^-24. With Gumbels truncated at M the classes pi_1 <= ...
<= pi_K (pi_0 = 0) are drawn with

    pi'_n = pi_n sum_{i <= n} beta_i,        S_i = sum_{k >= i} pi_k,
    beta_i = (exp((K+1-i - S_i/pi_i) e^-M) - exp((K+1-i - S_i/pi_{i-1}) e^-M)) / S_i

(second term 0 for i = 1): a hidden low temperature, to 3 decimals pi' ~ pi exp(-e^-M / pi), which
grows with the number of ancestral steps because there pi = p (a_s - a_t)/(1 - a_t). It made
published perplexities of masked diffusion look better than they are.

References:
    Sahoo et al. 2406.07524, sections 3.2.2 and 4 (ancestral, cache);
    Zheng et al. 2409.02908, sections 2 and 5 (cost, the precision fault).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.samplers.categorical import draw
from fewstep.samplers.token_denoiser import TokenDenoiser
from fewstep.space.errors import ModelError, ScheduleError
from fewstep.space.masked import MaskedNoise

__all__ = ["Sampling", "ancestral", "expected_calls", "truncated_gumbel", "truncated_law"]

DEMONSTRATION_BITS = 24

Sampling = Literal["two_stage", "categorical", "fp32_gumbel"]


@torch.no_grad()
def ancestral(
    denoiser: TokenDenoiser,
    tokens: Tensor,
    steps: int,
    *,
    noise: MaskedNoise | None = None,
    cached: bool = False,
    sampling: Sampling = "two_stage",
    generator: torch.Generator | None = None,
    bits: int = DEMONSTRATION_BITS,
) -> Tensor:
    """Complete sequences with `steps` ancestral steps on a uniform grid of times.

    Args:
        denoiser: the model.
        tokens: int64 ids `(B, L)`, `denoiser.mask` where a token is wanted.
        steps: N >= 1.
        noise: masking schedule, default a = 1 - t.
        cached: keep the last logits while no sequence of the batch changes (time-free networks).
        sampling: "two_stage" (decide first, then draw; exact), "categorical" (one float64 draw
            over all tokens of all masked positions, the usual work of such samplers, exact) or
            "fp32_gumbel" (DEMONSTRATION of the fault).
        generator: on the tokens' device.
        bits: resolution of the demonstration's uniforms.

    Returns:
        int64 ids `(B, L)` without masks.

    Raises:
        ScheduleError: steps < 1.
        ModelError: the logits hold NaN or allow the mask.
    """
    if steps < 1:
        raise ScheduleError(f"steps {steps} must be 1 or more")
    noise = noise or MaskedNoise()
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    shares = (1 - noise.visible(times)).tolist()
    tokens, logits = tokens.clone(), None
    for i in range(steps):
        masked = tokens == denoiser.mask
        if not bool(masked.any()):
            break
        if logits is None or not cached:
            t = times[i].to(tokens.device).expand(len(tokens))
            logits = denoiser(tokens, t)
        stay = shares[i + 1] / shares[i]
        fresh = _step(logits, masked, stay, sampling, generator, bits, denoiser.mask)
        changed = fresh != tokens[masked]
        if bool(changed.any()):
            tokens[masked] = fresh
            logits = None
    return tokens


def _step(
    logits: Tensor,
    masked: Tensor,
    stay: float,
    sampling: Sampling,
    generator: torch.Generator | None,
    bits: int,
    mask: int,
) -> Tensor:
    """New ids of the masked positions, in their order; the mask id where one stays masked."""
    fresh = torch.full((int(masked.sum()),), mask, device=masked.device)
    if sampling == "two_stage":
        u = torch.rand(
            (2, len(fresh)), generator=generator, device=fresh.device, dtype=torch.float64
        )
        leave = u[0] >= stay
        if bool(leave.any()):
            rows = masked.nonzero()[leave]
            fresh[leave] = draw(_probabilities(logits[rows[:, 0], rows[:, 1]], mask), u[1, leave])
        return fresh
    if sampling == "fp32_gumbel":
        joint = logits[masked].float().log_softmax(-1)
        joint = joint + torch.log1p(torch.tensor(-stay, dtype=torch.float64)).float().item()
        joint[:, mask] = torch.log(torch.tensor(stay)).item()
        return truncated_gumbel(joint, generator, bits=bits)
    joint = _probabilities(logits[masked], mask) * (1 - stay)
    joint[:, mask] = stay
    u = torch.rand(len(fresh), generator=generator, device=fresh.device, dtype=torch.float64)
    return draw(joint, u)


def _probabilities(rows: Tensor, mask: int) -> Tensor:
    mu = rows.double().softmax(-1)
    if bool(mu.isnan().any()):
        raise ModelError("the logits hold NaN, or forbid every token")
    if bool(mu[:, mask].any()):
        raise ModelError("the logits allow the mask token: wrap with from_subs")
    return mu


def expected_calls(length: int, batch: int, steps: int) -> float:
    """Expected network calls of cached ancestral sampling, linear schedule.

    N (1 - (1 - 1/N)^{B L}): a step costs a call unless nothing changed in the step before it.

    Args:
        length: free positions L of each sequence.
        batch: sequences B that share the cache.
        steps: N.

    References:
        Zheng et al. 2409.02908, section 4 (batch 1); the batch enters as B L positions.
    """
    return steps * (1 - (1 - 1 / steps) ** (batch * length))


def truncated_gumbel(
    log_probabilities: Tensor,
    generator: torch.Generator | None = None,
    *,
    bits: int = DEMONSTRATION_BITS,
) -> Tensor:
    """DEMONSTRATION of the fault: argmax of log p + g with uniforms of a few bits.

    Args:
        log_probabilities: shape `(*, V)`, -inf allowed.
        generator: on the same device.
        bits: the largest uniform is 1 - 2^-bits, so M = bits log 2; 24 is float32, and smaller
            numbers show the same effect with fewer draws.

    Returns:
        int64 token ids of shape `(*)`, wrongly distributed.
    """
    u = torch.rand(log_probabilities.shape, generator=generator, device=log_probabilities.device)
    top = 2.0**bits
    u = ((u * top).floor() / top).clamp(min=2.0**-30)
    gumbel = -torch.log(-torch.log(u))
    return (log_probabilities.float() + gumbel).argmax(-1)


def truncated_law(probabilities: Tensor, top: float) -> Tensor:
    """The law of an argmax over Gumbels truncated at `top`, in closed form.

    Args:
        probabilities: float64, shape `(K,)`, > 0, summing to one.
        top: M, the largest Gumbel that can occur; the Gumbels follow the law conditional on
            g <= M.

    Returns:
        float64 probabilities `(K,)` in the order given; they sum to one.
    """
    pi, order = probabilities.sort()
    size, eps = len(pi), torch.exp(torch.tensor(-top, dtype=torch.float64))
    tail = pi.flip(0).cumsum(0).flip(0)
    places = torch.arange(size, 0, -1, dtype=torch.float64)
    upper = torch.exp((places - tail / pi) * eps)
    lower = torch.exp((places[1:] - tail[1:] / pi[:-1]) * eps)
    beta = (upper - torch.cat([torch.zeros(1, dtype=torch.float64), lower])) / tail
    result = torch.empty_like(pi)
    result[order] = pi * beta.cumsum(0)
    return result
