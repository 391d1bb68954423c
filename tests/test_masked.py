"""Masked diffusion: the sampler's law, its randomness, its schedules and its refusals."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fewstep.experiments.benchmarks.ancestral import (
    ancestral,
    expected_calls,
    truncated_gumbel,
    truncated_law,
)
from fewstep.samplers.categorical import draw, uniforms
from fewstep.samplers.masked import MaskedProgress, anneal, sample_masked
from fewstep.samplers.token_denoiser import from_hf_masked_lm, from_subs, start_masked
from fewstep.space import ModelError
from fewstep.space.masked import CallSpec, MaskedSchedule
from tests.masked_toys import (
    JOINT,
    LENGTH,
    MASK,
    TableModel,
    blank,
    random_joint,
    table_denoiser,
    variation,
)


def enumerated_law(schedule: MaskedSchedule, joint: Tensor) -> tuple[Tensor, Tensor]:
    """The sampler's law, exactly: every order of positions times every sequence of tokens.

    The uniforms of each path are put in the middle of the interval that draws its tokens; the
    path's probability is the product of the laws the sampler itself reports.
    """
    length, tokens = joint.ndim, joint.shape[0]
    orders = list(itertools.permutations(range(length)))
    values = torch.tensor(list(itertools.product(range(tokens), repeat=length)))
    model, paths = TableModel(joint), []
    for order in orders:
        u = torch.zeros(len(values), 2, length, dtype=torch.float64)
        u[:, 0, list(order)] = torch.linspace(0.9, 0.1, length, dtype=torch.float64)
        state, done = blank(len(values), length, tokens), 0
        for count in schedule.counts:
            chosen = list(order[done : done + count])
            mu = model(state)[:, :, :tokens].exp()
            after = mu.cumsum(-1).gather(2, values[..., None])[..., 0]
            own = mu.gather(2, values[..., None])[..., 0]
            u[:, 1, chosen] = (after - own / 2)[:, chosen].nan_to_num(0.5).clamp(0, 1 - 1e-12)
            state[:, chosen] = values[:, chosen]
            done += count
        paths.append(u)
    u = torch.cat(paths)
    wanted = values.repeat(len(orders), 1)
    weight = torch.full((len(u),), 1 / len(orders), dtype=torch.float64)

    def collect(progress: MaskedProgress) -> None:
        # a path whose tokens have probability 0 is drawn as another one; it weighs 0
        chance = progress.law.gather(2, wanted.gather(1, progress.positions)[..., None])[..., 0]
        weight.mul_(chance.prod(-1))

    denoiser = from_subs(_Along(model, wanted), tokens, length=length)
    drawn = sample_masked(schedule, denoiser, blank(len(u), length, tokens), u=u, callback=collect)
    law = torch.zeros_like(joint)
    law.index_put_(tuple(wanted.T), weight, accumulate=True)
    return law, (drawn == wanted).all(-1) | (weight == 0)


class _Along:
    """The table, with tokens drawn on impossible paths replaced by the path's own."""

    def __init__(self, model: TableModel, wanted: Tensor) -> None:
        self.model, self.wanted = model, wanted

    def __call__(self, tokens: Tensor) -> Tensor:
        state = torch.where(tokens == self.model.tokens, tokens, self.wanted)
        return self.model(state).nan_to_num(nan=0.0, neginf=float("-inf"))


# --- the law ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "tokens"), [(4, 3), (3, 4), (2, 2)])
def test_token_by_token_is_the_models_law_exactly(length: int, tokens: int) -> None:
    joint = random_joint(1, length, tokens)
    law, drawn = enumerated_law(MaskedSchedule.token_by_token(length), joint)
    assert bool(drawn.all())
    assert float((law - joint).abs().sum()) / 2 < 1e-12


