"""Masked diffusion models behind one contract: tokens with masks in, logits out.

"SUBS" (Sahoo et al. 2406.07524, section 3.2.3): no probability on the mask token; visible tokens
carry over, because samplers never read their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.space.errors import ModelError

__all__ = [
    "CountedSequences",
    "SubsDenoiser",
    "TokenDenoiser",
    "from_hf_masked_lm",
    "from_subs",
    "start_masked",
]


@runtime_checkable
class TokenDenoiser(Protocol):
    """What a masked sampler may ask of a model.

    A model may also have `ends`, the ids that end a text: schedules with `ends_last` need them.
    """

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
        ends: ids that end a text, for schedules with `ends_last`.
        padding: id of what fills shorter sequences of a batch, before or after their tokens; it
            is not generated, and may be -1, which is no token. A sequence is then predicted as
            if it were alone: sequences that lie alike are cut to their tokens and predicted
            together, or
        attention: the model takes the keyword `attention_mask` (1 for tokens, 0 for padding) and
            does that itself.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        mask: int,
        *,
        length: int | None = None,
        forbidden: Sequence[int] = (),
        timed: bool = False,
        ends: Sequence[int] = (),
        padding: int | None = None,
        attention: bool = False,
    ) -> None:
        self.model, self.mask, self.length, self.timed = model, mask, length, timed
        self.ends, self.padding, self.attention = tuple(ends), padding, attention
        real = [] if padding is None or padding < 0 else [padding]
        self.barred = sorted({mask, *forbidden, *real})
        self.calls = 0
        self.sequences = 0

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Logits `(B, L, V)`; see `TokenDenoiser`.

        Raises:
            ModelError: the model returns another shape, or has no such mask id; padding between
                the tokens of a sequence.
        """
        self.calls += 1
        self.sequences += len(tokens)
        if self.padding is None or self.attention or not bool((tokens == self.padding).any()):
            return self._logits(tokens, t)
        result = None
        for rows, first, last in _spans(tokens != self.padding):
            part = self._logits(tokens[rows, first:last], t[rows])
            if result is None:
                result = part.new_zeros(*tokens.shape, part.shape[-1])
                result[..., self.barred] = float("-inf")
            result[rows, first:last] = part
        assert result is not None
        return result

    def _logits(self, tokens: Tensor, t: Tensor) -> Tensor:
        given = (tokens, t) if self.timed else (tokens,)
        if self.attention:
            mask = torch.ones_like(tokens) if self.padding is None else tokens != self.padding
            logits = self.model(*given, attention_mask=mask.long())
        else:
            logits = self.model(*given)
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


def _spans(real: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """Sequences whose tokens lie alike: their rows, first token and end."""
    count = real.sum(-1)
    first = real.long().argmax(-1)
    pairs = torch.stack([first, first + count], -1)
    for pair in pairs.unique(dim=0):
        a, b = pair.tolist()
        if not bool(real[(pairs == pair).all(-1), a:b].all()):
            raise ModelError(
                "padding lies between the tokens of a sequence: put it before or after"
            )
        yield (pairs == pair).all(-1).nonzero()[:, 0], a, b


class CountedSequences:
    """A `TokenDenoiser` that counts the sequences its model was asked for.

    Args:
        denoiser: the model.
    """

    def __init__(self, denoiser: TokenDenoiser) -> None:
        self.denoiser, self.sequences = denoiser, 0
        self.mask, self.length = denoiser.mask, denoiser.length
        self.ends = getattr(denoiser, "ends", ())

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        """The model's logits."""
        self.sequences += len(tokens)
        return self.denoiser(tokens, t)


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


def start_masked(
    denoiser: TokenDenoiser,
    batch: int,
    length: int,
    prompt: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    *,
    free: int | None = None,
) -> Tensor:
    """Sequences to complete: all mask, or a prompt followed by masks.

    Args:
        denoiser: names the mask id (and padding), the device is the prompt's.
        batch: number of sequences, >= 1.
        length: tokens per sequence, prompt included.
        prompt: ids of shape `(P,)` or `(B, P)`, or B lists of different lengths; the mask id
            inside a prompt is a free position.
        free: masks after each prompt, the rest is padding; None: masks up to `length`.

    Returns:
        int64 ids `(batch, length)`.

    Raises:
        ModelError: the sequence or the prompt is longer than the model takes; no padding id.
    """
    limit = denoiser.length
    if limit is not None and length > limit:
        raise ModelError(f"length {length} exceeds the model's {limit} positions")
    rows, device = _prompts(prompt, batch)
    tokens = torch.full((batch, length), denoiser.mask, device=device)
    padding = getattr(denoiser, "padding", None)
    for row, given in zip(tokens, rows, strict=True):
        end = length if free is None else len(given) + free
        if max(end, len(given)) > length:
            masks = "" if free is None else f" and {free} masks"
            raise ModelError(f"a prompt of {len(given)} tokens{masks} does not fit in {length}")
        if end < length and padding is None:
            raise ModelError(
                "sequences of different lengths need an id for padding: "
                "wrap the model with padding="
            )
        row[: len(given)] = given.to(row)
        row[end:] = 0 if padding is None else padding
    return tokens


def _prompts(
    prompt: Tensor | Sequence[int] | Sequence[Sequence[int]] | None, batch: int
) -> tuple[list[Tensor], torch.device]:
    """One prompt for each sequence, and where they lie."""
    if prompt is None:
        return [torch.empty(0, dtype=torch.long)] * batch, torch.device("cpu")
    if not isinstance(prompt, Tensor) and len(prompt) and not isinstance(prompt[0], int):
        rows = [torch.as_tensor(row, dtype=torch.long) for row in prompt]
    else:
        given = torch.as_tensor(prompt, dtype=torch.long)
        rows = [given] * batch if given.ndim == 1 else list(given)
    if len(rows) != batch:
        raise ModelError(f"{len(rows)} prompts for {batch} sequences: one for each is needed")
    return rows, rows[0].device
