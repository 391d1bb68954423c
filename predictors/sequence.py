"""A small recurrent ranker over the tokens of a schedule: a batched ensemble, trained on pairs.

One token per network call (`space.tokens`) -> linear -> GRU -> head -> score; the state after the
last call is read out, so one model serves every number of calls. Loss: the logistic pairwise
ranking loss mean log(1 + exp(-(s_i - s_j))) over pairs with y_i > y_j of the same number of calls.
Member k never sees fold k of the rows: its predictions there give the cross-validated Kendall tau
for free, and the spread of the members is the uncertainty. Float32.

References: the predictor recipe of OMS-DPM (Liu et al. 2023, arXiv 2306.08860: sequence model,
pairwise ranking), from the authors of USF, whose own predictor is not released; GRU, Cho et al.
2014 (1406.1078); RankNet loss, Burges et al. 2005.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Rows:
    """Padded sequences.

    Args:
        x: tokens, shape (n, L, F), zero beyond each length.
        length: calls of each row, shape (n,), int64.
    """

    x: Tensor
    length: Tensor

    @classmethod
    def of(cls, tokens: list[Tensor]) -> Rows:
        """Pad a list of (calls, F) tensors."""
        length = torch.tensor([len(t) for t in tokens])
        return cls(
            torch.nn.utils.rnn.pad_sequence([t.float() for t in tokens], batch_first=True), length
        )


class SequenceRanker:
    """An ensemble of GRU rankers.

    Args:
        members: ensemble size, and number of folds.
        hidden: width of the state.
        steps: optimiser steps.
        batch: rows per member and step; all their pairs enter the loss.
        rate: Adam's learning rate at the start; it falls to a tenth along a cosine.
    """

    def __init__(
        self,
        members: int = 5,
        hidden: int = 32,
        steps: int = 120,
        batch: int = 96,
        rate: float = 1e-2,
    ) -> None:
        self.members, self.hidden, self.steps, self.batch, self.rate = (
            members,
            hidden,
            steps,
            batch,
            rate,
        )
        self.state: dict[str, Tensor] = {}

    def fit(self, rows: Rows, y: Tensor, folds: Tensor, seed: int) -> SequenceRanker:
        """Train on targets y (n,), smaller is better; member k leaves out rows with folds == k."""
        generator = torch.Generator().manual_seed(seed)
        valid = torch.arange(rows.x.shape[1]) < rows.length[:, None]
        flat = rows.x[valid]
        mean, scale = flat.mean(0), flat.std(0)
        scale = torch.where(scale > 1e-6, scale, torch.ones_like(scale))
        self.state = self._initial(rows.x.shape[-1], generator) | {"mean": mean, "scale": scale}
        learned = [v for k, v in self.state.items() if k not in ("mean", "scale")]
        for v in learned:
            v.requires_grad_(True)
        optimiser = torch.optim.Adam(learned, lr=self.rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps, self.rate / 10)
        open_rows = torch.stack([(folds != k).float() for k in range(self.members)])
        y = y.float()
        for _ in range(self.steps):
            pick = torch.multinomial(
                open_rows + 1e-12, min(self.batch, len(y)), replacement=True, generator=generator
            )
            score = self._forward(rows.x[pick], rows.length[pick])
            target, length = y[pick], rows.length[pick]
            better = (target[:, :, None] > target[:, None, :]) & (
                length[:, :, None] == length[:, None, :]
            )
            gap = score[:, :, None] - score[:, None, :]
            loss = (functional.softplus(-gap) * better).sum((1, 2)) / better.sum((1, 2)).clamp(
                min=1
            )
            optimiser.zero_grad()
            loss.sum().backward()
            torch.nn.utils.clip_grad_norm_(learned, 5.0)
            optimiser.step()
            decay.step()
        self.state = {k: v.detach() for k, v in self.state.items()}
        self._calibrate(rows, y, folds)
        return self

    def _initial(self, features: int, generator: torch.Generator) -> dict[str, Tensor]:
        h, k = self.hidden, self.members
        shapes = {
            "w_in": (features, 3 * h),
            "w_state": (h, 3 * h),
            "w_head": (h, h),
            "w_out": (h, 1),
        }
        state = {
            n: torch.randn(k, *s, generator=generator) / s[0] ** 0.5 for n, s in shapes.items()
        }
        return state | {
            "b_in": torch.zeros(k, 1, 3 * h),
            "b_state": torch.zeros(k, 1, 3 * h),
            "b_head": torch.zeros(k, 1, h),
        }

    def _forward(self, x: Tensor, length: Tensor) -> Tensor:
        """x (K, b, L, F) or (1, b, L, F), length (K, b) or (1, b) -> scores (K, b)."""
        p = self.state
        x = ((x - p["mean"]) / p["scale"]).clamp(-6, 6)
        k, h = self.members, self.hidden
        x = x.expand(k, *x.shape[1:])
        drive = torch.baddbmm(p["b_in"], x.flatten(1, 2), p["w_in"]).unflatten(1, x.shape[1:3])
        state = torch.zeros(k, x.shape[1], h)
        for c in range(x.shape[2]):
            r_i, z_i, n_i = drive[:, :, c].chunk(3, -1)
            r_h, z_h, n_h = torch.baddbmm(p["b_state"], state, p["w_state"]).chunk(3, -1)
            z = torch.sigmoid(z_i + z_h)
            new = (1 - z) * torch.tanh(n_i + torch.sigmoid(r_i + r_h) * n_h) + z * state
            state = torch.where((length > c).unsqueeze(-1), new, state)
        hidden = functional.silu(torch.baddbmm(p["b_head"], state, p["w_head"]))
        return torch.bmm(hidden, p["w_out"]).squeeze(-1)

    def _calibrate(self, rows: Rows, y: Tensor, folds: Tensor) -> None:
        """Each member's least-squares line from score to target, per number of calls."""
        score = self._forward(rows.x[None], rows.length[None])
        most = int(rows.length.max()) + 1
        slope, shift = torch.ones(self.members, most), torch.zeros(self.members, most)
        for length in rows.length.unique().tolist():
            for k in range(self.members):
                use = (rows.length == length) & (folds != k)
                if int(use.sum()) < 3:
                    use = rows.length == length
                s, t = score[k, use], y[use]
                centred = s - s.mean()
                slope[k, length] = (
                    (centred * (t - t.mean())).sum() / (centred**2).sum().clamp(min=1e-9)
                ).clamp(min=1e-6)
                shift[k, length] = t.mean() - slope[k, length] * s.mean()
        self.state |= {"slope": slope, "shift": shift}

    def each(self, rows: Rows) -> Tensor:
        """Predictions of every member, shape (K, n), in units of the targets."""
        score = self._forward(rows.x[None].float(), rows.length[None])
        at = rows.length.clamp(max=self.state["slope"].shape[1] - 1)
        return self.state["slope"][:, at] * score + self.state["shift"][:, at]

    def left_out(self, rows: Rows, folds: Tensor) -> Tensor:
        """Prediction of each training row by the member that has not seen it, shape (n,)."""
        return self.each(rows).gather(0, folds[None])[0]