def test_one_call_for_everything_is_the_product_of_marginals() -> None:
    law, _ = enumerated_law(MaskedSchedule.from_counts([LENGTH]), JOINT)
    product = torch.ones((), dtype=torch.float64)
    for axis in range(LENGTH):
        marginal = JOINT.sum([a for a in range(LENGTH) if a != axis])
        product = product[..., None] * marginal
    assert float((law - product).abs().max()) < 1e-14


@pytest.mark.parametrize("counts", [(1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2), (1, 3), (4,)])
def test_every_parallel_schedule_is_an_approximation_with_unit_mass(counts) -> None:
    law, _ = enumerated_law(MaskedSchedule.from_counts(counts), JOINT)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    assert 0.01 < float((law - JOINT).abs().sum()) / 2 < 0.8


def test_the_drawn_samples_follow_the_enumerated_law() -> None:
    schedule = MaskedSchedule.from_counts((1, 2, 1))
    law, _ = enumerated_law(schedule, JOINT)
    generator = torch.Generator().manual_seed(0)
    samples = sample_masked(schedule, table_denoiser(), blank(200_000), generator=generator)
    assert variation(samples, law) < 0.01


def test_ancestral_error_halves_as_steps_double() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = []
    for steps in (4, 8, 16):
        samples = ancestral(table_denoiser(), blank(300_000), steps, generator=generator)
        errors.append(variation(samples, JOINT))
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("inverse", [(1, 1, 1, 1), (1, 1.5, 2, 2), (2, 2, 2, 2)])
def test_weighted_annealing_hits_the_power_of_the_law(inverse: tuple[float, ...]) -> None:
    power = 2.0
    target = JOINT**power / (JOINT**power).sum()
    schedule = MaskedSchedule(length=4, calls=tuple(CallSpec(temperature=1 / b) for b in inverse))
    generator = torch.Generator().manual_seed(0)
    samples, logs = anneal(
        schedule, table_denoiser(), blank(200_000), power=power, generator=generator
    )
    assert variation(samples, target, logs.softmax(0)) < 0.01
    assert logs.exp().mean() == pytest.approx(float((JOINT**power).sum()), rel=0.05)
    if inverse[0] == 2:
        assert variation(samples, target) > 0.05


def test_hitting_levels_are_the_order_statistics_of_uniforms() -> None:
    times = []
    sample_masked(
        MaskedSchedule.token_by_token(4),
        table_denoiser(),
        blank(50_000),
        generator=torch.Generator().manual_seed(0),
        callback=lambda progress: times.append(progress.t),
    )
    stacked = torch.stack(times)
    assert bool((stacked.diff(dim=0) < 0).all())
    for j, t in enumerate(stacked):  # the j-th largest of 4 uniforms is Beta(4 - j, j + 1)
        assert float(t.mean()) == pytest.approx((4 - j) / 5, abs=0.005)
        assert float(t.var()) == pytest.approx((4 - j) * (j + 1) / (25 * 6), abs=0.002)
    top = stacked[0].sort().values  # Kolmogorov-Smirnov of t^4 against uniform
    ranks = torch.linspace(0, 1, len(top), dtype=torch.float64)
    assert float((top**4 - ranks).abs().max()) < 0.01


# --- choices: neutral values and meanings ----------------------------------------------------


def test_neutral_choices_and_a_history_that_does_not_move_change_nothing() -> None:
    u = uniforms(500, 2, 6, generator=torch.Generator().manual_seed(3))
    frozen = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoiser = from_subs(lambda x: frozen.expand(len(x), -1, -1), 8)
    tokens = blank(500, 6, 8)
    plain = sample_masked(MaskedSchedule.from_counts((2, 2, 2)), denoiser, tokens, u=u)
    for choices in (
        {"temperature": 1.0, "top_p": 1.0},
        {"mode": "extrapolate"},
    ):
        schedule = MaskedSchedule.from_counts((2, 2, 2), **choices)
        assert torch.equal(plain, sample_masked(schedule, denoiser, tokens, u=u))


