"""Masked language models that generate text, by the conventions of their families.

    denoiser = text_denoiser(model, "llada", tokenizer=tokenizer)
    new = generate(denoiser, input_ids, load_schedule("nfe08.json"), new_tokens=128)

The models are those of Hugging Face's hub, loaded by the user (their own code runs there, not
here). They differ in three things:

    family   mask                     logits of position l      further argument
    mdlm     last id of the vocabulary   at l                   timesteps, zero
    llada    config or tokenizer      at l                      -
    dream    config or tokenizer      at l - 1 (shifted)        -

Prompts of several lengths share a batch: each sequence is predicted as if it were alone, so its
result does not depend on its neighbours.

References:
    Sahoo et al. 2406.07524 (MDLM); Nie et al. 2502.09992 (LLaDA); Ye et al. 2508.15487 (Dream).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewstep.samplers.categorical import uniforms
from fewstep.samplers.masked import sample_masked
from fewstep.samplers.token_denoiser import SubsDenoiser, start_masked
from fewstep.space.errors import ModelError, ScheduleError

__all__ = ["Family", "generate", "text_denoiser"]

Family = Literal["mdlm", "llada", "dream"]
_PADDING = -1  # no token: whatever fills a prompt's tensor is told by the attention mask


def text_denoiser(
    model: Callable[..., Any],
    family: Family,
    *,
    tokenizer: Any = None,
    mask: int | None = None,
    ends: Sequence[int] | None = None,
    forbidden: Sequence[int] = (),
) -> SubsDenoiser:
    """A model of one of these families as a `TokenDenoiser`.

    Args:
        model: called with ids `(B, L)` by position (and `timesteps` if MDLM); returns logits
            `(B, L, V)` or an object that has them.
        family: "mdlm", "llada" or "dream".
        tokenizer: names the mask id and the ids that end a text.
        mask: the mask id, if neither the model's config nor the tokenizer names it.
        ends: ids that end a text, for schedules with `ends_last`; default the tokenizer's.
        forbidden: ids that must not be generated.

    Raises:
        ModelError: an unknown family, or no mask id.
    """
    if family not in get_args(Family):
        raise ModelError(f"family {family!r} is unknown: use one of {', '.join(get_args(Family))}")
    config = getattr(model, "config", None)
    known = [mask, *(getattr(source, "mask_token_id", None) for source in (config, tokenizer))]
    mask = next((i for i in known if i is not None), None)
    size = getattr(config, "vocab_size", None)
    if mask is None and family == "mdlm" and size is not None:
        mask = int(size) - 1
    if mask is None:
        raise ModelError("no mask token: give mask=, or a tokenizer that has one")
    if ends is None:
        end = getattr(tokenizer, "eos_token_id", None)
        ends = () if end is None else (end,)

    def asked(tokens: Tensor) -> Tensor:
        if family == "mdlm":
            zero = torch.zeros(len(tokens), device=tokens.device)
            answer = model(tokens, timesteps=zero)
        else:
            answer = model(tokens)
        logits: Tensor = getattr(answer, "logits", answer)
        if family == "dream":
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return logits

    length = getattr(config, "max_position_embeddings", None)
    return SubsDenoiser(
        asked, mask, length=length, forbidden=forbidden, ends=ends, padding=_PADDING
    )


def generate(
    denoiser: SubsDenoiser,
    prompts: Tensor | Sequence[Sequence[int]],
    schedule: Any,
    *,
    new_tokens: int | None = None,
    attention_mask: Tensor | None = None,
    hide_future: bool = False,
    seed: int = 0,
) -> Tensor:
    """Continue prompts.

    Args:
        denoiser: from `text_denoiser`.
        prompts: ids `(B, P)`, or B lists of different lengths.
        schedule: a `MaskedSchedule` for `new_tokens` tokens, or for blocks of an equal part of
            them, which are then decoded from left to right.
        new_tokens: tokens to generate; default the schedule's length.
        attention_mask: 0 where a tensor of prompts is padding, on whatever side.
        hide_future: whether the network does not see the masks of the blocks to come.
        seed: of the first sequence, the others count on: equal seeds are equal results, whatever
            the batch.

    Returns:
        The new ids, int64 `(B, new_tokens)`; what follows an end of text is not cut off.

    Raises:
        ScheduleError: a schedule of another kind, or whose length does not divide `new_tokens`.
        ModelError: sequences longer than the model.
    """
    kind = getattr(schedule, "kind", type(schedule).__name__)
    if kind != "masked":
        raise ScheduleError(f"a schedule of kind {kind!r} cannot unmask text: give a masked one")
    size = schedule.length if new_tokens is None else new_tokens
    if size < 1 or size % schedule.length:
        raise ScheduleError(
            f"the schedule decides {schedule.length} tokens, which does not divide new_tokens "
            f"{size}: use a multiple"
        )
    if size > schedule.length or hide_future:
        schedule = schedule.in_blocks(size // schedule.length, hide_future=hide_future)
    rows = _rows(prompts, attention_mask)
    width = max(map(len, rows)) + size
    device = rows[0].device
    tokens = start_masked(denoiser, len(rows), width, [r.tolist() for r in rows], free=size)
    u = torch.zeros(len(rows), schedule.uniforms, width, dtype=torch.float64)
    for b, row in enumerate(rows):
        end, generator = len(row) + size, torch.Generator().manual_seed(seed + b)
        u[b, :, :end] = uniforms(schedule.uniforms, end, generator=generator)
    done = sample_masked(schedule, denoiser, tokens.to(device), u=u.to(device))
    return torch.stack([done[b, len(row) : len(row) + size] for b, row in enumerate(rows)])


def _rows(prompts: Tensor | Sequence[Sequence[int]], real: Tensor | None) -> list[Tensor]:
    """Each prompt's own ids."""
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or (real is not None and real.shape != prompts.shape):
            raise ModelError("prompts must be (B, P), and attention_mask alike")
        keep = torch.ones_like(prompts) if real is None else real
        return [row[own.bool()] for row, own in zip(prompts, keep, strict=True)]
    if real is not None:
        raise ModelError("attention_mask says where a tensor is padded: lists need none")
    return [torch.as_tensor(row, dtype=torch.long) for row in prompts]
