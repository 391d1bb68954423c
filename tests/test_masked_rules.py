"""How a call chooses positions and how many: first hitting where neutral, else by definition."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fewstep.samplers.categorical import draw, uniforms
from fewstep.samplers.masked import MaskedProgress, anneal, sample_masked
from fewstep.samplers.token_denoiser import CountedSequences, from_subs, start_masked
from fewstep.space import ModelError, ScheduleError
from fewstep.space.masked import CallSpec, MaskedSchedule
from tests.masked_toys import JOINT, LENGTH, MASK, TableModel, blank, table_denoiser, variation


def plain(schedule: MaskedSchedule, denoiser, tokens: Tensor, u: Tensor) -> Tensor:
    """First hitting as published, one sequence and one token after the other."""
    done = tokens.clone()
    for b in range(len(tokens)):
        free = (tokens[b] == denoiser.mask).nonzero()[:, 0].tolist()
        order = sorted(free, key=lambda i: -float(u[b, 0, i]))
        times, decided, past = [float(u[b, 0, i]) for i in order], 0, None
        for call in schedule.calls:
            logits = denoiser(done[b : b + 1], torch.tensor([times[decided]], dtype=torch.float64))
            mu = logits[0].double().softmax(-1)
            if call.positions == "confidence":
                left = [i for i in free if done[b, i] == denoiser.mask]
                chosen = sorted(left, key=lambda i: -float(mu[i].max()))[: call.count]
            else:
                chosen = [i for i in order if done[b, i] == denoiser.mask][: call.count]
            for n, i in enumerate(chosen):
                law = mu[i]
                if call.mode == "extrapolate" and past is not None and n:
                    slope = (times[decided + n] - times[decided]) / (times[decided] - past[1])
                    law = (law + slope * (law - past[0][i])).clamp(min=0)
                    law = law / law.sum()
                law = law ** (1 / call.temperature)
                law = law / law.sum()
                if call.top_p < 1:
                    ranked, index = law.sort(descending=True)
                    law = torch.zeros_like(law)
                    law[index] = ranked * (ranked.cumsum(0) - ranked < call.top_p)
                done[b, i] = draw((law / law.sum())[None], u[b, 1, i : i + 1])[0]
            past = (mu, times[decided])
            decided += call.count
    return done


CALLS = {
    "law": {},
    "cold": {"temperature": 0.6, "top_p": 0.9},
    "sure": {"positions": "confidence"},
    "line": {"mode": "extrapolate"},
}
NEUTRAL = CallSpec().model_dump() | {"kl_window": 3, "max_kl": 0.5, "max_count": 9}


@pytest.mark.parametrize("name", CALLS)
def test_neutral_values_are_first_hitting_as_published_bit_for_bit(name: str) -> None:
    schedule = MaskedSchedule.from_counts((1, 2, 1), **CALLS[name])
    u = uniforms(300, 2, LENGTH, generator=torch.Generator().manual_seed(5))
    denoiser = table_denoiser()
    found = sample_masked(schedule, denoiser, blank(300), u=u)
    assert torch.equal(found, plain(schedule, denoiser, blank(300), u))
    said = NEUTRAL | {k: v for k, v in CALLS[name].items()}
    spoken = MaskedSchedule(
        length=LENGTH,
        calls=[CallSpec(**said | {"count": c.count, "mode": c.mode}) for c in schedule.calls],
        ahead="stop",
    )
    assert torch.equal(found, sample_masked(spoken, denoiser, blank(300), u=u))
    assert spoken.digest == schedule.digest
    whole = spoken.model_copy(
        update={"calls": [c.model_copy(update={"block": LENGTH}) for c in spoken.calls]}
    )
    assert torch.equal(found, sample_masked(whole, denoiser, blank(300), u=u))


# --- exact where the order depends on visible tokens only --------------------------------------


@pytest.mark.parametrize(
    "choices",
    [
        {"positions": "confidence"},
        {"positions": "margin"},
        {"positions": "entropy"},
        {"block": 1},
        {"block": 2},
        {"block": 3, "positions": "entropy"},
    ],
)
def test_token_by_token_in_any_order_of_the_visible_is_exact(choices) -> None:
    schedule = MaskedSchedule.from_counts([1] * LENGTH, **choices)
    generator = torch.Generator().manual_seed(0)
    samples = sample_masked(schedule, table_denoiser(), blank(200_000), generator=generator)
    assert variation(samples, JOINT) < 0.01


def test_an_order_by_what_was_drawn_is_not_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for choices in ({"positions": "drawn"}, {"ends_last": True}):
        schedule = MaskedSchedule.from_counts([1] * LENGTH, **choices)
        denoiser = from_subs(TableModel(JOINT), MASK, ends=(0,))
        samples = sample_masked(schedule, denoiser, blank(200_000), generator=generator)
        assert variation(samples, JOINT) > 0.03


class Prefixes:
    """Exact conditionals of the first n positions, for every n."""

    def __init__(self, joint: Tensor) -> None:
        self.tables = {}
        for n in range(1, joint.ndim + 1):
            self.tables[n] = TableModel(joint.sum(list(range(n, joint.ndim))) if n < joint.ndim
                                        else joint)  # fmt: skip
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.asked.append(tuple(tokens.shape))
        return self.tables[tokens.shape[1]](tokens)


def test_a_hidden_future_is_cut_off_and_blocks_of_one_stay_exact() -> None:
    model = Prefixes(JOINT)
    schedule = MaskedSchedule.from_counts([1] * LENGTH, block=1, hide_future=True)
    generator = torch.Generator().manual_seed(0)
    samples = sample_masked(schedule, from_subs(model, MASK), blank(200_000), generator=generator)
    assert [shape[1] for shape in model.asked] == [1, 2, 3, 4]
    assert variation(samples, JOINT) < 0.01
    model.asked.clear()
    ragged = torch.tensor([[0, MASK, MASK, MASK], [MASK, MASK, MASK, MASK]])
    two = MaskedSchedule.from_counts([1, 1, 2], block=2, hide_future=True)
    sample_masked(two, from_subs(model, MASK), ragged, fit=True)
    assert (1, 3) in model.asked  # the second of its free positions ends the first block
    assert (1, 2) in model.asked


def test_a_bound_on_certain_tokens_saves_calls_and_loses_nothing() -> None:
    """The second token repeats the first, and the fourth the third."""
    pair = torch.tensor([[0.4, 0.1], [0.2, 0.3]], dtype=torch.float64)
    joint = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    for a, b in itertools.product(range(2), repeat=2):
        joint[a, a, b, b] = pair[a, b]
    for bound in ({"min_confidence": 0.999}, {"max_entropy": 1e-6}):
        for ahead in ("stop", "spread"):
            schedule = MaskedSchedule.from_counts([1] * 4, **bound)
            schedule = schedule.model_copy(update={"ahead": ahead})
            denoiser = CountedSequences(table_denoiser(joint))
            generator = torch.Generator().manual_seed(0)
            samples = sample_masked(schedule, denoiser, blank(100_000, 4, 2), generator=generator)
            assert variation(samples, joint) < 0.01
            # a call that decides one token is followed by one that decides its copy too
            assert denoiser.sequences / 100_000 < 3.4
    never = MaskedSchedule.from_counts([1] * 4, min_confidence=0.999, max_kl=1e-9)
    counted = CountedSequences(table_denoiser(joint))
    sample_masked(never, counted, blank(1000, 4, 2))
    assert counted.sequences > 3000


# --- the rules, against their definitions ------------------------------------------------------

VOCABULARY = 7


def frozen(length: int = 6, seed: int = 1):
    """A model whose prediction does not depend on the tokens, and its probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(length, VOCABULARY, generator=generator, dtype=torch.float64)
    logits[:, -1] = -math.inf
    model = from_subs(lambda x: logits[: x.shape[1]].expand(len(x), -1, -1), VOCABULARY - 1)
    return model, logits.softmax(-1)