@pytest.mark.parametrize("variable", ["time", "fraction"])
def test_extrapolated_rows_are_probabilities_and_continue_the_line(variable: str) -> None:
    calls = tuple(CallSpec(count=2, mode=m) for m in ("parallel", "extrapolate"))
    schedule = MaskedSchedule(length=4, calls=calls, variable=variable)
    seen: list[MaskedProgress] = []
    sample_masked(
        schedule,
        table_denoiser(),
        blank(300),
        generator=torch.Generator().manual_seed(0),
        callback=seen.append,
    )
    law, mu = seen[1].law, seen[1].mu
    assert torch.allclose(law.sum(-1), torch.ones(300, 2, dtype=torch.float64))
    assert bool((law >= 0).all())
    assert torch.equal(law[:, 0], mu[:, 0])
    if variable == "fraction":  # places 1, 1/2 for the calls, 1/4 for the second token
        first = table_denoiser()(blank(1), torch.ones(1))[0].exp()
        past = first[seen[1].positions[:, 1]]
        line = (mu[:, 1] + 0.5 * (mu[:, 1] - past)).clamp(min=0)
        assert torch.allclose(law[:, 1], line / line.sum(-1, keepdim=True))
    assert not torch.equal(law[:, 1], mu[:, 1])


def test_temperature_and_top_p_do_what_they_say() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64)
    denoiser = from_subs(lambda x: row.log().expand(*x.shape, 5), 4)
    laws = {}
    for name, choices in {"cold": {"temperature": 0.5}, "top": {"top_p": 0.79}}.items():
        schedule = MaskedSchedule.from_counts([1], **choices)
        sample_masked(
            schedule, denoiser, blank(1, 1, 4), callback=lambda p, n=name: laws.update({n: p.law})
        )
    assert torch.allclose(laws["cold"].flatten(), row**2 / (row**2).sum())
    top = torch.tensor([0.625, 0.375, 0, 0, 0], dtype=torch.float64)
    assert torch.allclose(laws["top"].flatten(), top)


def test_confidence_visits_the_surest_positions_first() -> None:
    sure = torch.tensor([0.1, 3.0, 1.0, 2.0])
    logits = torch.stack([sure, torch.zeros(4), torch.full((4,), -9.0)], -1)
    denoiser = from_subs(lambda x: logits.expand(len(x), -1, -1), 2)
    order: list[int] = []
    schedule = MaskedSchedule.from_counts((1, 1, 2), positions="confidence")
    sample_masked(
        schedule,
        denoiser,
        blank(1, 4, 2),
        callback=lambda p: order.extend(p.positions[0].tolist()),
    )
    assert order == [1, 3, 2, 0]


# --- batches, prompts, calls -----------------------------------------------------------------


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    schedule = MaskedSchedule.from_counts((1, 2, 1), positions="uniform")
    u = uniforms(64, 2, LENGTH, generator=torch.Generator().manual_seed(0))
    whole = sample_masked(schedule, table_denoiser(), blank(64), u=u)
    parts = [
        sample_masked(schedule, table_denoiser(), blank(len(part)), u=part)
        for part in u.split([1, 13, 50])
    ]
    assert torch.equal(whole, torch.cat(parts))
    again = uniforms(20, 2, LENGTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, u[:20])


def test_prompts_stay_and_condition_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    denoiser = table_denoiser()
    tokens = start_masked(denoiser, 100_000, LENGTH, prompt=[2, 0])
    samples = sample_masked(
        MaskedSchedule.token_by_token(2), denoiser, tokens, generator=generator
    )
    assert bool((samples[:, :2] == torch.tensor([2, 0])).all())
    given = JOINT[2, 0] / JOINT[2, 0].sum()
    assert variation(samples[:, 2:], given) < 0.01


def test_sequences_with_different_prompts_share_a_batch_when_fitted() -> None:
    tokens = torch.tensor([[3, 3, 3, 3], [0, 3, 3, 3], [0, 1, 2, 3], [0, 0, 0, 0]])
    denoiser, seen = table_denoiser(), []
    done = sample_masked(
        MaskedSchedule.from_counts((2, 2)),
        denoiser,
        tokens,
        fit=True,
        callback=lambda p: seen.append(p.valid.sum(-1).tolist()),
    )
    assert bool((done != MASK).all())
    assert torch.equal(done[3], tokens[3])
    assert torch.equal(torch.tensor(seen).sum(0), torch.tensor([4, 3, 1, 0]))


