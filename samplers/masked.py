"""The first-hitting sampler of masked diffusion: exact token by token, searched in parallel.

A masked diffusion model gives mu_l(x, t), the law of the token at masked position l given the
visible ones. Whether and when a position unmasks does not depend on the network: its level
1 - a(tau_l) is uniform below 1 - a(1). So the sampler draws one uniform level per free position,
visits positions by decreasing level, and asks the network once per event,

    x_l ~ Cat(mu_l(x, tau_l)),

which is the model's law exactly with as many calls as positions (Zheng et al. 2409.02908,
section 4.1). With several positions per call the calls are fewer and the law an approximation;
`fewstep.space.masked.MaskedSchedule` says how many, with which extrapolation, temperature and
order. All randomness is one tensor `u` of shape `(B, 2, L)`: levels and token draws, float64 and
per sequence, so equal `u` gives equal samples whatever the batch size, and schedules can be
compared on the same draws. Tokens are drawn in float64 (`samplers.categorical`).

References:
    Zheng et al. 2409.02908 (first hitting, section 4; extrapolation, section 4.3);
    Sahoo et al. 2406.07524, section 3.2.3 (SUBS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.samplers.categorical import draw, uniforms
from fewstep.space.errors import ModelError, ScheduleError
from fewstep.space.masked import CallSpec, MaskedSchedule

__all__ = [
    "MaskedProgress",
    "SubsDenoiser",
    "TokenDenoiser",
    "anneal",
    "from_hf_masked_lm",
    "from_subs",
    "sample_masked",
    "start_masked",
    "uniforms",
]

_CHUNK = 1 << 24  # elements of a float64 block of rows


@runtime_checkable
class TokenDenoiser(Protocol):
    """What a masked sampler may ask of a model."""

    mask: int
    """Id of the mask token."""
    length: int | None
    """Longest sequence, None if there is no limit."""

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Logits of the clean tokens.

        Args:
            tokens: int64 ids, shape `(B, L)`; `mask` where unknown.
            t: float64 times in (0, 1], shape `(B,)`; a time-free network ignores them.

        Returns:
            Logits of shape `(B, L, V)`, any float type, with **-inf at the mask id**; rows of
            visible positions are not read.
        """
        ...


class SubsDenoiser:
    """A network's raw logits as a `TokenDenoiser`, calls counted.

    "SUBS": the mask token and every forbidden token get logit -inf. Visible positions need no
    treatment because samplers never read their rows.

    Args:
        model: tokens `(B, L)` [and times `(B,)`] to logits `(B, L, V)`.
        mask: id of the mask token, 0..V-1.
        length: longest sequence, None for no limit.
        forbidden: other ids that must not be generated.
        timed: whether the model takes the times as a second argument.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        mask: int,
        *,
        length: int | None = None,
        forbidden: Sequence[int] = (),
        timed: bool = False,
    ) -> None:
        self.model, self.mask, self.length, self.timed = model, mask, length, timed
        self.barred = sorted({mask, *forbidden})
        self.calls = 0
        self.sequences = 0

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Logits `(B, L, V)`; see `TokenDenoiser`.

        Raises:
            ModelError: the model returns another shape, or has no such mask id.
        """
        self.calls += 1
        self.sequences += len(tokens)
        logits = self.model(tokens, t) if self.timed else self.model(tokens)
        logits = getattr(logits, "logits", logits)
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            shapes = f"{tuple(logits.shape)} for tokens {tuple(tokens.shape)}"
            raise ModelError(f"the network returned logits {shapes}; (B, L, V) is needed")
        if not all(0 <= i < logits.shape[2] for i in self.barred):
            ids = f"{self.barred} outside a vocabulary of {logits.shape[2]}"
            raise ModelError(f"mask or forbidden ids {ids}")
        barred = torch.tensor(self.barred, device=logits.device)
        result: Tensor = logits.index_fill(2, barred, float("-inf"))
        return result


def from_subs(model: Callable[..., Any], mask: int, **options: Any) -> SubsDenoiser:
    """A `TokenDenoiser` from an MDLM-style network; options as for `SubsDenoiser`."""
    return SubsDenoiser(model, mask, **options)


