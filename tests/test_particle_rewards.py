"""Rewards on particles: weights by gradient and by path, hard constraints, ramps, and warnings.

The oracle of the path weights has no tolerance for finite steps: for Gaussian data the sampler
without a reward is a chain of linear Gaussian steps, so its law is known at any number of steps,
and a reward tilts exactly that law.
"""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch

from fewstep.samplers.particle_steps import euler, exponential
from fewstep.samplers.particles import ParticleCollapse, sample_particles, start_particles
from fewstep.samplers.rewards import Reward
from fewstep.samplers.targets import anneal, average, guidance, reward
from fewstep.space import ModelError, OdeSchedule, ScheduleError, StepSpec, load_schedule, noise
from fewstep.space.baselines import grid
from fewstep.space.particles import ParticleSchedule, ParticleStep, ramp_share
from tests.oracles import gaussian, two_modes

VP = noise.VPLinear(t_start=0.6, t_end=0.01)
VE = noise.EDM(sigma_max=3.0, sigma_min=0.05)
FULL = noise.VPLinear()
RULES = ("never", "ess", "always", "clocks")
STUDIES = Path(__file__).parents[1] / "experiments" / "studies"


def run(schedule, target, *, P=16, K=1000, seed=0, warn_ess=0.0):
    g = torch.Generator().manual_seed(seed)
    x_T = start_particles(schedule, target, torch.randn(P, K, 1, generator=g, dtype=torch.float64))
    return sample_particles(schedule, target, x_T, generator=g, warn_ess=warn_ess)


def require(values, exact, bias=0.0):
    error = abs(float(values.mean()) - exact)
    allowed = 4.5 * float(values.std()) / math.sqrt(len(values)) + bias
    assert error <= allowed, f"{float(values.mean()):.4f} against {exact:.4f}, allowed {allowed}"


def chain(schedule, mean=0.7, variance=0.25):
    """Mean and variance in the frame of x/alpha of the sampler's own law for N(mean, variance)."""
    t = torch.tensor(schedule.times, dtype=torch.float64)
    alpha, sigma = schedule.noise.alpha(t).tolist(), schedule.noise.sigma(t).tolist()
    gaps = schedule.noise.lam(t).diff().tolist()
    move = exponential if schedule.integrator == "exponential" else euler
    m, v = 0.0, schedule.noise.prior_scale(schedule.times[0]) ** 2
    for i, step in enumerate(schedule.steps):
        c = move(step.zeta, 1.0, tuple(alpha[i : i + 2]), tuple(sigma[i : i + 2]), gaps[i])
        gain = alpha[i] * variance / (alpha[i] ** 2 * variance + sigma[i] ** 2)
        slope = c.x + c.D * gain
        m = slope * m + c.D * (mean - gain * alpha[i] * mean)
        v = slope**2 * v + c.z**2
    return m / alpha[-1], v / alpha[-1] ** 2


def above(m, v, edge):
    """P, mean and second moment of N(m, v) above an edge."""
    s = math.sqrt(v)
    a = (edge - m) / s
    share = 0.5 * math.erfc(a / math.sqrt(2))
    hazard = math.exp(-a * a / 2) / math.sqrt(2 * math.pi) / share
    mean = m + s * hazard
    return share, mean, v * (1 + a * hazard - hazard**2) + mean**2


def ones(y):
    return torch.ones_like(y)


def up(y):
    """A guide over the edge at .9, for the particles below it."""
    return (0.9 - y).clamp(min=0) / 0.25


def few(noise_schedule=VP, n=10, **choices):
    choices = {"zeta": 1.0} | choices
    return ParticleSchedule.uniform(noise_schedule, grid(noise_schedule, n, "logsnr"), **choices)


