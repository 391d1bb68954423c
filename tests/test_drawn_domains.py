"""The contract of a search space (`space.protocol`), kept by the masked and particle domains."""

import math

import numpy as np
import pytest

from fewstep.search.strategies import Evaluated, Proposer
from fewstep.space import ScheduleError, load_schedule
from fewstep.space.masked import CallSpec, MaskedSchedule
from fewstep.space.masked_domain import MaskedDomain
from fewstep.space.noise import EDM, RectifiedFlow, VPLinear
from fewstep.space.particle_domain import ParticleDomain
from fewstep.space.particle_policies import named_policies
from fewstep.space.particles import ParticleStep, ramp_share

DOMAINS = {
    "counts": MaskedDomain(20, 6),
    "masked": MaskedDomain(
        20, 6, modes=("parallel", "extrapolate"), positions=("uniform", "confidence"),
        temperature=(0.7, 1.4),
    ),
    "rules": MaskedDomain(
        24, 5, modes=("parallel", "extrapolate"), positions=("uniform", "drawn", "entropy"),
        temperature=(0.0, 1.5), top_p=(0.5, 1.0), min_confidence=(0.5, 1.0),
        max_entropy=(0.0, 2.0), max_kl=(0.001, 1.0), kl_windows=(1, 2), max_counts=(0, 8, 12),
        blocks=(0, 6, 8), hide_future=(False, True), ends_last=(False, True), remask=(0.0, 0.5),
        remask_by=("uniform", "drawn", "current"),
    ),
    "closed": MaskedDomain(
        24, 3, positions=("margin", "confidence"), blocks=(8,), hide_future=(True,),
        min_confidence=(0.5, 1.0), ahead="stop",
    ),
    "particles": ParticleDomain(EDM(sigma_max=8.0, sigma_min=0.02), 6),
    "vp": ParticleDomain(VPLinear(), 5, resample=("never", "ess"), weight=("left", "trapezoid")),
    "flow": ParticleDomain(RectifiedFlow(), 4),
    "strength": ParticleDomain(VPLinear(), 3, strength=(0.5, 2.5), own=2.0),
    "reward": ParticleDomain(
        VPLinear(), 4, strength=(0.0, 2.5), own=1.5, own_ramp=1.0, rewarded=True,
        reward_weight=("gradient", "path"),
    ),
    "ramp": ParticleDomain(VPLinear(), 3, ramp=(0.1, 10.0), own_ramp=1.0, rewarded=True),
    "drift": ParticleDomain(VPLinear(), 3, weight=("none",), integrators=("exponential",)),
}  # fmt: skip


@pytest.fixture(params=DOMAINS)
def domain(request):
    return DOMAINS[request.param]


def _walk(domain, count=60):
    """Members reached by sampling, mutation and crossover."""
    rng = np.random.default_rng(3)
    member = domain.sample(rng)
    for k in range(count):
        yield member
        other = domain.sample(rng)
        member = (domain.mutate(member, rng), domain.crossover(member, other, rng), other)[k % 3]


def test_parameters_and_members_are_equal_views(domain):
    for member in _walk(domain):
        assert domain.contains(member) is None
        values = domain.params(member)
        assert domain.from_params(values) == member
        assert domain.params(domain.from_params(values)) == values
        assert load_schedule(member.to_dict()) == member


def test_any_values_become_a_member(domain):
    rng = np.random.default_rng(0)
    for _ in range(40):
        values = {}
        for p in domain.parameters:
            if rng.random() < 0.7:
                wide = p.high - p.low
                number = p.low - wide + 3 * wide * rng.random()
                values[p.name] = rng.choice(p.choices) if p.kind == "choice" else number
        member = domain.from_params(values)
        assert domain.contains(member) is None
        assert domain.matter(values) == set(domain.params(member))
    assert domain.contains(domain.from_params({})) is None


def test_distributions_hold_the_parameters_of_every_member(domain):
    held = domain.distributions()
    for member in _walk(domain):
        for name, value in domain.params(member).items():
            assert held[name]._contains(held[name].to_internal_repr(value)), name


