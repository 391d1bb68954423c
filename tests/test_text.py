"""Text models by the conventions of their families, and prompts of several lengths."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fewstep.samplers.masked import sample_masked
from fewstep.samplers.text import generate, text_denoiser
from fewstep.samplers.token_denoiser import start_masked
from fewstep.space import ModelError, ScheduleError
from fewstep.space.masked import MaskedSchedule

VOCABULARY, MASK, END = 9, 8, 7


class Tiny:
    """Logits that depend on the sequence's own tokens and length, like a network's."""

    def __init__(self, family: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
        self.family, self.config = family, SimpleNamespace(vocab_size=VOCABULARY)
        self.seen: list[Tensor] = []
        if family != "mdlm":
            self.config.mask_token_id = MASK

    def plain(self, tokens: Tensor) -> Tensor:
        h = self.table[tokens]
        return h + h.mean(1, keepdim=True) + h.roll(1, 1)

    def __call__(self, tokens: Tensor, **given: Tensor) -> SimpleNamespace:
        assert set(given) == ({"timesteps"} if self.family == "mdlm" else set())
        self.seen.append(tokens)
        logits = self.plain(tokens)
        if self.family == "dream":  # the answer for position l stands at l - 1
            logits = torch.cat([logits[:, 1:], logits[:, :1] + 9], 1)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("family", ["mdlm", "llada", "dream"])
def test_each_family_is_asked_and_read_by_its_convention(family: str) -> None:
    model = Tiny(family)
    denoiser = text_denoiser(model, family)
    assert denoiser.mask == MASK
    tokens = torch.tensor([[1, 2, MASK, MASK]])
    logits, plain = denoiser(tokens, torch.ones(1)), model.plain(tokens)
    assert torch.equal(logits[:, 1:, :MASK], plain[:, 1:, :MASK])
    assert bool((logits[..., MASK] == -torch.inf).all())
    schedule = MaskedSchedule.from_counts((1, 2, 1), positions="drawn", temperature=0)
    new = generate(denoiser, torch.tensor([[1, 2, 3]]), schedule)
    start = start_masked(denoiser, 1, 7, [1, 2, 3])
    assert torch.equal(sample_masked(schedule, denoiser, start)[:, 3:], new)


def test_a_prompt_does_not_know_its_neighbours_nor_its_padding() -> None:
    denoiser = text_denoiser(Tiny("llada"), "llada", ends=(END,))
    schedule = MaskedSchedule.from_counts(
        (1, 2, 1), positions="drawn", min_confidence=0.5, ends_last=True, remask=0.3
    )
    prompts = [[1, 2, 3], [4], [5, 6, 0, 1, 2]]
    together = generate(denoiser, prompts, schedule, new_tokens=12, seed=5)
    assert together.shape == (3, 12)
    assert not bool((together == MASK).any())
    for b, prompt in enumerate(prompts):
        alone = generate(denoiser, [prompt], schedule, new_tokens=12, seed=5 + b)
        assert torch.equal(alone[0], together[b])
    left = torch.tensor([[0, 0, 1, 2, 3], [0, 0, 0, 0, 4], [5, 6, 0, 1, 2]])
    real = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    padded = generate(denoiser, left, schedule, new_tokens=12, attention_mask=real, seed=5)
    assert torch.equal(padded, together)


def test_blocks_are_generated_from_left_to_right_and_the_future_may_be_hidden() -> None:
    schedule = MaskedSchedule.from_counts((1, 3), positions="drawn", temperature=0)
    for hide in (False, True):
        model = Tiny("llada")
        generate(
            text_denoiser(model, "llada"), [[1, 2]], schedule, new_tokens=12, hide_future=hide
        )
        widths = [tokens.shape[1] for tokens in model.seen]
        assert widths == ([6, 6, 10, 10, 14, 14] if hide else [14] * 6)
        masks = [int((tokens[:, :6] == MASK).sum()) for tokens in model.seen]
        assert masks == [4, 3, 0, 0, 0, 0]


def test_what_cannot_be_generated_is_said_in_one_line() -> None:
    denoiser = text_denoiser(Tiny("llada"), "llada")
    schedule = MaskedSchedule.from_counts((2, 2))
    for make, error, match in (
        (lambda: text_denoiser(Tiny("llada"), "gpt"), ModelError, "family 'gpt' is unknown"),
        (lambda: text_denoiser(lambda x: x, "dream"), ModelError, "no mask token"),
        (lambda: generate(denoiser, [[1]], schedule, new_tokens=6), ScheduleError, "4 tokens"),
        (lambda: generate(denoiser, [[1]], {"kind": "ode"}), ScheduleError, "'dict' cannot"),
        (
            lambda: generate(denoiser, [[1]], schedule, attention_mask=torch.ones(1, 1)),
            ModelError, "lists need none",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=match) as caught:
            make()
        assert "\n" not in str(caught.value)