# --- path weights are exact on the sampler's own law, however few its steps ------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("at", "guide"), [
    ("state", True), ("state", False), ("state", ones), ("data", False), ("data", True),
    ("data", ones),
])  # fmt: skip
@pytest.mark.parametrize("integrator", ["exponential", "euler"])
def test_path_weights_tilt_the_samplers_own_law_exactly(rule, at, guide, integrator):
    schedule = few(resample=rule).model_copy(
        update={"reward_weight": "path", "integrator": integrator}
    )
    m, v = chain(schedule)
    target = reward(gaussian(VP), lambda y: 0.8 * y[:, 0], 1.5, at=at, guide=guide)
    result, last = run(schedule, target), float(VP.alpha(torch.tensor(0.01).double()))
    y = result.x / last
    require(result.mean(y)[:, 0], m + 1.2 * v)
    require(result.mean((y - m - 1.2 * v) ** 2)[:, 0], v, 0.002)
    require(result.log_normalizer.exp(), math.exp(1.2 * m + 0.72 * v))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("at", "guide"), [("state", False), ("state", ones), ("data", False)])
def test_a_hard_constraint_switched_on_at_the_end_is_exact(rule, at, guide):
    def hard(y):
        return torch.where(y[:, 0] > 0.9, 0.0, -math.inf)

    schedule = few(resample=rule).late(0.011)
    assert [s.b for s in schedule.steps] == [0.0] * 10
    m, v = chain(schedule)
    share, mean, square = above(m, v, 0.9)
    last = float(VP.alpha(torch.tensor(0.01).double()))
    result = run(schedule, reward(gaussian(VP), hard, at=at, guide=guide))
    y = result.x / last
    alive = result.log_weights > -math.inf
    assert bool((y[alive] > 0.9).all())
    assert bool((alive == (y[..., 0] > 0.9)).all())
    require(result.mean(y)[:, 0], mean)
    require(result.mean(y**2)[:, 0], square)
    require(result.log_normalizer.exp(), share)
    assert bool((result.draw(500) / last > 0.9).all())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("at", ["state", "data"])
@pytest.mark.parametrize(("late", "guide"), [(True, False), (False, False), (False, up)])
def test_a_hard_constraint_with_a_floor_is_exact_from_whenever_it_acts(rule, at, late, guide):
    hard = reward(
        gaussian(VP), lambda y: torch.where(y[:, 0] > 0.9, 0.0, -math.inf), at=at, guide=guide,
        floor=-3.0,
    )  # fmt: skip
    schedule = few(n=20, resample=rule)
    schedule = schedule.late(schedule.times[14]) if late else schedule
    share, mean, square = above(*chain(schedule), 0.9)
    result = run(schedule, hard)
    y = result.x / float(VP.alpha(torch.tensor(0.01).double()))
    assert bool((y[result.log_weights > -math.inf] > 0.9).all())
    require(result.mean(y)[:, 0], mean)
    require(result.mean(y**2)[:, 0], square)
    require(result.log_normalizer.exp(), share)


def test_resampling_the_dead_before_the_end_leans_away_from_the_border():
    hard = reward(gaussian(VP), lambda y: torch.where(y[:, 0] > 0.9, 0.0, -math.inf), at="data")
    schedule = few(n=20, resample="always")
    schedule = schedule.late(schedule.times[14])
    mean = above(*chain(schedule), 0.9)[1]
    y = run(schedule, hard)
    found = y.mean(y.x)[:, 0] / float(VP.alpha(torch.tensor(0.01).double()))
    assert 0.02 < float(found.mean()) - mean < 0.1
    require(found, mean, 0.1)


def test_who_breaks_a_constraint_is_guided():
    def hard(y):
        return torch.where(y[:, 0] > 1.5, 0.0, -math.inf)

    alive = []
    for guide in (False, lambda y: (1.5 - y).clamp(min=0) / 0.25):
        target = reward(gaussian(VP), hard, guide=guide, floor=-3.0)
        result = run(few(n=40), target, P=2)
        alive.append(float((result.log_weights > -math.inf).double().mean()))
    assert alive[1] > 1.5 * alive[0] > 0