def from_hf_masked_lm(
    model: Any,
    tokenizer: Any = None,
    *,
    mask: int | None = None,
    forbidden: Sequence[int] | None = None,
) -> SubsDenoiser:
    """A `TokenDenoiser` from a Hugging Face masked language model (`AutoModelForMaskedLM`).

    Args:
        model: called with `input_ids`; returns an object with `.logits`.
        tokenizer: names the mask id and the special ids that must not be generated; or
        mask: the mask id, and
        forbidden: ids that must not be generated (default: the tokenizer's special ids).

    Raises:
        ModelError: neither a tokenizer with a mask token nor `mask` is given.
    """
    if mask is None:
        mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise ModelError("no mask token: give a tokenizer that has one, or mask=")
    if forbidden is None:
        forbidden = tuple(getattr(tokenizer, "all_special_ids", ()))
    length = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return SubsDenoiser(
        lambda tokens: model(input_ids=tokens), mask, length=length, forbidden=forbidden
    )


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
    """

    call: int
    t: Tensor
    tokens: Tensor
    positions: Tensor
    valid: Tensor
    mu: Tensor
    law: Tensor
    drawn: Tensor


def start_masked(
    denoiser: TokenDenoiser,
    batch: int,
    length: int,
    prompt: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Sequences to complete: all mask, or a prompt followed by masks.

    Args:
        denoiser: names the mask id, the device is the prompt's.
        batch: number of sequences, >= 1.
        length: tokens per sequence, prompt included.
        prompt: ids of shape `(P,)` or `(B, P)`; the mask id inside a prompt is a free position.

    Returns:
        int64 ids `(batch, length)`.

    Raises:
        ModelError: the sequence or the prompt is longer than the model takes.
    """
    limit = denoiser.length
    if limit is not None and length > limit:
        raise ModelError(f"length {length} exceeds the model's {limit} positions")
    given = torch.empty(0, dtype=torch.long) if prompt is None else torch.as_tensor(prompt)
    if given.shape[-1] > length:
        raise ModelError(f"a prompt of {given.shape[-1]} tokens does not fit in {length}")
    tokens = torch.full((batch, length), denoiser.mask, device=given.device)
    tokens[:, : given.shape[-1]] = given
    return tokens


@torch.no_grad()
def sample_masked(
    schedule: MaskedSchedule,
    denoiser: TokenDenoiser,
    tokens: Tensor,
    *,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
    fit: bool = False,
    callback: Callable[[MaskedProgress], None] | None = None,
) -> Tensor:
    """Complete sequences.

    Args:
        schedule: its counts sum to the number of masks of every sequence.
        denoiser: the model.
        tokens: int64 ids `(B, L)`, `denoiser.mask` where a token is wanted; others stay.
        u: float64 uniforms in [0, 1), `(B, 2, L)`; drawn from `generator` if None.
        generator: source of `u`.
        fit: rescale the counts to each sequence's number of masks instead of raising; then
            sequences of one batch may have different prompts.
        callback: called after every network call.

    Returns:
        int64 ids `(B, L)` without masks. Network calls: `schedule.nfe`, or fewer with `fit`
        where no sequence has a token left for a call.

    Raises:
        ScheduleError: the counts do not sum to the free positions.
        ModelError: sequences longer than the model; logits with NaN or that allow the mask.
    """
    for progress in _steps(
        schedule, denoiser, tokens, u, generator, fit=fit, keep=callback is not None
    ):
        tokens = progress.tokens
        if callback is not None:
            callback(progress)
    return tokens.clone()


