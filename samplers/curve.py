"""The cross-entropy curve of a masked model: how well it predicts a token given m others.

    h(m) = mean of -log mu_l(x with m random tokens visible), l masked, x data        [nats]

One sweep over held-out sequences measures it; no sampling. `space.counts.best_counts` makes the
counts of least expected divergence from it, for every number of calls at once (Chen, Cong and Li
2511.04647), and `MaskedProblem(curve=curve.falling)` puts them among the named schedules as "dp".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.samplers.token_denoiser import TokenDenoiser
from fewstep.samplers.token_law import parts
from fewstep.space.errors import ModelError, ScheduleError

__all__ = ["Curve", "cross_entropy_curve", "load_curve", "save_curve"]

_FORMAT = "fewstep.curve"
_VERSION = 1


@dataclass(frozen=True)
class Curve:
    """A measured cross-entropy curve.

    Args:
        values: h(0) .. h(L-1) in nats.
        errors: their standard errors; those between two measured points are interpolated.
        samples: sequences it was measured on.
        model: a short name and hash of the weights, "" if unknown.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    samples: int
    model: str = ""

    @property
    def falling(self) -> tuple[float, ...]:
        """The nearest curve that never rises, in squares of standard errors.

        A perfect model predicts a token no worse when it sees more, and counts that are fitted to
        a rise fit the noise of few sequences. Isotonic regression, by pooling neighbours that
        rise (Barlow et al. 1972).
        """
        precise = all(error > 0 for error in self.errors)  # of one sequence they are not numbers
        weights = [1 / e**2 for e in self.errors] if precise else [1.0] * len(self.values)
        pools: list[tuple[float, float, int]] = []
        for value, weight in zip(self.values, weights, strict=True):
            pool = (value, weight, 1)
            while pools and pools[-1][0] < pool[0]:
                (v, w, n), (v2, w2, n2) = pools.pop(), pool
                pool = ((v * w + v2 * w2) / (w + w2), w + w2, n + n2)
            pools.append(pool)
        return tuple(value for value, _, size in pools for _ in range(size))


@torch.no_grad()
def cross_entropy_curve(
    denoiser: TokenDenoiser,
    tokens: Tensor,
    free: Tensor | None = None,
    *,
    points: Sequence[int] | None = None,
    batch: int = 64,
    generator: torch.Generator | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Curve:
    """Measure h on held-out sequences.

    Args:
        denoiser: the model.
        tokens: complete sequences `(N, L)`.
        free: which positions a sampler decides, bool `(N, L)` or `(L,)`, as many in each sequence;
            the others are always visible. None is all.
        points: numbers of visible free tokens m at which h is measured, 0 and the largest
            included; linear between. None is every m: N x L network evaluations.
        batch: sequences per network call.
        generator: which tokens are visible, on the CPU.
        on_progress: called with (calls done, calls in all).

    Returns:
        The curve, as long as the number of free positions.

    Raises:
        ModelError: sequences with different numbers of free positions; a token that the model
            gives no probability.
        ScheduleError: points outside the curve.
    """
    mine = torch.ones_like(tokens, dtype=torch.bool) if free is None else free.expand_as(tokens)
    size = int(mine[0].sum())
    if not size or bool((mine.sum(-1) != size).any()):
        raise ModelError("every sequence needs as many free positions, one or more")
    asked = sorted({0, size - 1, *(range(size) if points is None else points)})
    if asked[0] < 0 or asked[-1] >= size:
        raise ScheduleError(f"points must lie in 0..{size - 1}, the numbers of visible tokens")
    keys = torch.rand(tokens.shape, generator=generator, dtype=torch.float64).to(tokens.device)
    rank = keys.masked_fill(~mine, math.inf).argsort(dim=-1).argsort(dim=-1)
    starts = range(0, len(tokens), batch)
    means, errors = [], []
    for i, m in enumerate(asked):
        losses = []
        for j, start in enumerate(starts):
            rows = slice(start, start + batch)
            hidden = mine[rows] & (rank[rows] >= m)
            losses.append(_surprise(denoiser, tokens[rows], hidden, 1 - m / size))
            if on_progress is not None:
                on_progress(i * len(starts) + j + 1, len(asked) * len(starts))
        each = torch.cat(losses)
        means.append(float(each.mean()))
        errors.append(float(each.std() / len(each) ** 0.5) if len(each) > 1 else math.nan)
    every = np.arange(size)
    values, spread = (np.interp(every, asked, column).tolist() for column in (means, errors))
    return Curve(tuple(values), tuple(spread), len(tokens))


def _surprise(denoiser: TokenDenoiser, tokens: Tensor, hidden: Tensor, t: float) -> Tensor:
    """Mean cross-entropy of the hidden tokens of each sequence, float64 `(b,)`."""
    times = torch.full((len(tokens),), t, dtype=torch.float64, device=tokens.device)
    logits = denoiser(tokens.masked_fill(hidden, denoiser.mask), times)
    losses = []
    for part in parts(len(tokens), logits[0].numel()):
        log_p = logits[part].double().log_softmax(-1).gather(2, tokens[part, :, None])[..., 0]
        hidden_here = hidden[part]
        losses.append(-log_p.where(hidden_here, 0.0).sum(-1) / hidden_here.sum(-1))
    each = torch.cat(losses)
    if not bool(each.isfinite().all()):
        raise ModelError("the model gives a token of the data no probability: is it forbidden?")
    return each.cpu()


def save_curve(curve: Curve, path: str | os.PathLike[str]) -> Path:
    """Write a curve as JSON."""
    path = Path(path)
    body = {"format": _FORMAT, "version": _VERSION} | asdict(curve)
    path.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def load_curve(path: str | os.PathLike[str]) -> Curve:
    """Read a curve.

    Raises:
        ScheduleError: not such a file; one line.
    """
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.pop("format") != _FORMAT or data.pop("version") != _VERSION:
            raise ValueError("another format or version")
        values, errors = (tuple(map(float, data.pop(k))) for k in ("values", "errors"))
        curve = Curve(values, errors, **data)
        if not values or len(values) != len(errors) or not all(map(math.isfinite, values)):
            raise ValueError("values and errors must be finite numbers, as many of each")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScheduleError(f"{path} is no cross-entropy curve ({error})") from None
    return curve