def decided(schedule, denoiser, tokens, u=None, seed=0) -> list[list[int]]:
    """Positions that each call decides in the first sequence, in their order."""
    seen: list[MaskedProgress] = []
    generator = torch.Generator().manual_seed(seed)
    sample_masked(schedule, denoiser, tokens, u=u, generator=generator, callback=seen.append)
    return [p.positions[0][p.valid[0]].tolist() for p in seen]


def test_positions_come_in_the_order_of_their_rule() -> None:
    denoiser, mu = frozen()
    top = mu.sort(-1, descending=True).values
    scores = {
        "confidence": top[:, 0],
        "margin": top[:, 0] - top[:, 1],
        "entropy": -torch.special.entr(mu).sum(-1),
    }
    u = uniforms(1, 2, 6, generator=torch.Generator().manual_seed(2))
    drawn = draw(mu, u[0, 1])
    scores["drawn"] = mu.gather(1, drawn[:, None])[:, 0]
    for name, score in scores.items():
        schedule = MaskedSchedule.from_counts((1, 2, 3), positions=name)
        order = decided(schedule, denoiser, blank(1, 6, 6), u)
        assert list(itertools.chain(*order)) == score.argsort(descending=True).tolist()
        assert [len(part) for part in order] == [1, 2, 3]


