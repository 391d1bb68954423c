"""The search space: every move stays inside, every view inverts every other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep.experiments.cli.importing import import_usf
from fewstep.space import OdeSchedule, StepSpec
from fewstep.space.baselines import baseline, named
from fewstep.space.domain import OdeDomain
from fewstep.space.errors import ScheduleError
from fewstep.space.moves import moved_times
from fewstep.space.noise import EDM, RectifiedFlow, VPCosine, VPDiscrete, VPLinear
from fewstep.space.step_choices import StepChoices
from fewstep.space.tokens import tokens
from tests.oracles import REFERENCE
from tests.replay import singlestep

NOISES = [
    VPLinear(),
    VPCosine(),
    VPDiscrete(),
    EDM(),
    RectifiedFlow(),
    RectifiedFlow(shift=3.0, t_end=0.0),
]
EVERYTHING = StepChoices(
    formulations=("data", "noise", "velocity"),
    bases=("lam", "t", "rho", "power", "adams"),
    extras=(
        ("compensation", 0.8, 1.2),
        ("dt_query", -1e-4, 1e-4),
        ("dt_start", -1e-4, 1e-4),
        ("dt_land", -1e-4, 1e-4),
        ("power", 0.2, 2.0),
    ),
    weights=2,
)
USF = StepChoices(starts=3, corrector_orders=True)
SPACES = {
    "default": StepChoices(),
    "usf": USF,
    "open": replace(EVERYTHING, extras=EVERYTHING.extras[4:], starts=2, corrector_orders=True),
    "no-slopes": replace(USF, slopes=False, starts=1),
}


def name(noise: object) -> str:
    return f"{type(noise).__name__}-{noise.t_range[1]}"


def population(domain: OdeDomain, seed: int = 0, count: int = 12) -> list[OdeSchedule]:
    """Sampled, mutated and crossed members, and all neighbours of one."""
    rng = np.random.default_rng(seed)
    sampled = [domain.sample(rng) for _ in range(count)]
    mutated = [domain.mutate(s, rng) for s in sampled]
    crossed = [domain.crossover(a, b, rng) for a, b in zip(sampled, mutated[::-1], strict=True)]
    return sampled + mutated + crossed + domain.neighbours(sampled[0])[:12]


@pytest.fixture(params=NOISES, ids=name)
def noise(request):
    return request.param


@pytest.mark.parametrize("nfe", [1, 5, 8])
def test_every_move_gives_a_member_that_compiles_to_exactly_nfe_rows(noise, nfe):
    domain = OdeDomain(noise, nfe)
    for schedule in population(domain, count=8):
        assert domain.contains(schedule) is None
        assert schedule.program.nfe == nfe


def test_members_with_every_decision_open_compile_too():
    domain = OdeDomain(
        VPLinear(),
        5,
        EVERYTHING,
        first=("network", "zero"),
        start_band=(0.9, 1.0),
        end_band=(1e-3, 2e-3),
    )
    for schedule in population(domain):
        assert domain.contains(schedule) is None
        assert schedule.program.nfe == 5
        assert domain.from_params(domain.params(schedule)) == schedule


@pytest.mark.parametrize(
    ("noise", "start", "end"),
    [
        (VPLinear(), (0.8, 1.0), (1e-3, 1e-2)),
        (EDM(), (40.0, 80.0), (0.002, 0.01)),
        (VPDiscrete(), (900.0, 999.0), (0.0, 20.0)),
        (RectifiedFlow(), (0.9, 1.0), (1e-3, 0.01)),
    ],
)
def test_start_and_end_may_be_open(noise, start, end):
    domain = OdeDomain(noise, 4, start_band=start, end_band=end)
    members = population(domain, count=30)
    assert all(domain.from_params(domain.params(s)) == s for s in members)
    for times, band in (
        ([s.times[0] for s in members], start),
        ([s.times[-1] for s in members], end),
    ):
        assert len(set(times)) > 10
        assert min(times) >= band[0] - 1e-6 * band[1]
        assert max(times) <= band[1] * (1 + 1e-6)


@pytest.mark.parametrize("nfe", [1, 5, 8])
def test_parameters_and_encoding_invert_bit_for_bit(noise, nfe):
    domain = OdeDomain(noise, nfe, first=("network", "zero"))
    for schedule in population(domain, seed=1):
        assert domain.from_params(domain.params(schedule)) == schedule
        assert len(domain.encode(schedule)) == len(domain.encode(domain.from_params({})))


def test_parameters_lie_in_their_distributions_and_come_in_order():
    pytest.importorskip("optuna")
    domain = OdeDomain(VPLinear(), 6, end_band=(1e-3, 3e-3))
    distributions = domain.distributions()
    order = [p.name for p in domain.parameters]
    assert list(distributions) == order
    for schedule in population(domain, seed=2):
        params = domain.params(schedule)
        assert list(params) == [n for n in order if n in params]
        for key, value in params.items():
            assert distributions[key]._contains(distributions[key].to_internal_repr(value))


def test_any_values_at_all_mean_a_member():
    domain = OdeDomain(VPLinear(), 5)
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = {}
        for p in domain.parameters:
            if rng.random() < 0.7:
                number = rng.uniform(2 * p.low - p.high, 2 * p.high - p.low)
                values[p.name] = (
                    p.choices[rng.integers(len(p.choices))] if p.kind == "choice" else number
                )
        assert domain.contains(domain.from_params(values)) is None
    assert domain.contains(domain.from_params({})) is None


def test_times_are_proposed_uniformly_in_lam():
    """The inner time of a two-step schedule, but for the gaps at the ends."""
    domain = OdeDomain(EDM(), 2, StepChoices(correctors=("none",)), min_gap=0.01)
    rng = np.random.default_rng(0)
    low, high = domain.lam_range
    u = np.sort(
        [(domain.lam(domain.sample(rng).times)[1] - low) / (high - low) for _ in range(1000)]
    )
    distance = np.abs(u - np.arange(1000) / 1000).max()  # Kolmogorov-Smirnov
    assert distance < 1.63 / np.sqrt(1000)  # the 1 % point


@pytest.mark.parametrize("nfe", [3, 6])
def test_named_solvers_are_members_and_stay_the_same_sampler(noise, nfe):
    domain = OdeDomain(noise, nfe)
    for schedule in list(named(noise, nfe).values())[::3]:
        assert domain.contains(schedule) is None
        canonical = domain.canonical(schedule)
        canonical.program.require_equal(schedule.program, 1e-8)
        assert domain.canonical(canonical) == canonical


def test_edm_heun_is_the_re_evaluated_corrector_of_the_rho_basis():
    noise = EDM()
    canonical = OdeDomain(noise, 5).canonical(baseline("heun/edm", noise, 5))
    assert [s.corrector for s in canonical.steps] == ["reeval", "reeval", "none"]
    assert canonical.steps[0].basis == "rho"


def test_irrelevant_fields_are_neutral():
    domain = OdeDomain(VPLinear(), 3)
    plain = domain.canonical(baseline("ddim/logsnr", domain.noise, 3))
    fussy = plain.model_copy(
        update={
            "steps": tuple(
                StepSpec(formulation="noise", basis="adams", relaxation="bh1") for _ in range(3)
            )
        }
    )
    assert domain.contains(fussy) is None
    assert domain.canonical(fussy) == plain


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": (StepSpec(), StepSpec(order=2, start=1), StepSpec())}, "start"),
        ({"steps": (StepSpec(), StepSpec(eta=0.5), StepSpec())}, "eta"),
        ({"steps": (StepSpec(), StepSpec(compensation=1.0, dt_land=1e-3), StepSpec())}, "dt_land"),
        (
            {
                "steps": (
                    StepSpec(),
                    StepSpec(order=2, formulation="velocity", basis="t"),
                    StepSpec(),
                )
            },
            "velocity",
        ),
        ({"times": (1.0, 0.5, 0.499, 1e-3)}, "minimum gap"),
        ({"times": (0.9, 0.5, 0.2, 1e-3)}, r"times\[0\]"),
        ({"noise": VPLinear(beta_max=19.0)}, "noise schedule"),
        ({"options": {"threshold": {}}}, "threshold"),
    ],
)
def test_what_is_outside_is_refused_with_the_reason(change, reason):
    domain = OdeDomain(VPLinear(), 3)
    base = baseline("ddim/time", domain.noise, 3)
    fields = {k: getattr(base, k) for k in ("noise", "times", "steps")} | change
    with pytest.raises(ScheduleError, match=reason):
        domain.params(OdeSchedule(**fields))


def test_a_schedule_moves_to_the_neighbouring_nfe_and_back():
    domain = OdeDomain(VPLinear(), 5)
    schedule = domain.canonical(baseline("unipc2-bh2/logsnr", domain.noise, 5))
    longer = domain.with_nfe(6).adopt(schedule)
    assert len(longer) == 5
    assert all(domain.with_nfe(6).contains(s) is None for s in longer)
    assert schedule.times in [s.times for s in domain.adopt(longer[2])]
    assert len(domain.with_nfe(4).adopt(schedule)) == 4
    assert domain.adopt(schedule) == [schedule]
    assert OdeDomain(EDM(), 5).adopt(schedule) == []
    far = domain.with_nfe(9).adopt(schedule)
    assert far
    assert all(domain.with_nfe(9).contains(s) is None for s in far)


def test_tokens_have_one_width_for_every_nfe_and_equal_samplers_have_equal_tokens():
    noise = VPLinear()
    five = tokens(baseline("heun/edm", noise, 5))[0]
    eight = tokens(baseline("ipndm3/edm", noise, 8))[0]
    assert five.shape[0] == 5
    assert eight.shape[0] == 8
    assert five.shape[1] == eight.shape[1]
    domain = OdeDomain(noise, 5)
    heun = baseline("heun/edm", noise, 5)
    np.testing.assert_allclose(tokens(domain.canonical(heun))[0], five, atol=1e-7)


def test_tokens_hold_the_programs_weights():
    noise = VPLinear()
    schedule = baseline("unipc3-bh1/edm", noise, 5)
    p = schedule.program
    got = tokens(schedule)[0]
    for c in range(4):
        expected = p.b[c, : c + 1].flip(0) / p.alpha[c + 1]
        np.testing.assert_allclose(got[c, 4 : 5 + c], expected, atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"nfe": 0},
        {"nfe": 5, "first": ("mean",)},
        {"nfe": 5, "first": ("sometimes",)},
        {"nfe": 5, "min_gap": 5.0},
        {"nfe": 5, "end_band": (0.1, 0.1)},
    ],
)
def test_an_impossible_space_is_refused(arguments):
    with pytest.raises(ScheduleError, match="domain"):
        OdeDomain(VPLinear(), **arguments)


def test_unknown_choices_are_refused():
    with pytest.raises(ScheduleError, match="bases holds 'cosine'"):
        StepChoices(bases=("cosine",))
    with pytest.raises(ScheduleError, match="must hold 1"):
        StepChoices(orders=(2, 3))


# --- starts of older points, and correctors as free as USF's -----------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("nfe", [2, 6])
def test_wider_spaces_keep_every_promise(noise, nfe, space):
    domain = OdeDomain(noise, nfe, SPACES[space], first=("network", "zero"))
    distributions, order = domain.distributions(), [p.name for p in domain.parameters]
    for schedule in population(domain, seed=3, count=3):
        assert domain.contains(schedule) is None
        assert schedule.program.nfe == nfe
        params = domain.params(schedule)
        assert domain.from_params(params) == schedule
        assert list(params) == [n for n in order if n in params]
        for key, value in params.items():
            assert distributions[key]._contains(distributions[key].to_internal_repr(value))


def test_moves_reach_every_start_and_every_corrector_order():
    domain = OdeDomain(VPLinear(), 8, USF)
    members = population(domain, count=60)
    steps = [step for s in members for step in s.steps]
    assert {s.start for s in steps} == {0, 1, 2, 3}
    assert all(s.order > 1 and s.basis != "adams" for s in steps if s.start)
    corrected = {s.points_corrector - s.order for s in steps if s.corrector != "none"}
    assert corrected >= {-2, -1, 0, 1, 2}
    assert {s.corrector_slope_points for s in steps} >= {None, 1, 2}
    one = domain.sample(np.random.default_rng(4))
    near = [domain.params(s) for s in domain.neighbours(one)]
    here = domain.params(one)
    for name in here:
        if name.startswith(("start", "corrector_order", "corrector_slope")):
            assert any(p.get(name, here[name]) != here[name] for p in near)


def test_a_space_that_is_not_opened_is_what_it_was():
    """Closed decisions add no parameter, so encodings and random streams stay."""
    for noise in NOISES:
        names = {p.name.rpartition("_")[0] for p in OdeDomain(noise, 6).parameters}
        assert not names & {"start", "corrector_order", "corrector_slope"}
    opened = OdeDomain(VPLinear(), 6, USF).parameters
    closed = OdeDomain(VPLinear(), 6).parameters
    assert [p for p in opened if p in closed] == list(closed)


FIELDS = {
    "order": (1, 2, 3, 4),
    "formulation": ("data", "noise", "velocity"),
    "basis": ("lam", "t", "rho", "adams", "power"),
    "relaxation": ("none", "bh1", "bh2", "exp", "half_second", "linear"),
    "slope_points": (None, 1, 2),
    "start": (0, 1, 2, 3),
    "corrector": ("none", "reuse", "reeval"),
    "corrector_order": (None, 2, 3, 4, 5),
    "corrector_relaxation": ("none", "bh1", "exp"),
    "corrector_slope_points": (None, 1, 2),
    "weights": ((), (0.1,)),
    "dt_query": (0.0, 1e-5),
    "eta": (0.0, 0.5),
}


@pytest.mark.parametrize("space", SPACES)
def test_what_is_called_a_member_is_the_same_sampler_in_canonical_form(noise, space):
    """Any step at all is refused, or settling it changes nothing; a reason names what changes."""
    wide = OdeDomain(noise, 5, SPACES["open"], first=("network", "zero"))
    domain = OdeDomain(noise, 5, SPACES[space], first=("network", "zero"))
    rng = np.random.default_rng(0)
    told = {True: 0, False: 0}
    for k in range(100):
        schedule = (domain if k % 2 else wide).sample(rng)
        i = rng.integers(schedule.n_steps)
        names = rng.choice(list(FIELDS), size=rng.integers(3), replace=False)
        change = {n: FIELDS[n][rng.integers(len(FIELDS[n]))] for n in names}
        try:
            steps = list(schedule.steps)
            steps[i] = steps[i].model_copy(update=change)
            schedule = schedule.model_copy(update={"steps": tuple(steps)})
            program = schedule.program
        except ScheduleError:
            continue  # no schedule at all
        reason = domain.contains(schedule)
        member = reason is None
        told[member] += 1
        assert member or reason.startswith(("first", "step ", "it makes")), reason
        if member:
            canonical = domain.canonical(schedule)
            canonical.program.require_equal(program, 1e-6)
            assert domain.canonical(canonical) == canonical
    assert min(told.values()) > 5


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (StepSpec(order=2, start=2), "start 2 is not open here, where it would be 1"),
        (StepSpec(order=1, start=1), "start 1 is not open"),
        (StepSpec(order=2, start=1, basis="adams", formulation="noise"), "start 1 is not open"),
        (
            StepSpec(order=4, basis="adams", corrector="reuse"),
            "corrector_order None is not open here, where it would be 4",
        ),
        (
            StepSpec(order=3, corrector="reuse", corrector_slope_points=1),
            "corrector_slope_points 1 is not open",
        ),
        (StepSpec(order=2, formulation="velocity"), "velocity"),
    ],
)
def test_what_stays_outside_wider_spaces_says_why(step, reason):
    domain = OdeDomain(VPLinear(), 5, SPACES["no-slopes"])
    base = baseline("ddim/time", domain.noise, 5)
    steps = (*base.steps[:3], step, base.steps[4])
    assert reason in str(domain.contains(base.model_copy(update={"steps": steps})))


def test_order_one_after_a_reuse_corrector_has_a_formulation():
    """There D and eps do not recombine to the corrected state: data and noise form differ."""
    noise = VPLinear()
    base = baseline("ddim/logsnr", noise, 4)
    steps = [StepSpec(corrector="reuse"), StepSpec(formulation="noise"), *base.steps[2:]]
    schedule = base.model_copy(update={"steps": tuple(steps)})
    assert "step 1: formulation 'noise' is not open" in str(OdeDomain(noise, 4).contains(schedule))
    domain = OdeDomain(noise, 4, USF)
    assert domain.params(schedule)["formulation_1"] == "noise"
    domain.canonical(schedule).program.require_equal(schedule.program, 1e-8)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("formulation", ["data", "noise"])
def test_singlestep_solvers_are_members_where_starts_are_open(formulation, order):
    noise = VPLinear()
    times = baseline("ddim/logsnr", noise, 6).times
    schedule = singlestep(formulation, noise, times, order)
    domain = OdeDomain(noise, 6, StepChoices(starts=order - 1))
    canonical = domain.canonical(schedule)
    canonical.program.require_equal(schedule.program, 1e-8)
    assert max(s.start for s in canonical.steps) == order - 1
    assert "start" in str(OdeDomain(noise, 6).contains(schedule))


@pytest.mark.parametrize(
    "path", sorted((REFERENCE / "usf_schedules").glob("*.json")), ids=lambda p: p.stem
)
def test_every_published_usf_schedule_is_a_member_of_usfs_space(path):
    schedule = import_usf(path, v3="identity")
    noise, end = schedule.noise, schedule.times[-1]
    domain = OdeDomain(
        noise,
        schedule.nfe,
        StepChoices(corrector_orders=True),
        first=("network", "zero", "mean"),
        start_band=(0.9 * noise.t_range[0], noise.t_range[0]),
        end_band=(end - 1e-3 * abs(end) - 1e-5, 1.5 * end + 1e-2),
        min_gap=0.005,
        constant=torch.zeros(1),
    )
    canonical = domain.canonical(schedule)
    canonical.program.require_equal(schedule.program, 1e-7)  # times on the grid of 1e-9 in lam
    assert domain.canonical(canonical) == canonical


def test_times_move_along_differences_of_members_whose_start_is_infinite():
    domain = OdeDomain(RectifiedFlow(), 6)
    rng = np.random.default_rng(0)
    members = [domain.sample(rng) for _ in range(12)]
    lam = [np.array(domain.lam(s.times)) for s in members if s.n_steps == 6]
    assert len(lam) >= 3
    assert all(np.isneginf(row[0]) for row in lam)
    moved = moved_times(domain, lam[0], lam, 200, rng)  # warnings are errors
    assert len(moved) > 50
    assert np.array_equal(moved[0], lam[0])
    assert (np.diff(moved, axis=1) >= domain.min_gap).all()
