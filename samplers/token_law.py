"""What a prediction says: the law tokens are drawn from, and how certain it is, and where.

mu is the network's law of a position's token. Everything is computed from raw logits; -inf
logits (forbidden tokens) count as probability 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.space.errors import ModelError
from fewstep.space.masked import CallSpec

__all__ = [
    "confidence",
    "entropy",
    "law_at",
    "moved",
    "order_by",
    "parts",
    "ranks",
    "require_proper",
]

_CHUNK = 1 << 24  # elements of a float64 block of rows


def confidence(logits: Tensor) -> Tensor:
    """Largest probability of every position, float32, `(B, L)` of logits `(B, L, V)`."""
    return (logits.amax(-1).float() - logits.float().logsumexp(-1)).exp()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of every position in nats, float64, `(B, L)` of logits `(B, L, V)`."""
    return torch.stack([torch.special.entr(row.double().softmax(-1)).sum(-1) for row in logits])


def moved(logits: Tensor, past: Tensor) -> Tensor:
    """KL(mu, mu of the call before) of every position in nats, float64, `(B, L)`."""
    now, then = logits.double().log_softmax(-1), past.double().log_softmax(-1)
    return (now.exp() * (now - then).masked_fill(now == float("-inf"), 0.0)).sum(-1)


def order_by(name: str, logits: Tensor, levels: Tensor) -> Tensor:
    """What positions are sorted by, the first to be decided largest; -inf where visible.

    Args:
        name: "confidence" (log of the largest probability), "margin" (difference of the two
            largest) or "entropy" (its negative).
        logits: `(B, L, V)`.
        levels: `(B, L)`, negative at visible positions.
    """
    if name == "confidence":
        order = logits.amax(-1).float() - logits.float().logsumexp(-1)
    elif name == "margin":
        top = (logits.float().topk(2, -1).values - logits.float().logsumexp(-1)[..., None]).exp()
        order = top[..., 0] - top[..., 1]
    else:
        order = -entropy(logits)
    return order.masked_fill(levels < 0, float("-inf"))


def ranks(order: Tensor) -> Tensor:
    """The place of each entry of a row among its entries, 0 the largest; ties in their order."""
    return order.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def parts(batch: int, row: int) -> Iterator[slice]:
    """Slices of the batch whose float64 rows stay below a block's size."""
    size = max(1, _CHUNK // row)
    return (slice(i, i + size) for i in range(0, batch, size))


def law_at(
    call: CallSpec,
    logits: Tensor,
    where: Tensor,
    ahead: Tensor | None,
    older: Tensor | None,
    part: slice,
) -> tuple[Tensor, Tensor]:
    """Prediction and drawing law at positions `where` of a slice, float64 `(b, m, V)`."""
    rows = where[part, :, None].expand(-1, -1, logits.shape[-1])
    law = mu = logits[part].gather(1, rows).double().softmax(-1)
    if ahead is not None and older is not None:
        past = older[part].gather(1, rows).double().softmax(-1)
        factor = ahead[part, :, None]
        line = (mu + factor * (mu - past)).clamp(min=0)
        law = torch.where(factor > 0, line / line.sum(-1, keepdim=True), mu)
    if call.temperature == 0:
        return mu, torch.zeros_like(law).scatter(-1, law.argmax(-1, keepdim=True), 1.0)
    if call.temperature != 1:
        law = (law.log() / call.temperature).softmax(-1)
    if call.top_p != 1:
        ranked, order = law.sort(-1, descending=True)
        kept = ranked.cumsum(-1) - ranked < call.top_p
        law = torch.zeros_like(law).scatter(-1, order, ranked * kept)
        law = law / law.sum(-1, keepdim=True)
    return mu, law


def require_proper(mu: Tensor, law: Tensor, valid: Tensor, mask: int, call: int) -> None:
    """Refuse logits with NaN, without any token, or that allow the mask."""
    if bool((mu.isnan().any(-1) & valid).any()):
        raise ModelError(f"call {call}: the logits hold NaN, or forbid every token")
    if bool(((law[..., mask] > 0) & valid).any()):
        raise ModelError(f"call {call}: the logits allow the mask token: wrap with from_subs")