def test_temperature_zero_takes_the_most_probable_token() -> None:
    denoiser, mu = frozen()
    schedule = MaskedSchedule.from_counts((2, 4), temperature=0, positions="drawn")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        done = sample_masked(schedule, denoiser, blank(2, 6, 6), generator=generator)
        assert torch.equal(done, mu.argmax(-1).expand(2, -1))
    with pytest.raises(ScheduleError, match="a temperature above 0"):
        anneal(MaskedSchedule.from_counts([1], temperature=0), denoiser, blank(1, 1, 6), power=2)


def test_bounds_let_through_what_their_definitions_say() -> None:
    denoiser, mu = frozen()
    confidence, entropy = mu.max(-1).values, torch.special.entr(mu).sum(-1)
    tau = float(confidence.sort().values[2:4].mean())  # no position's own, to the last bit
    first = decided(
        MaskedSchedule.from_counts((1, 5), positions="confidence", min_confidence=tau),
        denoiser, blank(1, 6, 6),
    )[0]  # fmt: skip
    assert set(first) == set((confidence > tau).nonzero()[:, 0].tolist())
    assert len(first) > 1
    order = entropy.argsort().tolist()
    for bound in (0.2, 0.8, 1.5):
        size = max(
            n for n in range(1, 7) if n == 1 or float(entropy[order[: n - 1]].sum()) < bound
        )
        schedule = MaskedSchedule.from_counts((1, 5), positions="entropy", max_entropy=bound)
        assert decided(schedule, denoiser, blank(1, 6, 6))[0] == order[:size]
    call = CallSpec(positions="confidence", min_confidence=0.0, max_count=3)
    few = MaskedSchedule(length=6, calls=[call, CallSpec(count=5)])
    best = confidence.argsort(descending=True)[:3].tolist()
    assert decided(few, denoiser, blank(1, 6, 6))[0] == best


def test_a_kl_window_waits_until_predictions_stand_still() -> None:
    denoiser, _ = frozen()
    choices = {"positions": "confidence", "min_confidence": 0.0, "max_kl": 1e-6}
    for window in (1, 2, 3):
        schedule = MaskedSchedule.from_counts([1] * 6, kl_window=window, **choices)
        sizes = [len(p) for p in decided(schedule, denoiser, blank(1, 6, 6))]
        assert sizes == [1] * window + [6 - window]
    moving = from_subs(
        lambda x: torch.nn.functional.one_hot((x == 6).sum(-1) % 6, VOCABULARY)[:, None]
        .expand(-1, x.shape[1], -1).double(), 6,
    )  # fmt: skip
    schedule = MaskedSchedule.from_counts([1] * 6, **choices)
    assert [len(p) for p in decided(schedule, moving, blank(1, 6, 6))] == [1] * 6


def test_what_a_bound_runs_ahead_is_spread_over_the_calls_left_or_ends_them() -> None:
    denoiser, mu = frozen(12)
    tau = float(mu.max(-1).values.sort().values[6]) + 1e-6  # five positions are above
    calls = [CallSpec(count=3, positions="confidence", min_confidence=tau)]
    calls += [CallSpec(count=3, positions="confidence")] * 3
    sizes = {}
    for ahead in ("spread", "stop"):
        schedule = MaskedSchedule(length=12, calls=calls, ahead=ahead)
        sizes[ahead] = [len(p) for p in decided(schedule, denoiser, blank(1, 12, 6))]
    assert sizes == {"spread": [5, 2, 2, 3], "stop": [5, 3, 3, 1]}
    more = CallSpec(count=3, positions="confidence", min_confidence=0.0)
    counted = CountedSequences(denoiser)
    sample_masked(MaskedSchedule(length=12, calls=[more] * 4), counted, blank(5, 12, 6))
    assert counted.sequences == 5