def test_a_mutation_is_another_sampler(domain):
    rng = np.random.default_rng(1)
    member = domain.sample(rng)
    for _ in range(40):
        assert domain.mutate(member, rng).digest != member.digest


def test_encodings_have_one_width_and_tell_members_apart(domain):
    met = {m.digest: domain.encode(m) for m in _walk(domain)}
    rows = np.stack(list(met.values()))
    assert np.isfinite(rows).all()
    assert len(np.unique(rows, axis=0)) == len(met)


def test_other_numbers_of_calls_are_other_members(domain):
    other = domain.with_nfe(domain.nfe - 1)
    member = other.sample(np.random.default_rng(0))
    assert other.contains(member) is None
    assert "calls" in str(domain.contains(member))
    with pytest.raises(ScheduleError, match="not in the search space"):
        domain.params(member)


def test_a_schedule_of_other_calls_is_followed(domain):
    rng = np.random.default_rng(4)
    member = domain.sample(rng)
    assert [m.digest for m in domain.adopt(member)] == [member.digest]
    for nfe in (domain.nfe - 1, domain.nfe + 2):
        other = domain.with_nfe(nfe)
        (likeness,) = other.adopt(member)
        assert other.contains(likeness) is None
    assert domain.adopt(object()) == []


def test_a_likeness_of_more_calls_keeps_the_pace():
    counts = DOMAINS["counts"]
    steep = counts.from_params({f"count_{k}": c for k, c in enumerate((2, 2, 2, 4, 4, 6))})
    (more,) = counts.with_nfe(12).adopt(steep)
    assert more.counts == (1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3)
    assert counts.adopt(more) == [steep]
    particles = DOMAINS["particles"]
    member = particles.sample(np.random.default_rng(5))
    (twice,) = particles.with_nfe(12).adopt(member)
    assert twice.times[::2] == pytest.approx(member.times, rel=1e-6)
    assert [s.zeta for s in twice.steps[::2]] == [s.zeta for s in member.steps]


def test_resampling_matters_only_where_something_was_weighed():
    domain = DOMAINS["particles"]
    values = {f"weight_{i}": "none" for i in range(6)} | {
        f"resample_{i}": "always" for i in range(6)
    }
    idle = domain.from_params(values)
    assert all(step.resample == "never" for step in idle.steps)
    once = domain.from_params(values | {"weight_2": "left"})
    assert [step.resample for step in once.steps] == ["never", "never", "always", *["never"] * 3]
    assert "resample_1" not in domain.params(once)
    assert "resample_2" in domain.params(once)


def test_every_choice_of_a_masked_call_is_searched_by_its_own_name():
    domain = DOMAINS["rules"]
    stems = {p.name.rpartition("_")[0] for p in domain.parameters}
    assert stems == set(CallSpec.model_fields)
    neutral = domain.from_params({f"count_{k}": 5 - (k == 0) for k in range(5)})
    assert neutral == MaskedSchedule.from_counts((4, 5, 5, 5, 5))
    seen = {name: set() for name in CallSpec.model_fields}
    for member in _walk(domain, 200):
        for call in member.calls:
            for name in seen:
                seen[name].add(getattr(call, name))
    assert all(len(values) > 1 for values in seen.values()), seen


@pytest.mark.parametrize(
    ("choices", "match"),
    [
        ({"min_confidence": (0.5, 0.9)}, "must end at 1"),
        ({"max_entropy": (0.1, 1.0)}, "must begin at 0"),
        ({"max_kl": (0.0, 1.0)}, "must be positive"),
        ({"remask": (0.0, 1.0)}, "must end below 1"),
        ({"remask": (0.0,)}, "must be a pair"),
        ({"blocks": (0, -1)}, "blocks must be out of whole numbers from 0"),
        ({"kl_windows": (0,)}, "whole numbers from 1"),
        ({"hide_future": ("x",)}, "true, false"),
        ({"remask_by": ("age",)}, "uniform, drawn, current"),
        ({"positions": ()}, "positions must be out of"),
        ({"positions": ("uniform", "uniform")}, "each once"),
    ],
)
def test_masked_spaces_that_mean_nothing_are_refused(choices, match):
    with pytest.raises(ScheduleError, match=match) as caught:
        MaskedDomain(12, 3, **choices)
    assert "\n" not in str(caught.value)