def test_calls_are_the_schedules_entries() -> None:
    for counts in ((4,), (2, 2), (1, 1, 1, 1)):
        denoiser = table_denoiser()
        schedule = MaskedSchedule.from_counts(counts)
        sample_masked(schedule, denoiser, blank(7))
        assert denoiser.calls == schedule.nfe == len(counts)


def test_cached_ancestral_calls_match_their_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    for batch, steps in ((1, 64), (4, 64)):
        denoiser = table_denoiser()
        for _ in range(400):
            ancestral(denoiser, blank(batch), steps, cached=True, generator=generator)
        # the step after the last change asks too, unless nothing is left to unmask
        assert denoiser.calls / 400 == pytest.approx(
            expected_calls(LENGTH, batch, steps), rel=0.05
        )


def test_times_reach_a_network_that_wants_them() -> None:
    asked: list[Tensor] = []

    def timed(tokens: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return torch.zeros(*tokens.shape, 5)

    sample_masked(
        MaskedSchedule.token_by_token(3), from_subs(timed, 4, timed=True), blank(2, 3, 4)
    )
    assert all(t.shape == (2,) and t.dtype == torch.float64 for t in asked)
    assert bool((torch.stack(asked).diff(dim=0) < 0).all())


def test_a_hugging_face_model_is_a_denoiser() -> None:
    class Tokenizer:
        mask_token_id, all_special_ids = 4, (0, 4)

    class Output:
        logits = torch.zeros(8, 6, 7)

    denoiser = from_hf_masked_lm(lambda input_ids: Output(), Tokenizer())
    drawn = sample_masked(MaskedSchedule.from_counts((3, 3)), denoiser, blank(8, 6, 4))
    assert not set(drawn.flatten().tolist()) & {0, 4}
    with pytest.raises(ModelError, match="no mask token"):
        from_hf_masked_lm(lambda input_ids: Output())


# --- precision -------------------------------------------------------------------------------


def test_the_truncated_law_agrees_with_a_seeded_sampler() -> None:
    pi = torch.tensor([0.02, 0.05, 0.13, 0.2, 0.25, 0.35], dtype=torch.float64)
    top, generator = 1.0, torch.Generator().manual_seed(0)
    u = torch.rand(1_000_000, 6, generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(u * math.exp(-math.exp(-top))))  # conditional on g <= M
    found = torch.bincount((pi.log() + gumbel).argmax(-1), minlength=6) / 1_000_000
    law = truncated_law(pi, top)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    assert float((found - law).abs().max()) < 0.002
    assert float((law - pi).abs().max()) > 0.02
    assert torch.allclose(truncated_law(pi, 30.0), pi)


def test_the_short_form_of_the_truncated_law_is_a_hidden_temperature() -> None:
    pi = 1 / torch.arange(1, 5001, dtype=torch.float64)
    pi /= pi.sum()
    for top in (13.0, 14.0):
        short = pi * torch.exp(-math.exp(-top) / pi)
        short /= short.sum()
        law = truncated_law(pi, top)
        assert abs(_entropy(law) - _entropy(short)) < 2e-3
        assert _entropy(law) < _entropy(pi) - 0.01


def _entropy(p: Tensor) -> float:
    return float(torch.special.entr(p).sum())


def _zipf_entropy(steps: int, sampling: str, bits: int) -> float:
    """Entropy of tokens drawn by ancestral sampling from one Zipf row."""
    row = (1 / torch.arange(1, 301, dtype=torch.float64)).log()
    row = torch.cat([row, torch.tensor([-math.inf], dtype=torch.float64)])
    denoiser = from_subs(lambda x: row.expand(*x.shape, -1), 300)
    generator = torch.Generator().manual_seed(0)
    drawn = ancestral(
        denoiser, blank(4, 1000, 300), steps, sampling=sampling, generator=generator, bits=bits
    )
    return _entropy(torch.bincount(drawn.flatten(), minlength=300).double() / drawn.numel())


def test_entropy_falls_with_steps_under_truncation_and_ours_does_not() -> None:
    true = _entropy((p := 1 / torch.arange(1, 301, dtype=torch.float64)) / p.sum())
    faulty = [_zipf_entropy(steps, "fp32_gumbel", 10) for steps in (1, 8, 64)]
    assert faulty[0] > faulty[1] + 0.1 > faulty[2] + 0.2
    for sampling in ("two_stage", "categorical"):
        for steps in (1, 8, 64):  # 4000 draws of 300 tokens: the estimate is .04 low
            assert _zipf_entropy(steps, sampling, 10) == pytest.approx(true - 0.04, abs=0.08)


@pytest.mark.slow
def test_real_float32_gumbels_lose_unmasking_events() -> None:
    # 1/N of 30,000 flat tokens: p* = 2^-24 N is three times a token's probability
    rows, vocabulary, steps = 1000, 30_000, 1700
    log_p = torch.full((rows, vocabulary + 1), math.log(1 / vocabulary / steps))
    log_p[:, -1] = math.log1p(-1 / steps)
    generator, events = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        events += int((truncated_gumbel(log_p, generator) != vocabulary).sum())
    nominal = rows * 20 / steps
    assert events / nominal < 0.4


def test_no_sampler_of_ours_compares_float32_uniforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if anyone draws tokens from uniforms of 24 bits again."""
    with pytest.raises(TypeError, match="float64"):
        draw(torch.ones(3), torch.rand(()))
    with pytest.raises(TypeError, match="float64"):
        draw(torch.ones(3, dtype=torch.float64), torch.rand(()))
    drawn: list[Tensor] = []
    rand = torch.rand

    def spy(*args: object, **kwargs: object) -> Tensor:
        drawn.append(rand(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "rand", spy)
    monkeypatch.setattr(torch, "rand_like", None)
    monkeypatch.setattr(torch, "multinomial", None)
    half = from_subs(lambda x: torch.zeros(*x.shape, 5, dtype=torch.bfloat16), 4)
    sample_masked(MaskedSchedule.from_counts((2, 2)), half, blank(50, 4, 4))
    ancestral(half, blank(50, 4, 4), 8)
    ancestral(half, blank(50, 4, 4), 8, sampling="categorical")
    assert drawn
    for u in drawn:
        assert u.dtype == torch.float64
        coarse = (u * 2**24) % 1 == 0
        assert float(coarse.double().mean()) < 0.01


def test_rare_tokens_occur_at_their_rate_in_half_precision() -> None:
    # the logits are bfloat16, the draw is not: 40,000 tokens of 2^-16 make half of the mass
    logits = torch.zeros(40_001, dtype=torch.bfloat16)
    logits[0] = math.log(40_000)
    expected = float(logits.double().softmax(-1)[0])
    denoiser = from_subs(
        lambda x: torch.cat([logits, logits.new_zeros(1)]).expand(*x.shape, -1), 40_001
    )
    drawn = torch.cat(
        [
            sample_masked(
                MaskedSchedule.from_counts([50]),
                denoiser,
                blank(4, 50, 40_001),
                generator=torch.Generator().manual_seed(i),
            )
            for i in range(20)
        ]
    )
    assert float((drawn == 0).double().mean()) == pytest.approx(expected, abs=0.03)
    assert len(drawn[drawn > 0].unique()) > 0.97 * int((drawn > 0).sum())


def test_draw_never_returns_an_impossible_token() -> None:
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).expand(4, -1)
    u = torch.tensor([0.0, 0.5, 1 - 2**-53, 0.25], dtype=torch.float64)
    assert draw(p, u).tolist() == [1, 3, 3, 1]
