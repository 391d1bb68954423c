"""Tilted masked sequences: every moment against the enumerated target.

The model is the exact conditional of a joint of four tokens out of three, so the law of a
schedule of single tokens is the joint, and the target P^power exp(r) is a table. Statistics of P
independent populations are accepted within 4.5 standard errors.
"""

import itertools
import math

import pytest
import torch

from fewstep.samplers import from_subs, sample_masked
from fewstep.samplers.masked_particles import TiltedLaw, sample_tilted
from fewstep.samplers.particles import ParticleCollapse
from fewstep.space import CallSpec, MaskedSchedule, ModelError, ParticleStep, ScheduleError

LENGTH, TOKENS = 4, 3
MASK = TOKENS
STATES = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
ONE_HOT = torch.nn.functional.one_hot(STATES, TOKENS + 1).double()
RULES = ("never", "ess", "always", "clocks")
VALUES = torch.randn(len(STATES), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def make_joint():
    generator = torch.Generator().manual_seed(0)
    shape = torch.full((len(STATES),), 0.5, dtype=torch.float64)
    gamma = torch._standard_gamma(shape, generator=generator)
    return gamma / gamma.sum()


JOINT = make_joint()


def make_table():
    """Log-conditionals of every partial state."""
    partial = torch.tensor(list(itertools.product(range(TOKENS + 1), repeat=LENGTH)))
    fits = ((partial[:, None] == STATES) | (partial[:, None] == MASK)).all(-1) * JOINT
    mu = torch.einsum("bs,slv->blv", fits / fits.sum(-1, keepdim=True), ONE_HOT)
    return mu.log()


CONDITIONALS = make_table()


def network(tokens):
    return CONDITIONALS[(tokens * (TOKENS + 1) ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)]


def denoiser():
    return from_subs(network, MASK, length=LENGTH)


def states_of(tokens):
    return (tokens * TOKENS ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)


def table(tokens):
    return 1.5 * VALUES[states_of(tokens)]


def hard(tokens):
    return torch.where(tokens.sum(-1) % 3 == 0, 0.0, -math.inf).double()


def blank(P=64, K=128):
    return torch.full((P, K, LENGTH), MASK)


def run(target, schedule=None, steps=None, *, P=64, K=128, seed=0, **options):
    schedule = MaskedSchedule.token_by_token(LENGTH) if schedule is None else schedule
    g = torch.Generator().manual_seed(seed)
    options = {"warn_ess": 0.0} | options
    return sample_tilted(
        schedule, denoiser(), target, blank(P, K), steps=steps, generator=g, **options
    )


def require(values, exact):
    error = abs(float(values.mean()) - exact)
    assert error <= 4.5 * float(values.std()) / math.sqrt(len(values)) + 1e-12


def require_law(result, weights):
    """Normaliser, mean reward and the probability of each token at each place."""
    require(result.log_normalizer.exp(), float(weights.sum()))
    p = weights / weights.sum()
    require(result.mean(VALUES[states_of(result.x)]), float((p * VALUES).sum()))
    for place, token in itertools.product(range(LENGTH), range(TOKENS)):
        require(
            result.mean((result.x[..., place] == token).double()),
            float((p * (STATES[:, place] == token)).sum()),
        )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("completions", [1, 4])
def test_a_reward_tilts_the_models_law_exactly(rule, completions):
    target = TiltedLaw(table, completions=completions)
    result = run(target, steps=ParticleStep(resample=rule))
    require_law(result, JOINT * torch.exp(1.5 * VALUES))
    assert bool(result.resampled.any()) == (rule != "never")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("floor", [-2.0, -math.inf])
def test_a_hard_constraint_at_the_end_or_with_a_floor_is_exact(rule, floor):
    late = [ParticleStep(resample=rule, b=0.0)] * LENGTH
    steps = late if floor == -math.inf else ParticleStep(resample=rule)
    result = run(TiltedLaw(hard, floor=floor), steps=steps, K=256)
    alive = result.log_weights > -math.inf
    assert bool((hard(result.x.flatten(0, 1)) == 0)[alive.flatten()].all())
    require_law(result, JOINT * hard(STATES).exp())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("power", "temperatures"), [
    (1.0, (0.8, 1.5, 1.0, 0.7)), (1.5, (1.0, 1.0, 1.0, 1.0)), (1.5, (1.0, 0.8, 0.7, 0.7)),
])  # fmt: skip
def test_temperatures_and_powers_are_weighed_exactly(rule, power, temperatures):
    calls = tuple(CallSpec(temperature=t) for t in temperatures)
    schedule = MaskedSchedule(length=LENGTH, calls=calls)
    result = run(TiltedLaw(table, power=power), schedule, ParticleStep(resample=rule))
    require_law(result, JOINT**power * torch.exp(1.5 * VALUES))