def test_a_constraint_on_the_whole_run_is_exact_where_nothing_is_resampled():
    schedule = few()
    hard = reward(gaussian(VP), lambda y: torch.where(y[:, 0] > 0.9, 0.0, -math.inf), at="data")
    require(run(schedule, hard).log_normalizer.exp(), above(*chain(schedule), 0.9)[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guide", [False, True])
def test_path_weights_agree_with_the_truth_on_a_mixture(rule, guide):
    schedule = few(VE, 160, resample=rule, weight="trapezoid").model_copy(
        update={"reward_weight": "path"}
    )
    target = reward(two_modes(VE), lambda y: 0.8 * y[:, 0] - 0.3 * y[:, 0] ** 2, guide=guide)
    q, grid_y = two_modes(VE), torch.linspace(-8, 8, 8001, dtype=torch.float64)
    spread = q.variances + VE.sigma_min**2
    log_q = torch.logsumexp(
        q.weights.log() - (grid_y[:, None] - q.means[:, 0]) ** 2 / (2 * spread)
        - torch.log(2 * math.pi * spread) / 2, 1)  # fmt: skip
    log_p = log_q + 0.8 * grid_y - 0.3 * grid_y**2
    p = torch.softmax(log_p, 0)
    result = run(schedule, target)
    require(result.mean((result.x > 0).double())[:, 0], float(p[grid_y > 0].sum()), 0.012)
    require(result.mean(result.x**2)[:, 0], float((p * grid_y**2).sum()), 0.012)
    log_z = torch.logsumexp(log_p, 0) + math.log(16 / 8000)
    require(result.log_normalizer, float(log_z), 0.024)


def test_path_weights_go_with_the_models_own_weights():
    """A reward on a target that needs weights itself: Gaussians, guidance and average."""
    near = noise.EDM(sigma_max=3.0, sigma_min=0.02)
    schedule = few(near, 200, resample="ess", weight="trapezoid", zeta=0.8).model_copy(
        update={"reward_weight": "path"}
    )
    a, b = gaussian(near, 0.0, 0.4), gaussian(near, 0.5, 0.2)
    v = 1 / (0.5 / 0.4 + 0.5 / 0.2)
    target = reward(average(a, b), lambda y: y[:, 0], guide=ones)
    result = run(schedule, target)
    require(result.mean(result.x)[:, 0], v * 0.5 * 0.5 / 0.2 + v, 0.01)
    w = 1.3
    v = 1 / ((1 - w) / 0.4 + w / 0.2)
    target = reward(guidance(a, b, w), lambda y: y[:, 0])
    require(run(schedule, target).mean(result.x * 0 + 1)[:, 0], 1.0)
    result = run(schedule, target)
    require(result.mean(result.x)[:, 0], v * w * 0.5 / 0.2 + v, 0.015)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_solver_with_churn_takes_a_reward_weighed_by_its_path(eta):
    times = grid(VE, 60, "logsnr")
    ode = OdeSchedule(noise=VE, times=times, steps=tuple(StepSpec(eta=eta) for _ in range(60)))
    schedule = ParticleSchedule(
        noise=VE, times=times, steps=(ParticleStep(resample="ess"),) * 60, solver=ode,
        reward_weight="path",
    )  # fmt: skip
    target = reward(gaussian(VE), lambda y: y[:, 0])
    m, v = chain(few(VE, 60, zeta=eta))
    result = run(schedule, target)
    require(result.mean(result.x)[:, 0], m + v)
    require(result.log_normalizer.exp(), math.exp(m + v / 2))
    if eta == 0:
        return
    by_gradient = schedule.model_copy(update={"reward_weight": "gradient"})
    with pytest.raises(ScheduleError, match="no solver with eta > 0: use zeta, or reward_weight"):
        run(by_gradient, target)


def test_gradient_weights_have_an_error_of_finite_steps_that_path_weights_lack():
    found = {}
    for way in ("gradient", "path"):
        schedule = few(n=6, resample="ess").model_copy(update={"reward_weight": way})
        m, v = chain(schedule)
        result = run(schedule, reward(gaussian(VP), lambda y: 1.2 * y[:, 0]), P=64)
        y = result.x / float(VP.alpha(torch.tensor(0.01).double()))
        found[way] = abs(float(result.mean(y).mean()) - m - 1.2 * v)
    assert found["path"] < 0.005 < 0.02 < found["gradient"]


# --- dead particles ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_minus_infinity_is_what_a_very_low_reward_becomes(rule):
    results = []
    for low in (-math.inf, -1e5):
        target = reward(gaussian(VP), lambda y: torch.where(y[:, 0] > 0.9, 0.0, low), at="data")  # noqa: B023
        results.append(run(few(resample=rule).late(0.1), target, P=3, K=200))
    assert torch.equal(results[0].x, results[1].x)
    assert torch.equal(results[0].weights, results[1].weights)
    assert torch.equal(results[0].ancestors, results[1].ancestors)
    assert bool(torch.isfinite(results[0].weights).all())


@pytest.mark.parametrize("rule", ["ess", "always", "clocks"])
def test_nobody_descends_from_a_dead_particle(rule):
    schedule = few(n=1, resample=rule)
    target = reward(gaussian(VP), lambda y: torch.where(y[:, 0] > 0.7, 0.0, -math.inf), at="state")
    black = reward(gaussian(VP), target.reward.value, guide=False, ramp=math.inf)
    result = run(schedule, black, P=4, K=100)
    assert bool((result.x / float(VP.alpha(torch.tensor(0.01).double())) > 0.7).all())
    assert bool((result.unique_ancestors < 70).all())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_names_the_particle_and_the_call(rule, value):
    def bad(y):
        r = 0.1 * y[:, 0]
        return torch.where(torch.arange(len(r)) == 123, value, r) if len(calls) == 3 else r

    class Counted:
        noise = VP

        def __call__(self, x, t, **_):
            calls.append(1)
            return gaussian(VP)(x, t)

    for at, guide in (("data", False), ("state", False), ("state", True)):
        calls: list[int] = []
        with pytest.raises(ModelError) as caught:
            run(few(resample=rule), reward(Counted(), bad, at=at, guide=guide), P=4, K=50)
        message = str(caught.value)
        start = f"the reward of particle 23 of population 2 is {value} at call 2 (t ="
        assert message.startswith(start)
        assert "\n" not in message


@pytest.mark.parametrize("rule", RULES)
def test_all_dead_is_one_clear_error(rule):
    target = reward(gaussian(VP), lambda y: torch.full_like(y[:, 0], -math.inf), at="data")
    with pytest.raises(
        ModelError, match=r"all particles of population 0 are dead .*late"
    ) as found:
        run(few(resample=rule), target)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("r", "message"), [
    (lambda y: torch.where(y[:, 0] > 0.7, 0.0, -1.0), "no gradient to follow: .*guide=False"),
    (lambda y: (0 * y[:, 0]) + torch.where(y[:, 0] > 0.7, 0.0, -1.0), "its gradient is 0: give"),
    (lambda y: y[:, 0] + torch.where(y[:, 0] > 0.7, 0.0, -math.inf), "is -inf at call 0 .*'path'"),
])  # fmt: skip
def test_a_constraint_that_its_gradient_cannot_weigh_is_refused(r, message):
    with pytest.raises(ModelError, match=message):
        run(few(), reward(gaussian(VP), r))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Reward(lambda y: y, at="noise"), "'noise' is unknown"),
    (lambda: reward(gaussian(VP), lambda y: y[:, 0], ramp=0.0), "ramp 0.0 must be above 0"),
    (lambda: few().model_copy(update={"ramp": -1.0}), "ramp -1.0 must be above 0"),
    (lambda: few().model_copy(update={"reward_weight": "paths"}), "reward_weight"),
    (lambda: few().late(0.001), "t_on 0.001 is not above the last time"),
    (lambda: run(few().model_copy(update={"ramp": 1.0}), anneal(gaussian(VP), 1.0)),
     "ramp 1 is for a reward, and the target has none"),
    (lambda: reward(gaussian(VP), lambda y: y[:, 0], floor=math.nan), "floor nan must be"),
])  # fmt: skip
def test_choices_of_a_reward_that_mean_nothing_are_one_clear_line(make, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_guide_of_another_shape_is_named():
    target = reward(gaussian(VP), lambda y: y[:, 0], guide=lambda y: y[:, 0])
    with pytest.raises(ModelError, match=r"the guide returned \(16000,\) for points \(16000, 1\)"):
        run(few(), target)


# --- ramps and warnings --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_ramp_makes_every_target_the_noised_tilted_data(scale):
    """N(0, scale^2) tilted by exp(c y) has mean c scale^2, with noise or without."""
    times = grid(FULL, 9, "logsnr")
    t = torch.tensor(times, dtype=torch.float64)
    rho2 = (FULL.sigma(t) / FULL.alpha(t)) ** 2
    mean = (scale**2 + rho2) * torch.tensor(ramp_share(FULL, times, scale), dtype=torch.float64)
    assert torch.allclose(mean, torch.full_like(mean, scale**2), rtol=1e-12)
    assert ramp_share(FULL, times, math.inf) == [1.0] * len(times)
    assert ramp_share(noise.RectifiedFlow(), [1.0], 1.0) == [0.0]


def test_a_reward_on_the_state_ramps_unless_the_schedule_or_the_target_says_otherwise():
    state = reward(gaussian(VP), lambda y: y[:, 0], 2.0)
    held = reward(gaussian(VP), lambda y: y[:, 0], 2.0, ramp=math.inf)
    data = reward(gaussian(VP), lambda y: y[:, 0], 2.0, at="data")
    schedule = few()
    shares = ramp_share(VP, schedule.times[:-1], 1.0)
    assert state.strengths(schedule) == [*(2.0 * s for s in shares), 2.0]
    assert held.strengths(schedule) == data.strengths(schedule) == [2.0] * 11
    told = schedule.model_copy(
        update={"steps": tuple(s.model_copy(update={"b": 2.0}) for s in schedule.steps)}
    )
    assert state.strengths(told) == [2.0] * 11
    assert torch.equal(run(told, state, K=50).x, run(schedule, held, K=50).x)
    half = schedule.model_copy(update={"ramp": 0.5})
    shares = ramp_share(VP, schedule.times[:-1], 0.5)
    assert held.strengths(half) == [*(2.0 * s for s in shares), 2.0]


@pytest.mark.parametrize("way", ["gradient", "path"])
def test_a_strong_state_reward_collapses_with_a_warning_and_ramps_by_default(way):
    """Public case 12: from pure noise, exp(1.5 x) at full strength picks one ancestor."""
    schedule = few(FULL, 80, resample="ess").model_copy(update={"reward_weight": way})
    model = gaussian(FULL, 0.0, 1.0)
    strong = reward(model, lambda y: 1.5 * y[:, 0], ramp=math.inf)
    with pytest.warns(ParticleCollapse, match=r"of 400 particles at step 0 .*ramp") as caught:
        result = run(schedule, strong, P=4, K=400, warn_ess=0.01)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert bool((result.unique_ancestors == 1).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(schedule, reward(model, lambda y: 1.5 * y[:, 0]), K=400, warn_ess=0.01)
        run(schedule, strong, P=4, K=400, warn_ess=0.0)
    assert bool((result.unique_ancestors > 40).all())
    m, v = chain(schedule, 0.0, 1.0)
    require(result.mean(result.x)[:, 0], m + 1.5 * v, 0.05 if way == "gradient" else 0.0)


def test_descending_from_one_particle_warns_even_where_no_single_step_was_hard():
    schedule = few(VE, 150, resample="always", weight="trapezoid")
    target = anneal(two_modes(VE), 2.0)
    with pytest.warns(ParticleCollapse, match=r"[1-9] of 16 populations descend from one"):
        run(schedule, target, K=4, warn_ess=1e-9)


# --- files ---------------------------------------------------------------------------------------


def test_a_file_from_before_is_unchanged_and_the_new_choices_are_read_back(tmp_path):
    text = json.loads((STUDIES / "particles_d8.json").read_text())
    assert load_schedule(text).to_dict() == text
    plain = few(resample="ess")
    assert plain.digest == "4919366fcad9ef2f7471"
    assert not {"reward_weight", "ramp"} & set(plain.to_dict())
    new = plain.model_copy(update={"reward_weight": "path", "ramp": 0.5})
    assert load_schedule(new.to_dict()) == new
    assert len({plain.digest, new.digest, new.model_copy(update={"ramp": None}).digest}) == 3


def test_late_keeps_the_steps_from_its_time_on():
    schedule = ParticleSchedule.uniform(VE, (3.0, 2.0, 1.0, 0.5), b=0.3)
    assert [s.b for s in schedule.late(2.0).steps] == [0.0, 0.3, 0.3]
