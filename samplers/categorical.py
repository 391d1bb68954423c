"""Drawing one token from a row of probabilities, right in every precision of the logits.

`draw` inverts the cumulative distribution in float64 with float64 uniforms, so events down to
2^-53 happen at their own rate. The common alternative, an argmax over Gumbels g = -log(-log u)
made from float32 uniforms, cannot exceed M = -log(2^-24) = 16.6355, because u <= 1 - 2^-24: with
Gumbels truncated at M the classes pi_1 <= ... <= pi_K (pi_0 = 0) are drawn with

    pi'_n = pi_n sum_{i <= n} beta_i,        S_i = sum_{k >= i} pi_k,
    beta_i = (exp((K+1-i - S_i/pi_i) e^-M) - exp((K+1-i - S_i/pi_{i-1}) e^-M)) / S_i

(second term 0 for i = 1): a hidden low temperature, to 3 decimals pi' ~ pi exp(-e^-M / pi), which
grows with the number of ancestral steps because there pi = p (a_s - a_t)/(1 - a_t). It made
published perplexities of masked diffusion look better than they are. `truncated_gumbel` is that
fault, kept ONLY to show it; nothing in this package samples with it.

References:
    Zheng et al. 2409.02908, section 5 and appendix (the truncated law).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DEMONSTRATION_BITS", "draw", "truncated_gumbel", "truncated_law", "uniforms"]

DEMONSTRATION_BITS = 24


def uniforms(
    *size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Float64 uniforms in [0, 1) with 53 random bits, drawn on the generator's device.

    Args:
        size: shape.
        generator: source of randomness; None is the global one of the CPU.
        device: where the result is wanted.
    """
    source = generator.device if generator is not None else torch.device("cpu")
    return torch.rand(size, generator=generator, dtype=torch.float64, device=source).to(device)


def draw(probabilities: Tensor, u: Tensor) -> Tensor:
    """Invert the cumulative distribution: the first token whose cumulated share exceeds u.

    Args:
        probabilities: float64, >= 0, shape `(*, V)`; rows need not sum to one.
        u: float64 uniforms in [0, 1), shape `(*)`.

    Returns:
        int64 token ids of shape `(*)`; **a token of probability 0 is never returned**.

    Raises:
        TypeError: either argument is not float64: a float32 uniform would bring the truncation
            back.
    """
    if probabilities.dtype != torch.float64 or u.dtype != torch.float64:
        raise TypeError(f"draw needs float64, got {probabilities.dtype} and {u.dtype}")
    cumulated = probabilities.cumsum(-1)
    total = cumulated[..., -1:]
    target = torch.minimum(u[..., None] * total, torch.nextafter(total, -total))
    return torch.searchsorted(cumulated, target, right=True)[..., 0]


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