@pytest.mark.parametrize("positions", ["uniform", "confidence"])
def test_parallel_calls_tilt_the_schedules_own_law(positions):
    schedule = MaskedSchedule.from_counts((2, 2), positions=positions)
    g = torch.Generator().manual_seed(5)
    drawn = sample_masked(schedule, denoiser(), blank(1, 400_000)[0], generator=g)
    law = torch.bincount(states_of(drawn), minlength=len(STATES)).double() / len(drawn)
    weights = law * torch.exp(1.5 * VALUES)
    result = run(TiltedLaw(table), schedule, ParticleStep(resample="always"))
    p = weights / weights.sum()
    spread = math.sqrt(float((p**2 / law.clamp(min=1e-9)).sum()) / len(drawn))  # of the law drawn
    found = result.mean(VALUES[states_of(result.x)])
    error = abs(float(found.mean()) - float((p * VALUES).sum()))
    assert error < 4.5 * (float(found.std()) / math.sqrt(len(found)) + spread)


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (2, 1, 1), (4,)])
def test_no_reward_draws_what_the_masked_sampler_draws(counts):
    schedule = MaskedSchedule.from_counts(counts)
    asked = denoiser()
    g = torch.Generator().manual_seed(0)
    plain = sample_masked(schedule, asked, blank().flatten(0, 1), generator=g)
    result = run(TiltedLaw(lambda x: torch.zeros(len(x))), schedule)
    assert torch.equal(result.x.flatten(0, 1), plain)
    assert bool((result.log_weights == 0).all())
    assert bool((result.log_normalizer.abs() < 1e-12).all())
    assert result.calls == asked.calls == len(counts)


def test_prompts_stay_and_populations_are_tilted_given_them():
    tokens = blank(2, 4000)
    tokens[0, :, 0], tokens[1, :, 0] = 0, 2
    schedule, g = MaskedSchedule.token_by_token(LENGTH - 1), torch.Generator().manual_seed(0)
    result = sample_tilted(schedule, denoiser(), TiltedLaw(table), tokens, generator=g)
    for row, token in enumerate((0, 2)):
        assert bool((result.x[row, :, 0] == token).all())
        p = JOINT * torch.exp(1.5 * VALUES) * (STATES[:, 0] == token)
        exact = float((p * VALUES).sum() / p.sum())
        assert float(result.mean(VALUES[states_of(result.x)])[row]) == pytest.approx(
            exact, abs=0.1
        )


def test_more_completions_leave_more_ancestors():
    found = {}
    for completions in (1, 16):
        target = TiltedLaw(lambda x: 3 * table(x), completions=completions)
        result = run(target, steps=ParticleStep(resample="always"))
        found[completions] = float(result.log_normalizer.std())
    assert found[16] < found[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_names_the_particle(value):
    def bad(tokens):
        r = torch.zeros(len(tokens))
        r[131] = value
        return r

    with pytest.raises(
        ModelError, match=f"particle 3 of population 1 is {value} at call 1"
    ) as found:
        run(TiltedLaw(bad))
    assert "\n" not in str(found.value)


def test_all_dead_is_one_clear_error_and_a_collapse_warns():
    never = TiltedLaw(lambda x: torch.full((len(x),), -math.inf))
    with pytest.raises(ModelError, match="all particles of population 0 are dead at call 1"):
        run(never, steps=ParticleStep(resample="always"))
    with pytest.raises(ModelError, match="dead after the last call"):
        run(never, steps=ParticleStep(resample="never"))
    steep = TiltedLaw(lambda x: 60 * VALUES[states_of(x)])
    with pytest.warns(ParticleCollapse, match="raise b from call to call"):
        run(steep, warn_ess=0.01, P=2)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TiltedLaw(table, power=0.0), "power 0.0 must be a positive"),
    (lambda: TiltedLaw(table, completions=0), "completions 0 must be 1"),
    (lambda: TiltedLaw(table, floor=math.nan), "floor nan"),
    (lambda: run(TiltedLaw(table), steps=[ParticleStep()]), "1 steps for 4 calls"),
    (lambda: run(TiltedLaw(table), MaskedSchedule.from_counts((1, 2))), "4 to 4 free positions"),
    (lambda: run(TiltedLaw(table), MaskedSchedule.from_counts((1, 3), mode="extrapolate")),
     "call 1: weights need a fixed count, mode parallel"),
    (lambda: run(TiltedLaw(table), MaskedSchedule.from_counts((2, 2), temperature=0.0)),
     "above 0"),
    (lambda: run(TiltedLaw(table), MaskedSchedule.from_counts((2, 2), positions="drawn")),
     "positions 'drawn'"),
    (lambda: run(TiltedLaw(table), MaskedSchedule.from_counts((2, 2), max_entropy=1.0)), "bounds"),
    (lambda: run(TiltedLaw(table), MaskedSchedule.from_counts((2, 2), block=2)), "blocks"),
    (lambda: run(TiltedLaw(table), MaskedSchedule.from_counts((2, 2), top_p=0.9)), "call 0: "),
    (lambda: run(TiltedLaw(table, power=2.0), MaskedSchedule.from_counts((2, 2))),
     "call 0: power 2 needs count 1"),
    (lambda: sample_tilted(MaskedSchedule.token_by_token(4), denoiser(), TiltedLaw(table),
                           torch.full((3, 4), MASK)), r"\(P, K, L\) is needed"),
])  # fmt: skip
def test_what_cannot_be_weighed_is_one_clear_line(make, message):
    with pytest.raises(ScheduleError, match=message) as found:
        make()
    assert "\n" not in str(found.value)