def anneal(
    schedule: MaskedSchedule,
    denoiser: TokenDenoiser,
    tokens: Tensor,
    *,
    power: float,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted samples of P(x)^b / Z, P the model's law: exact for any temperatures.

    The proposal draws v ~ p^{b_k} / Z_{b_k} with b_k = 1 / T_k of call k; each draw adds
    (b - b_k) log p_v + log Z_{b_k} to the log-weight. P is a product of conditionals along any
    decoding order, so the order cancels and the weighted sample targets P^b for any b_k.

    Args:
        schedule: counts of one, uniform positions, top_p 1; its temperatures are 1 / b_k.
        denoiser: the model.
        tokens: as for `sample_masked`.
        power: b > 0.
        u: as for `sample_masked`.
        generator: as for `sample_masked`.

    Returns:
        int64 ids `(B, L)` and float64 log-weights `(B,)`, unnormalised.

    Raises:
        ScheduleError: another schedule than that, or power <= 0.
    """
    if not power > 0:
        raise ScheduleError(f"power {power} must be positive")
    for k, call in enumerate(schedule.calls):
        if call.count != 1 or call.positions != "uniform" or call.top_p != 1:
            raise ScheduleError(f"call {k}: annealing needs count 1, uniform positions, top_p 1")
    weights = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)

    def weigh(progress: MaskedProgress) -> None:
        inverse = 1 / schedule.calls[progress.call].temperature
        mu = progress.mu[:, 0]
        chosen = mu.gather(1, progress.drawn).log()[:, 0]
        weights.add_((power - inverse) * chosen + mu.pow(inverse).sum(-1).log())

    done = sample_masked(schedule, denoiser, tokens, u=u, generator=generator, callback=weigh)
    return done, weights


def _steps(
    schedule: MaskedSchedule,
    denoiser: TokenDenoiser,
    tokens: Tensor,
    u: Tensor | None,
    generator: torch.Generator | None,
    *,
    fit: bool,
    keep: bool,
) -> Iterator[MaskedProgress]:
    """The loop: one network call, then the tokens it decides; laws are kept for callbacks only."""
    batch, length = tokens.shape
    if denoiser.length is not None and length > denoiser.length:
        raise ModelError(f"length {length} exceeds the model's {denoiser.length} positions")
    masked = tokens == denoiser.mask
    counts = _counts(schedule, masked, fit)
    if u is None:
        u = uniforms(batch, 2, length, generator=generator, device=tokens.device)
    if u.shape != (batch, 2, length) or u.dtype != torch.float64:
        raise ScheduleError(f"u must be float64 of shape {(batch, 2, length)}")
    levels = torch.where(masked, u[:, 0], -1.0)
    events = schedule.noise.time(levels.sort(-1, descending=True).values)
    free, done = masked.sum(-1), torch.zeros_like(counts[:, 0])
    tokens = tokens.clone()
    history: tuple[Tensor, Tensor] | None = None
    for k, call in enumerate(schedule.calls):
        count = counts[:, k]
        width = int(count.max())
        if width == 0:
            continue
        rank = done[:, None] + torch.arange(width, device=tokens.device)
        valid = rank < (done + count)[:, None]
        when = events.gather(1, rank.clamp(max=length - 1)).clamp(min=0)
        logits = denoiser(tokens, when[:, 0].clamp(min=torch.finfo(torch.float64).tiny))
        order = levels if call.positions == "uniform" else _confidence(logits, levels)
        where = order.topk(width, dim=-1).indices
        place = when if schedule.variable == "time" else (free[:, None] - rank) / free[:, None]
        ahead = None
        if call.mode == "extrapolate" and history is not None:
            gap = (place[:, :1] - history[1]).where(count[:, None] > 0, torch.inf)
            ahead = torch.where(gap < 0, (place - place[:, :1]) / gap, 0.0)
        past = None if history is None else history[0]
        blocks = []
        for part in _parts(batch, width * logits.shape[-1]):
            mu, law = _law(call, logits, where, ahead, past, part)
            _require_proper(mu, law, valid[part], denoiser.mask, k)
            drawn = draw(law, u[part, 1].gather(1, where[part]))
            blocks.append((mu, law, drawn) if keep else (mu[:0], law[:0], drawn))
        mu, law, drawn = (torch.cat(tensors) for tensors in zip(*blocks, strict=True))
        tokens = tokens.scatter(1, where, torch.where(valid, drawn, tokens.gather(1, where)))
        levels = levels.scatter(1, where, torch.where(valid, -1.0, levels.gather(1, where)))
        history, done = (logits, place[:, :1]), done + count
        yield MaskedProgress(k, when[:, 0], tokens, where, valid, mu, law, drawn)


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


def _confidence(logits: Tensor, levels: Tensor) -> Tensor:
    """Largest log-probability of every masked position, -inf at the visible ones, `(B, L)`."""
    best = logits.amax(-1).float() - logits.float().logsumexp(-1)
    return best.masked_fill(levels < 0, float("-inf"))


def _parts(batch: int, row: int) -> Iterator[slice]:
    """Slices of the batch whose float64 rows stay below a block's size."""
    size = max(1, _CHUNK // row)
    return (slice(i, i + size) for i in range(0, batch, size))


def _law(
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
    if call.temperature != 1:
        law = (law.log() / call.temperature).softmax(-1)
    if call.top_p != 1:
        ranked, order = law.sort(-1, descending=True)
        kept = ranked.cumsum(-1) - ranked < call.top_p
        law = torch.zeros_like(law).scatter(-1, order, ranked * kept)
        law = law / law.sum(-1, keepdim=True)
    return mu, law


def _require_proper(mu: Tensor, law: Tensor, valid: Tensor, mask: int, call: int) -> None:
    """Refuse logits with NaN, without any token, or that allow the mask."""
    if bool((mu.isnan().any(-1) & valid).any()):
        raise ModelError(f"call {call}: the logits hold NaN, or forbid every token")
    if bool(((law[..., mask] > 0) & valid).any()):
        raise ModelError(f"call {call}: the logits allow the mask token: wrap with from_subs")
