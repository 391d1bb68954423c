"""Sequences on their way through a masked schedule: what is asked, and what an answer decides.

`Unmasking` is the state between two network calls, so that whoever owns the loop can run a
schedule: `samplers.masked` asks a denoiser, an adapter is handed logits. A call goes

    ask(k)          which sequences, what tokens and times; None where no token is left to decide
    answer(k, ..)   order the masked positions, decide the first `count` and those that a bound
                    lets through, draw their tokens, mask again what the call takes back

All randomness is `u`, float64 uniforms `(B, R, L)`: levels, which order the positions; token
draws; and for every call that remasks three more rows: which positions are taken back, their new
levels and draws. R is `MaskedSchedule.uniforms`.

References:
    Zheng et al. 2409.02908, sections 4.1 and 4.3 (first hitting, extrapolation); for the choices
    of a call see `space.masked`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.samplers.categorical import draw
from fewstep.samplers.token_law import (
    confidence,
    entropy,
    law_at,
    moved,
    order_by,
    parts,
    ranks,
    require_proper,
)
from fewstep.space.errors import ScheduleError
from fewstep.space.masked import CallSpec, MaskedSchedule

__all__ = ["MaskedProgress", "Query", "Unmasking"]

_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class MaskedProgress:
    """What a callback gets after every call.

    Args:
        call: index of the call.
        t: float64 times told to the network, shape `(B,)`.
        tokens: the state after the call, `(B, L)`.
        positions: positions decided, `(B, m)`, in the order of decoding.
        valid: which of them are real (sequences may decide fewer than m), `(B, m)`.
        mu: the network's float64 probabilities there, `(B, m, V)`.
        law: the probabilities the tokens were drawn from, `(B, m, V)`.
        drawn: the tokens drawn, `(B, m)`.
        remasked: positions masked again, `(B, L)`.
    """

    call: int
    t: Tensor
    tokens: Tensor
    positions: Tensor
    valid: Tensor
    mu: Tensor
    law: Tensor
    drawn: Tensor
    remasked: Tensor


@dataclass(frozen=True, eq=False)
class Query:
    """What a call asks the network.

    Args:
        rows: the sequences that have tokens to decide.
        count: how many each of them decides at least, `(b,)`.
        tokens: their tokens, `(b, L)`.
        t: float64 times, `(b,)`.
        ends: where each sequence ends for the network, `(b,)`; None: nothing is hidden.
    """

    rows: slice | Tensor
    count: Tensor
    tokens: Tensor
    t: Tensor
    ends: Tensor | None


class Unmasking:
    """The state of a batch under a schedule.

    Args:
        schedule: what to do.
        tokens: int64 ids `(B, L)`, `mask` where a token is wanted.
        mask: the mask id.
        u: float64 uniforms `(B, R, L)`, R = `schedule.uniforms`.
        fit: rescale the counts to each sequence's number of masks.
        ends: ids that end a text.

    Raises:
        ScheduleError: counts that do not sum to the masks of a sequence; `u` of another shape;
            ends_last without ids.
    """

    def __init__(
        self,
        schedule: MaskedSchedule,
        tokens: Tensor,
        mask: int,
        u: Tensor,
        *,
        fit: bool = False,
        ends: Sequence[int] = (),
    ) -> None:
        batch, length = tokens.shape
        self.schedule, self.mask = schedule, mask
        if u.shape != (batch, schedule.uniforms, length) or u.dtype != torch.float64:
            raise ScheduleError(f"u must be float64 of shape {(batch, schedule.uniforms, length)}")
        if not ends and any(call.ends_last for call in schedule.calls):
            raise ScheduleError("ends_last needs the ids that end a text: give the denoiser ends=")
        self.free = tokens == mask
        self.counts = _counts(schedule, self.free, fit)
        self.levels = torch.where(self.free, u[:, 0], -1.0)
        self.events = schedule.noise.time(self.levels.sort(-1, descending=True).values)
        self.place = self.free.cumsum(-1) - 1  # of a free position among them
        self.u, self.chance = u, u[:, 1].clone()
        self.tokens = tokens.clone()
        self.ends = torch.tensor(list(ends), dtype=torch.long, device=tokens.device)
        self.history: tuple[Tensor, Tensor, Tensor] | None = None
        self.still = torch.zeros_like(tokens)  # calls in a row whose prediction has not moved
        self.sure = torch.zeros_like(self.levels)  # probability of a token when it was drawn
        remaskings = itertools.accumulate(call.remask > 0 for call in schedule.calls)
        self.fresh = [2 + 3 * (n - 1) for n in remaskings]  # the rows of u that a call remasks by
        kinds = {call.remask_by for call in schedule.calls if call.remask}
        self.remembers = "drawn" in kinds
        self.compares = any(
            c.mode == "extrapolate" or c.max_kl is not None for c in schedule.calls
        )

    @property
    def done(self) -> bool:
        """Whether nothing is masked."""
        return not bool((self.levels >= 0).any())

    def ask(self, k: int) -> Query | None:
        """What call k asks the network; None if no sequence has a token for it."""
        call, left = self.schedule.calls[k], (self.levels >= 0).sum(-1)
        count = self._owed(k, left)
        if not bool(count.any()):
            return None
        rows = _ALL if bool(count.all()) else count.nonzero()[:, 0]
        decided = (self.free.sum(-1) - left).clamp(max=self.levels.shape[1] - 1)
        t = self.events.gather(1, decided[:, None])[:, 0].clamp(min=0)[rows]
        ends = None
        if call.hide_future:
            near = self._near(call, rows, count[rows])
            ends = near.long().flip(-1).argmax(-1).neg() + near.shape[1]
        return Query(rows, count[rows], self.tokens[rows], t, ends)

    def _owed(self, k: int, left: Tensor) -> Tensor:
        """Positions that call k decides at least, `(B,)`."""
        count = self.counts[:, k]
        if self.schedule.ahead == "stop":
            return torch.minimum(count, left)
        rest = self.counts[:, k:].sum(-1)
        spread = (left * count / rest.clamp(min=1)).round().long().clamp(min=1)
        behind = torch.where(count > 0, torch.minimum(spread, left), 0)
        return torch.where(left == rest, count, behind)

    def answer(self, k: int, query: Query, logits: Tensor, *, keep: bool) -> MaskedProgress:
        """Decide what call k decides, given the network's logits.

        Args:
            k: index of the call.
            query: what was asked.
            logits: `(b, L, V)` of the sequences asked.
            keep: return the laws, `(B, m, V)`; else they are empty.

        Raises:
            ModelError: logits with NaN, or that allow the mask.
        """
        call, rows = self.schedule.calls[k], query.rows
        levels, u = self.levels[rows], self.chance[rows]
        open_ = levels >= 0
        taken = self._taken(call, query.count, open_, rows)
        everywhere = None
        if call.positions == "drawn" or call.ends_last:
            everywhere = self._everywhere(call, logits, open_, u)
        order = self._order(call, query, logits, levels, everywhere)
        number, order = self._number(call, query, logits, order, taken, everywhere)
        where = order.topk(int(number.max()), dim=-1).indices
        rank = (self.free[rows].sum(-1) - open_.sum(-1))[:, None] + torch.arange(
            where.shape[1], device=where.device
        )
        valid = rank < (rank[:, :1] + number[:, None])
        mu, law, drawn = self._draw(call, k, query, logits, where, rank, valid, keep)
        tokens = query.tokens
        tokens = tokens.scatter(1, where, torch.where(valid, drawn, tokens.gather(1, where)))
        levels = levels.scatter(1, where, torch.where(valid, -1.0, levels.gather(1, where)))
        back = self._take_back(k, query, taken, open_, logits)
        self.tokens = self.tokens.clone()
        self.tokens[rows] = torch.where(back, self.mask, tokens)
        self.levels[rows] = levels
        if call.remask:
            level, chance = self.u[rows, self.fresh[k] + 1], self.u[rows, self.fresh[k] + 2]
            self.levels[rows] = torch.where(back, level, levels)
            self.chance[rows] = torch.where(back, chance, self.chance[rows])
        told = (query.t, where, valid, mu, law, drawn, back)
        t, *full = (_full(x, rows, len(self.tokens)) for x in told)
        return MaskedProgress(k, t, self.tokens, *full)

    def _near(self, call: CallSpec, rows: slice | Tensor, count: Tensor) -> Tensor:
        """Positions up to the end of the block in which the `count`-th mask lies, `(b, L)`."""
        open_ = self.levels[rows] >= 0
        if call.block is None:
            return torch.ones_like(open_)
        block = self.place[rows].div(call.block, rounding_mode="floor")
        reached = (open_ & (open_.cumsum(-1) <= count[:, None])).long() * (block + 1)
        inside = self.free[rows] & (block < reached.amax(-1, keepdim=True))
        return inside.flip(-1).cumsum(-1).flip(-1) > 0

    def _first_block(self, call: CallSpec, rows: slice | Tensor, open_: Tensor) -> Tensor:
        """The free positions of the first block that is not done, `(b, L)`."""
        free = self.free[rows]
        if call.block is None:
            return free
        block = self.place[rows].div(call.block, rounding_mode="floor")
        first = block.masked_fill(~open_, self.place.shape[1]).amin(-1, keepdim=True)
        return free & (block == first)

    def _taken(self, call: CallSpec, count: Tensor, open_: Tensor, rows: slice | Tensor) -> Tensor:
        """How many positions the call masks again, `(b,)`."""
        if not call.remask:
            return torch.zeros_like(count)
        mine = self._first_block(call, rows, open_)
        decided = (mine & ~open_).sum(-1)
        room = ((mine & open_).sum(-1) - count).clamp(min=0)
        return torch.minimum((call.remask * decided).round().long(), room)

    def _everywhere(
        self, call: CallSpec, logits: Tensor, open_: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A token drawn at every masked position, and its probability, `(b, L)`."""
        tokens, chances = [], []
        index = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
        for part in parts(len(logits), logits[0].numel()):
            mu, law = law_at(call, logits, index, None, None, part)
            drawn = draw(law.nan_to_num(), u[part]).clamp(max=mu.shape[-1] - 1)
            tokens.append(drawn)
            chances.append(mu.gather(2, drawn[..., None])[..., 0])
        return torch.cat(tokens), torch.cat(chances).masked_fill(~open_, -1.0)

    def _order(
        self,
        call: CallSpec,
        query: Query,
        logits: Tensor,
        levels: Tensor,
        everywhere: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """What positions are sorted by, the first to be decided largest; -inf where visible."""
        if call.positions == "uniform":
            order = levels
        elif call.positions == "drawn":
            assert everywhere is not None
            order = everywhere[1]
        else:
            order = order_by(call.positions, logits, levels)
        if call.block is None and not call.ends_last:
            return order
        open_, length = levels >= 0, levels.shape[1]
        rank = ranks(order)
        if call.ends_last:
            assert everywhere is not None
            rank = rank + length * torch.isin(everywhere[0], self.ends)
        if call.block is not None:
            block = self.place[query.rows].div(call.block, rounding_mode="floor")
            rank = rank + 2 * length * block
        return rank.neg().double().masked_fill(~open_, float("-inf"))

    def _number(
        self,
        call: CallSpec,
        query: Query,
        logits: Tensor,
        order: Tensor,
        taken: Tensor,
        everywhere: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """How many positions are decided, `(b,)`, and an order that has them first."""
        open_, number = self.levels[query.rows] >= 0, query.count + taken
        moving = None
        if self.compares:
            moving = self._moved(call, query, logits, open_)
        if not call.bounded:
            return number, order
        mine = self._first_block(call, query.rows, open_) & open_
        chance = everywhere[1] if call.positions == "drawn" and everywhere else confidence(logits)
        passed = mine & (chance > call.min_confidence)
        rank = ranks(order)
        if call.max_entropy > 0:
            spread = entropy(logits).masked_fill(~mine, float("inf"))
            first = torch.where(rank < number[:, None], -1.0, spread).argsort(dim=-1)
            ranked = torch.where(open_, spread, float("inf")).gather(1, first)
            shared = ranked.cumsum(-1) - ranked.cummax(-1).values
            passed |= mine & torch.zeros_like(mine).scatter(1, first, shared < call.max_entropy)
        if call.max_kl is not None:
            assert moving is not None
            passed &= moving >= call.kl_window
        chosen = open_ & (passed | (rank < number[:, None]))
        total = chosen.sum(-1)
        if call.max_count is not None:
            total = torch.minimum(total, number.clamp(min=call.max_count))
        return total, rank.neg().double().masked_fill(~chosen, float("-inf"))

    def _moved(self, call: CallSpec, query: Query, logits: Tensor, open_: Tensor) -> Tensor:
        """Calls in a row for which a position's prediction has not moved, `(b, L)`."""
        rows, bound = query.rows, call.max_kl
        if self.history is None or bound is None:
            still = torch.zeros_like(query.tokens)
        else:
            past, was = self.history[0][rows], self.history[2][rows]
            near = torch.cat(
                [moved(logits[p], past[p]) < bound for p in parts(len(logits), logits[0].numel())]
            )
            still = torch.where(near & was & open_, self.still[rows] + 1, 0)
        self.still[rows] = still
        return still

    def _draw(
        self,
        call: CallSpec,
        k: int,
        query: Query,
        logits: Tensor,
        where: Tensor,
        rank: Tensor,
        valid: Tensor,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens at `where`, and the prediction and law they come from."""
        rows, past = query.rows, None
        events, u = self.events[rows], self.chance[rows]
        when = events.gather(1, rank.clamp(max=events.shape[1] - 1)).clamp(min=0)
        free = self.free[rows].sum(-1)[:, None]
        place = when if self.schedule.variable == "time" else (free - rank) / free
        ahead = None
        if call.mode == "extrapolate" and self.history is not None:
            gap = place[:, :1] - self.history[1][rows]
            ahead = torch.where(gap < 0, (place - place[:, :1]) / gap, 0.0)
            past = self.history[0][rows]
        blocks = []
        for part in parts(len(where), where.shape[1] * logits.shape[-1]):
            mu, law = law_at(call, logits, where, ahead, past, part)
            require_proper(mu, law, valid[part], self.mask, k)
            drawn = draw(law, u[part].gather(1, where[part]))
            if self.remembers:
                sure = mu.gather(2, drawn[..., None])[..., 0]
                self._remember(rows, part, where, valid, sure)
            blocks.append((mu, law, drawn) if keep else (mu[:0], law[:0], drawn))
        if self.compares:
            self._record(rows, logits, place[:, :1])
        mu, law, drawn = (torch.cat(tensors) for tensors in zip(*blocks, strict=True))
        return mu, law, drawn

    def _remember(
        self, rows: slice | Tensor, part: slice, where: Tensor, valid: Tensor, sure: Tensor
    ) -> None:
        """Keep the probabilities of tokens drawn, for remasking by "drawn"."""
        kept = self.sure[rows]
        old = kept[part].gather(1, where[part])
        kept[part] = kept[part].scatter(1, where[part], torch.where(valid[part], sure, old))
        self.sure[rows] = kept

    def _record(self, rows: slice | Tensor, logits: Tensor, place: Tensor) -> None:
        """Keep a prediction for the next call, with its place and what was masked."""
        open_ = self.levels >= 0
        if isinstance(rows, slice):
            self.history = (logits, place, open_)
            return
        if self.history is None:
            blank = logits.new_zeros(len(self.tokens), *logits.shape[1:])
            self.history = (blank, place.new_zeros(len(blank), 1), torch.zeros_like(open_))
        fresh = (logits, place, open_[rows])
        pairs = zip(self.history, fresh, strict=True)
        full, spot, was = (old.index_copy(0, rows, new) for old, new in pairs)
        self.history = (full, spot, was)

    def _take_back(
        self, k: int, query: Query, taken: Tensor, open_: Tensor, logits: Tensor
    ) -> Tensor:
        """The positions that the call masks again, `(b, L)`."""
        call, rows = self.schedule.calls[k], query.rows
        if not call.remask:
            return torch.zeros_like(open_)
        mine = self._first_block(call, rows, open_) & ~open_
        if call.remask_by == "uniform":
            keys = self.u[rows, self.fresh[k]]
        elif call.remask_by == "drawn":
            keys = self.sure[rows]
        else:
            now = query.tokens.clamp(min=0)  # padding may be -1
            own = logits.gather(2, now[..., None])[..., 0].double()
            keys = own - logits.double().logsumexp(-1)
        rank = ranks(-keys.masked_fill(~mine, float("inf")))
        return mine & (rank < taken[:, None])


def _counts(schedule: MaskedSchedule, masked: Tensor, fit: bool) -> Tensor:
    """Counts per sequence and call, int64 `(B, C)`."""
    free = masked.sum(-1).tolist()
    if fit:
        rows = {n: schedule.fitted(n) for n in set(free)}
        return torch.tensor([rows[n] for n in free], device=masked.device)
    for b, n in enumerate(free):
        if n != schedule.length:
            raise ScheduleError(
                f"the counts sum to {schedule.length} but sequence {b} has {n} free positions: "
                "use a schedule of that length, or fit=True"
            )
    return torch.tensor(schedule.counts, device=masked.device).repeat(len(free), 1)


def _full(x: Tensor, rows: slice | Tensor, batch: int) -> Tensor:
    """Rows of a part of the batch at their places in the whole."""
    if isinstance(rows, slice) or not len(x):
        return x
    return x.new_zeros(batch, *x.shape[1:]).index_copy(0, rows, x)