def test_blocks_are_decided_from_left_to_right() -> None:
    denoiser, mu = frozen(12)
    schedule = MaskedSchedule.from_counts((2, 2, 5, 3), block=4, positions="confidence")
    order = decided(schedule, denoiser, blank(1, 12, 6))
    assert [{i // 4 for i in part} for part in order] == [{0}, {0}, {1, 2}, {2}]
    assert order[2][:4] == sorted(order[2][:4], key=lambda i: -float(mu[i].max()))
    prompt = start_masked(denoiser, 1, 12, prompt=[0, 6, 1, 6])
    assert decided(MaskedSchedule.from_counts((3, 7), block=3), denoiser, prompt)[0] != []
    first = decided(MaskedSchedule.from_counts((3, 7), block=3), denoiser, prompt)[0]
    assert set(first) == {1, 3, 4}  # the first three free ones
    eager = MaskedSchedule.from_counts([1] * 12, block=4, min_confidence=0.0)
    assert [len(p) for p in decided(eager, denoiser, blank(1, 12, 6))] == [4, 4, 4]


def test_a_schedule_repeats_in_blocks() -> None:
    denoiser, _ = frozen(12)
    one = MaskedSchedule.from_counts((1, 3), positions="confidence")
    three = one.in_blocks(3, hide_future=True)
    assert (three.length, three.nfe) == (12, 6)
    order = decided(three, denoiser, blank(1, 12, 6))
    assert [{i // 4 for i in part} for part in order] == [{0}, {0}, {1}, {1}, {2}, {2}]


def test_ends_of_text_are_decided_last() -> None:
    logits = torch.full((4, 5), -5.0)
    logits[[0, 1, 2, 3], [3, 0, 3, 1]] = torch.tensor([9.0, 1.0, 5.0, 0.5])
    model = lambda x: logits[: x.shape[1]].expand(len(x), -1, -1)  # noqa: E731
    schedule = MaskedSchedule.from_counts(
        [1] * 4, positions="confidence", temperature=0, ends_last=True
    )
    order = decided(schedule, from_subs(model, 4, ends=(3,)), blank(1, 4, 4))
    assert order == [[1], [3], [0], [2]]
    with pytest.raises(ScheduleError, match="give the denoiser ends="):
        sample_masked(schedule, from_subs(model, 4), blank(1, 4, 4))


# --- remasking ---------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["uniform", "drawn", "current"])
def test_remasking_keeps_the_counts_and_spares_the_prompt(by: str) -> None:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
    denoiser = from_subs(lambda x: table[x] + table[x.roll(1, 1)], VOCABULARY - 1)
    tokens = blank(50, 10, 6)
    tokens[:, :2] = 1
    calls = [CallSpec(count=2, remask=0.5, remask_by=by) for _ in range(4)]
    schedule = MaskedSchedule(length=8, calls=calls)
    seen: list[MaskedProgress] = []
    done = sample_masked(schedule, denoiser, tokens, generator=generator, callback=seen.append)
    assert schedule.uniforms == 14
    assert [int((p.tokens == 6).sum()) for p in seen] == [300, 200, 100, 0]
    assert [p.remasked.sum(-1).unique().tolist() for p in seen] == [[0], [1], [2], [0]]
    assert [p.valid.sum(-1).unique().tolist() for p in seen] == [[2], [3], [4], [2]]
    assert not bool(torch.stack([p.remasked for p in seen])[..., :2].any())
    assert bool((done[:, :2] == 1).all())
    assert bool((done != 6).all())


def test_remasking_takes_back_what_its_rule_says() -> None:
    denoiser, mu = frozen(8)
    for by in ("drawn", "current"):
        schedule = MaskedSchedule.from_counts((4, 2, 2), remask=0.5, remask_by=by)
        seen: list[MaskedProgress] = []
        sample_masked(schedule, denoiser, blank(20, 8, 6), callback=seen.append)
        for b in range(20):
            tokens = seen[0].tokens[b]
            visible = (tokens != 6).nonzero()[:, 0]
            chance = mu[visible, tokens[visible]]
            worst = visible[chance.argsort()[:2]]
            assert set(seen[1].remasked[b].nonzero()[:, 0].tolist()) == set(worst.tolist())
    many = MaskedSchedule.from_counts((4, 2, 2), remask=0.5)
    seen = []
    sample_masked(many, denoiser, blank(20_000, 8, 6), callback=seen.append)
    share = seen[1].remasked.double().mean(0)
    assert float((share - 2 / 8).abs().max()) < 0.015


def test_remasked_positions_are_drawn_anew_from_the_law() -> None:
    row = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    denoiser = from_subs(lambda x: row.log().expand(*x.shape, 4), 3)
    schedule = MaskedSchedule.from_counts((3, 2, 1), remask=0.6)
    samples = sample_masked(schedule, denoiser, blank(60_000, 6, 3))
    share = torch.bincount(samples.flatten(), minlength=4) / samples.numel()
    assert float((share - row).abs().max()) < 0.005


# --- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices",
    [
        {"min_confidence": 0.5, "positions": "drawn"},
        {"max_entropy": 1.0, "positions": "entropy", "max_kl": 0.5},
        {"remask": 0.4, "block": 3},
        {"mode": "extrapolate", "min_confidence": 0.6},
        {"block": 2, "hide_future": True},
    ],
)
def test_a_sequence_does_not_depend_on_its_neighbours(choices) -> None:
    """Prompts of several lengths, padded, against each alone and cut."""
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(VOCABULARY + 1, VOCABULARY + 1, generator=generator, dtype=torch.float64)

    def model(tokens: Tensor) -> Tensor:
        return 2 * table[tokens] + table[tokens].mean(1, keepdim=True) + table[tokens.roll(1, 1)]

    denoiser = from_subs(model, 6, padding=7)
    prompts = [[1, 2, 3], [4], [], [5, 0, 1, 2, 3]]
    tokens = start_masked(denoiser, 4, 14, prompts, free=8)
    schedule = MaskedSchedule.from_counts((2, 1, 2, 1, 2), **choices)
    u = uniforms(4, schedule.uniforms, 14, generator=generator)
    together = sample_masked(schedule, denoiser, tokens, u=u)
    assert bool(((tokens == 7) == (together == 7)).all())
    for b, prompt in enumerate(prompts):
        size = len(prompt) + 8
        alone = start_masked(denoiser, 1, size, prompt)
        found = sample_masked(schedule, denoiser, alone, u=u[b : b + 1, :, :size])
        assert torch.equal(found[0], together[b, :size])
        assert found[0, : len(prompt)].tolist() == prompt


def test_padding_before_the_tokens_is_cut_off_too_and_inside_it_is_refused() -> None:
    seen = []
    denoiser = from_subs(lambda x: (seen.append(tuple(x.shape)), torch.zeros(*x.shape, 9))[1], 8,
                         padding=7)  # fmt: skip
    tokens = torch.tensor([[7, 7, 1, 8], [1, 8, 2, 7], [7, 1, 2, 8]])
    logits = denoiser(tokens, torch.ones(3))
    assert sorted(seen) == [(1, 2), (1, 3), (1, 3)]
    assert bool((logits[..., 7] == -math.inf).all())
    with pytest.raises(ModelError, match="put it before or after"):
        denoiser(torch.tensor([[1, 7, 8]]), torch.ones(1))
    with pytest.raises(ModelError, match="need an id for padding"):
        start_masked(table_denoiser(), 2, 4, [[1], []], free=2)
    with pytest.raises(ModelError, match="and 4 masks does not fit"):
        start_masked(denoiser, 1, 4, [[1]], free=4)
    with pytest.raises(ModelError, match="2 prompts for 3 sequences"):
        start_masked(denoiser, 3, 4, [[1], [2]])


@pytest.mark.parametrize(
    ("choices", "match"),
    [
        ({"temperature": -0.1}, "temperature -0.1 must be 0 or more"),
        ({"min_confidence": 1.2}, "min_confidence 1.2 is outside"),
        ({"max_entropy": -1}, "max_entropy -1.0 must be 0 or more"),
        ({"max_kl": 0}, "max_kl 0.0 must be positive"),
        ({"kl_window": 0}, "kl_window 0 must be 1 or more"),
        ({"max_count": 0}, "max_count 0 must be 1 or more"),
        ({"block": 0}, "block 0 must be 1 or more"),
        ({"hide_future": True}, "give block"),
        ({"remask": 1.0}, "remask 1.0 is outside"),
        ({"remask_by": "age"}, "remask_by"),
        ({"positions": "left"}, "positions"),
        ({"mode": "extrapolate", "positions": "drawn"}, "does not go with positions 'drawn'"),
        ({"mode": "extrapolate", "block": 2, "hide_future": True}, "has not seen this block"),
    ],
)
def test_calls_that_mean_nothing_are_refused_in_one_line(choices, match: str) -> None:
    with pytest.raises(ScheduleError, match=match) as caught:
        CallSpec(**choices)
    assert "\n" not in str(caught.value)


def test_no_extrapolation_after_remasking() -> None:
    calls = [CallSpec(count=1, remask=0.5), CallSpec(count=2, mode="extrapolate")]
    with pytest.raises(ScheduleError, match="call 1 cannot extrapolate: call 0 remasks"):
        MaskedSchedule(length=3, calls=calls)