def test_a_choice_that_is_closed_is_no_member():
    domain = MaskedDomain(12, 3)
    for choices, word in (
        ({"min_confidence": 0.9}, "min_confidence is not searched"),
        ({"positions": "drawn"}, "positions 'drawn' is not open"),
        ({"block": 4}, "block 4 is not open"),
        ({"top_p": 0.9}, "top_p is not searched"),
    ):
        assert word in str(domain.contains(MaskedSchedule.from_counts((4, 4, 4), **choices)))
    stops = MaskedSchedule.from_counts((4, 4, 4), min_confidence=0.9)
    stops = stops.model_copy(update={"ahead": "stop"})
    assert "ahead is 'stop'" in str(MaskedDomain(12, 3, min_confidence=(0.5, 1)).contains(stops))


def test_euler_is_left_out_where_alpha_starts_at_zero():
    flow = DOMAINS["flow"]
    assert all(p.name != "integrator" for p in flow.parameters)
    assert {s.integrator for s in named_policies(RectifiedFlow(), 4).values()} == {"exponential"}
    with pytest.raises(ScheduleError, match="add exponential"):
        ParticleDomain(RectifiedFlow(), 4, integrators=("euler",))


@pytest.mark.parametrize("b", [1.0, 2.0])
def test_named_policies_are_distinct_samplers_and_drift_ones_are_members(b):
    found = named_policies(EDM(), 5, b=b)
    assert len({s.digest for s in found.values()}) == len(found)
    tempered = [name for name in found if name.startswith("tempered")]
    assert bool(tempered) == (b != 1.0)
    domain = ParticleDomain(EDM(), 5)
    for name, schedule in found.items():
        assert (domain.contains(schedule) is None) == ("clocks" not in name), name
        assert math.isclose(schedule.steps[0].zeta, 1.0 if name[0:6] == "target" else b**-0.5)


def test_a_reward_can_be_weighed_in_two_ways_and_switched_on_late():
    domain = DOMAINS["reward"]
    found = named_policies(VPLinear(), 4, paths=True)
    assert len({s.digest for s in found.values()}) == len(found)
    assert found["target_score+ess+path/time/euler"].reward_weight == "path"
    rng = np.random.default_rng(0)
    members = [domain.sample(rng) for _ in range(60)]
    assert {m.reward_weight for m in members} == {"gradient", "path"}
    shapes = {tuple(step.b for step in m.steps) for m in members}
    assert {(0.0, 0.0, 1.5, 1.5), (0.0, 1.5, 1.5, 1.5)} <= shapes
    idle = domain.from_params({f"weight_{i}": "none" for i in range(4)} | {"resample_1": "always"})
    assert idle.steps[1].resample == "always"


def test_what_a_domain_does_not_say_is_the_targets_own_ramp():
    open_b, open_ramp = DOMAINS["reward"], DOMAINS["ramp"]
    member = open_b.from_params({})
    shares = ramp_share(VPLinear(), member.times[:-1], 1.0)
    assert [s.b for s in member.steps] == pytest.approx([1.5 * s for s in shares], abs=1e-6)
    assert open_ramp.from_params({}).ramp == 1.0
    assert open_ramp.from_params({"log_ramp": 9.0}).ramp == pytest.approx(10.0)
    plain = open_ramp.from_params({}).model_copy(update={"ramp": None})
    assert open_ramp.contains(plain) is None
    assert open_ramp.canonical(plain) == open_ramp.from_params({})


