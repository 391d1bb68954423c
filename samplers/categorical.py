"""Drawing one token from a row of probabilities, right in every precision of the logits.

`draw` inverts the cumulative distribution in float64 with float64 uniforms, so events down to
2^-53 happen at their own rate. An argmax over Gumbels made from float32 uniforms is not: it draws
at a hidden low temperature (`experiments/benchmarks/ancestral.py`).

References:
    Zheng et al. 2409.02908, section 5 and appendix.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw", "uniforms"]


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