@pytest.mark.parametrize(("options", "message"), [
    ({"ramp": (1.0, 0.5), "rewarded": True}, "must be \\(low, high\\)"),
    ({"ramp": (0.1, 1.0)}, "are for a target with a reward"),
    ({"reward_weight": ("path",)}, "are for a target with a reward"),
    ({"reward_weight": ("paths",), "rewarded": True}, "must be out of gradient, path"),
    ({"ramp": (0.1, 1.0), "strength": (0.0, 1.0), "rewarded": True}, "leaves no ramp: open one"),
])  # fmt: skip
def test_a_domain_whose_choices_contradict_is_one_clear_line(options, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        ParticleDomain(VPLinear(), 3, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: s.model_copy(update={"times": (7.0, *s.times[1:])}), "times run from"),
        (lambda s: _step(s, zeta=9.0), "zeta 9.0 is outside"),
        (lambda s: _step(s, b=2.0), "b is not searched"),
        (lambda s: _step(s, resample="clocks"), "'clocks' is not open"),
        (lambda s: s.model_copy(update={"ramp": 2.0}), "ramp is not searched"),
        (lambda s: s.model_copy(update={"reward_weight": "path"}), "'path' is not open"),
        (
            lambda s: s.model_copy(update={"noise": EDM(sigma_max=9.0)}),
            "noise schedule is another",
        ),
    ],
)
def test_what_is_no_member_is_told_why(change, word):
    domain = DOMAINS["particles"]
    assert word in str(domain.contains(change(domain.from_params({}))))


def _step(schedule, **choices):
    first = ParticleStep(**({"zeta": 1.0} | choices))
    return schedule.model_copy(update={"steps": (first, *schedule.steps[1:])})


def test_s3_looks_near_the_best_where_no_result_has_varied_a_choice():
    domain = DOMAINS["masked"]
    named = domain.baselines()
    known = [Evaluated(s, 10.0 + k) for k, s in enumerate(named.values())]
    proposer = Proposer("s3", domain, seed=0, size=16)
    for e in known:
        proposer.tell(e)
    told = proposer.propose(1)
    assert {p.source for p in told} == {"mutation"}
    assert len({p.schedule.digest for p in told} | {s.digest for s in named.values()}) == 16 + len(
        named
    )
    for k, p in enumerate(told):
        known.append(Evaluated(p.schedule, 9.0 - 0.01 * k))
        proposer.tell(known[-1], p.trial)
    heat = np.array([[c.temperature for c in e.schedule.calls] for e in known])
    assert (np.ptp(heat, axis=0) > 0).all()
    later = proposer.propose(2)
    assert all("predicted" in p.note for p in later)


@pytest.mark.slow
def test_s3_needs_fewer_masked_candidates_than_evolution_and_random_search():
    """A smooth score of the counts and temperatures; three seeds, 60 candidates each."""
    domain = MaskedDomain(20, 8, temperature=(0.7, 1.3))
    target = domain.from_params(
        {f"count_{k}": c for k, c in enumerate((1, 1, 2, 3, 3, 4, 3, 3))}
        | {f"temperature_{k}": t for k, t in enumerate((0.8, 0.85, 0.9, 1, 1, 1.1, 1, 0.9))}
    )

    def score(schedule):
        gap = domain.encode(schedule) - domain.encode(target)
        return 0.01 + float(gap @ gap)

    best = {}
    for name in ("random", "evolution", "s3"):
        best[name] = []
        for seed in range(3):
            known = [Evaluated(s, score(s)) for s in domain.baselines().values()]
            proposer = Proposer(name, domain, seed=seed, size=10)
            for e in known:
                proposer.tell(e)
            for generation in range(1, 7):
                for p in proposer.propose(generation):
                    known.append(Evaluated(p.schedule, score(p.schedule)))
                    proposer.tell(known[-1], p.trial)
            best[name].append(min(r.score for r in known))
    means = {name: float(np.mean(scores)) for name, scores in best.items()}
    assert means["s3"] < 0.8 * means["evolution"]
    assert means["evolution"] < means["random"]
