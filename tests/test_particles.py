"""Weighted particles: moments against exact truths, for every noise scale, with churn and without.

Truths are one-dimensional grids of prod q_i^{b_i} at the last time, or closed Gaussian forms. A
statistic of P independent populations is accepted within 4.5 standard errors plus the named bias
of finite steps.
"""

import math

import pytest
import torch

from fewstep.samplers import sample
from fewstep.samplers.particles import _ParticleRun, sample_particles, start_particles
from fewstep.samplers.resampling import Clocks, effective, systematic
from fewstep.samplers.targets import Factor, Seen, anneal, average, guidance, product, reward
from fewstep.space import ModelError, OdeSchedule, ScheduleError, StepSpec, noise
from fewstep.space.baselines import baseline, grid, multistep
from fewstep.space.particle_policies import policy
from fewstep.space.particles import ParticleSchedule, ParticleStep
from tests.oracles import Mixture, f64, two_modes

VE = noise.EDM(sigma_max=3.0, sigma_min=0.05)
NEAR = noise.EDM(sigma_max=1.0, sigma_min=0.05)
VP = noise.VPLinear(t_start=0.6, t_end=0.01)
VP_NEAR = noise.VPLinear(t_start=0.28, t_end=0.01)
# With zeta = 0 and B = 2 the flow shrinks the modes, and the weight that mends it sits on rare
# particles: at 1000, 10000, 60000 of them E x^2 from sigma = 1 on is 1.02, 1.04, 1.06 for 1.13.
CLOSE = {NEAR: noise.EDM(sigma_max=0.35, sigma_min=0.05), VP_NEAR: noise.VPLinear(t_start=0.11)}
X = torch.linspace(-14, 14, 20001, dtype=torch.float64)
ZETAS = (0.0, 0.5, 1.0, 2.0)


def density(mixture):
    """log q_t(x) of a one-dimensional mixture."""

    def log_q(x, t):
        alpha, sigma = mixture.noise.alpha(t)[:, None], mixture.noise.sigma(t)[:, None]
        v = alpha**2 * mixture.variances + sigma**2
        z = (x.to(torch.float64) - alpha * mixture.means[:, 0]) ** 2 / v
        return torch.logsumexp(
            mixture.weights.log() - z / 2 - torch.log(2 * math.pi * v) / 2, dim=1
        )

    return log_q


def known(mixture, **options):
    return Factor(mixture, log_density=density(mixture), **options)


def left_mode(schedule):
    return Mixture(schedule, f64(0.6, 0.4), f64(-0.8, 1.0)[:, None], f64(0.3, 0.1))


def log_target(target, t):
    """log of prod q_i^{b_i} on the grid X, in the frame of x/alpha."""
    powers = target.powers(target.strength)
    log_q = [density(f.denoiser)(X[:, None], t) for f in target.factors]
    return sum(b * (q + target.noise.alpha(t).log()) for b, q in zip(powers, log_q, strict=True))


def start_exactly(target, t, shape, generator):
    """States of the target itself at time t, by inversion on the grid."""
    cdf = torch.softmax(log_target(target, torch.full_like(X, t)), 0).cumsum(0)
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    return X[torch.searchsorted(cdf, u).clamp(max=len(X) - 1)]


def truth(target, schedule, extra=None):
    """P(x > 0), E x^2 and the log normaliser in the frame of x/alpha, at the last time."""
    t = torch.full_like(X, schedule.times[-1])
    log_p = log_target(target, t)
    if extra is not None:
        log_p = log_p + extra(X / target.noise.alpha(t))
    step = (X[1] - X[0]) / target.noise.alpha(t[0])
    log_z = torch.logsumexp(log_p, 0) + step.log()
    p = torch.softmax(log_p, 0)
    return float(p[X > 0].sum()), float((p * X**2).sum()), float(log_z)


def run(schedule, target, *, P=8, K=1000, seed=0, exact_start=True, shape=(1,)):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(P, K, *shape, generator=generator, dtype=torch.float64)
    x_T = start_particles(schedule, target, z)
    return sample_particles(
        schedule, target, x_T, generator=generator, exact_start=exact_start, warn_ess=0.0
    )


def near(schedule, target, *, P=8, K=1000, seed=0):
    """Particles that start from the target itself."""
    generator = torch.Generator().manual_seed(seed)
    x_T = start_exactly(target, schedule.times[0], (P, K, 1), generator)
    return sample_particles(schedule, target, x_T, generator=generator, warn_ess=0.0)


def require(values, exact, bias):
    """The mean over populations agrees with the truth."""
    error = abs(float(values.mean()) - exact)
    allowed = 4.5 * float(values.std()) / math.sqrt(len(values)) + bias
    assert error <= allowed, f"{float(values.mean()):.4f} against {exact:.4f}, allowed {allowed}"


def require_moments(result, target, schedule, *, bias=0.012, extra=None, normalizer=True):
    share, square, log_z = truth(target, schedule, extra)
    require(result.mean((result.x > 0).double())[:, 0], share, bias)
    require(result.mean(result.x**2)[:, 0], square, bias)
    if normalizer:
        require(result.log_normalizer, log_z, 2 * bias)


def targets(schedule):
    q1, q2 = known(two_modes(schedule)), known(left_mode(schedule))
    return {
        "anneal": anneal(q1, 1.5),
        "flatten": anneal(q1, 0.8),
        "product": product(q1, q2),
        "average": average(q1, q2),
        "guidance": guidance(q2, q1, 1.5),
    }


@pytest.mark.parametrize("name", ["anneal", "flatten", "product", "average", "guidance"])
@pytest.mark.parametrize("zeta", ZETAS)
@pytest.mark.parametrize("frame", [NEAR, VP_NEAR], ids=["ve", "vp"])
def test_weighted_moments_are_exact_for_every_noise_scale(frame, zeta, name):
    frame = CLOSE[frame] if zeta == 0 and name == "product" else frame
    target = targets(frame)[name]
    schedule = ParticleSchedule.uniform(
        frame, grid(frame, 80, "logsnr"), zeta=zeta, weight="trapezoid", resample="ess"
    )
    require_moments(near(schedule, target), target, schedule, normalizer=False)


@pytest.mark.parametrize("name", ["anneal", "flatten", "product", "average", "guidance"])
def test_moments_and_the_normaliser_are_exact_from_noise_on(name):
    target = targets(VE)[name]
    schedule = ParticleSchedule.uniform(
        VE, grid(VE, 160, "logsnr"), zeta=1.0, weight="trapezoid", resample="ess"
    )
    require_moments(run(schedule, target), target, schedule)


@pytest.mark.parametrize("choices", [
    {"weight": "left", "resample": "always"},
    {"weight": "trapezoid", "resample": "never"},
    {"weight": "left", "resample": "clocks"},
])  # fmt: skip
def test_moments_do_not_depend_on_the_rule_of_resampling(choices):
    target = targets(NEAR)["guidance"]
    schedule = ParticleSchedule.uniform(NEAR, grid(NEAR, 80, "logsnr"), zeta=0.7, **choices)
    require_moments(near(schedule, target), target, schedule, bias=0.02, normalizer=False)


def test_weights_are_needed():
    target = targets(VE)["guidance"]
    schedule = ParticleSchedule.uniform(VE, grid(VE, 160, "logsnr"), zeta=1.0, weight="none")
    result = run(schedule, target, exact_start=False)
    square = truth(target, schedule)[1]
    assert bool(result.log_normalizer.isnan().all())
    off = abs(float((result.x**2).mean()) - square)
    assert off > 0.05, "without weights guidance draws another law"


def churned(noise_schedule, times, eta, order):
    plain = multistep(
        noise_schedule, times, order, spec=lambda p, last: {"formulation": "data", "eta": eta}
    )
    return ParticleSchedule(
        noise=noise_schedule,
        times=plain.times,
        steps=(ParticleStep(weight="left", resample="ess"),) * plain.n_steps,
        solver=plain,
    )


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", ["guidance", "anneal"])
def test_churn_leaves_the_weighted_moments_alone(name, eta):
    target = targets(NEAR)[name]
    schedule = churned(NEAR, grid(NEAR, 120, "logsnr"), eta, 1 if eta else 2)
    result = near(schedule, target)
    require_moments(result, target, schedule, bias=0.02, normalizer=False)


def test_weighing_the_denoised_interval_instead_of_the_base_gap_is_caught(monkeypatch):
    target = targets(NEAR)["guidance"]
    schedule = churned(NEAR, grid(NEAR, 120, "logsnr"), 0.9, 1)
    square = truth(target, schedule)[1]

    def denoised(self, i, seen):  # the released rule: from lam_i to where the solver lands
        h = self.gaps[i] - 0.5 * math.log(1 + math.expm1(-2 * self.gaps[i]) * 0.9**2)
        return -math.expm1(-2 * h) / 2 * self.rate

    right = near(schedule, target)
    monkeypatch.setattr(_ParticleRun, "_step_weight", denoised)
    wrong = near(schedule, target)
    require(right.mean(right.x**2)[:, 0], square, 0.02)
    with pytest.raises(AssertionError):
        require(wrong.mean(wrong.x**2)[:, 0], square, 0.02)


@pytest.mark.parametrize("solver", [None, "dpmpp2m/logsnr"])
@pytest.mark.parametrize("zeta", [0.0, 1.3])
def test_one_model_with_b_1_leaves_every_weight_equal(solver, zeta):
    times = grid(VE, 12, "logsnr")
    ode = None if solver is None else baseline(solver, VE, 12)
    step = ParticleStep(zeta=0 if solver else zeta, weight="trapezoid", resample="always")
    schedule = ParticleSchedule(noise=VE, times=times, steps=(step,) * 12, solver=ode)
    for target in (anneal(two_modes(VE), 1.0), average(*[two_modes(VE)] * 2)):
        result = run(schedule, target, exact_start=False, K=50)
        assert bool((result.log_weights == 0).all())
        assert bool((result.ess - 1).abs().max() < 1e-12)
        assert bool((result.unique_ancestors == 50).all())
        assert float(result.log_normalizer.abs().max()) < 1e-12


def test_neutral_steps_give_the_solvers_samples_bit_for_bit():
    ode = baseline("dpmpp2m/logsnr", VE, 12)
    step = ParticleStep()
    schedule = ParticleSchedule(noise=VE, times=ode.times, steps=(step,) * 12, solver=ode)
    target = anneal(two_modes(VE), 1.0)
    x_T = start_particles(schedule, target, torch.randn(2, 20, 1, dtype=torch.float64))
    found = sample_particles(schedule, target, x_T).x.flatten(0, 1)
    assert torch.equal(found, sample(ode, two_modes(VE), x_T.flatten(0, 1)))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_zeta_0_is_ddim_and_zeta_1_the_ancestral_step(eta):
    steps = tuple(StepSpec(eta=eta) for _ in range(8))
    ode = OdeSchedule(noise=VP, times=grid(VP, 8, "time"), steps=steps)
    plain = ParticleSchedule.uniform(VP, ode.times, zeta=eta)
    other = plain.model_copy(update={"solver": ode, "steps": (ParticleStep(),) * 8})
    target = anneal(two_modes(VP), 1.0)
    a, b = (run(s, target, K=30, exact_start=False).x for s in (plain, other))
    assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_everything_attached_to_a_particle_moves_with_it():
    ode = baseline("dpmpp3m/logsnr", VE, 15)
    step = ParticleStep(weight="trapezoid", resample="always")
    schedule = ParticleSchedule(noise=VE, times=ode.times, steps=(step,) * 15, solver=ode)
    target = guidance(left_mode(VE), two_modes(VE), 2.0)
    x_T = start_particles(schedule, target, torch.randn(3, 40, 1, dtype=torch.float64))
    result = sample_particles(schedule, target, x_T, generator=torch.Generator().manual_seed(1))
    still = ParticleSchedule(
        noise=VE, times=ode.times, steps=(ParticleStep(weight="none"),) * 15, solver=ode
    )
    alone = sample_particles(still, target, x_T).x
    assert bool((result.unique_ancestors < 40).all())
    assert torch.allclose(result.x[..., 0], alone[..., 0].gather(1, result.ancestors), atol=1e-12)


def test_systematic_counts_are_the_floor_or_the_ceiling():
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(torch.randn(200, 37, generator=generator, dtype=torch.float64) * 2, 1)
    index = systematic(weights, generator)
    counts = torch.zeros_like(weights).scatter_add(1, index, torch.ones_like(weights))
    assert bool((counts >= torch.floor(37 * weights - 1e-9)).all())
    assert bool((counts <= torch.ceil(37 * weights + 1e-9)).all())
    equal = torch.full((5, 100), 0.01, dtype=torch.float64)
    assert torch.equal(systematic(equal, generator), torch.arange(100).expand(5, 100))
    none = f64(0.5, 0.5, 0.0)[None]
    assert int(systematic(none, generator, count=1000).max()) == 1
    assert float(effective(torch.tensor([[0.0, -math.inf]]))[0]) == 0.5
    assert float(effective(torch.full((1, 3), -math.inf))[0]) == 0


def test_clocks_have_the_weights_descendants_on_average_whatever_their_size():
    g = torch.Generator().manual_seed(0)
    log_w = f64(0.0, 1.5, -0.7, -math.inf, 0.2)[None].expand(40_000, 5)
    index, due = Clocks(log_w, g).ring(log_w)
    counts = torch.zeros(40_000, 5).scatter_add(1, index, torch.ones_like(index).float())
    assert bool(due.all())
    assert bool((counts[:, 3] == 0).all())
    error = counts.double().mean(0) - 5 * torch.softmax(log_w[0], 0)
    assert float(error.abs().max()) < 4.5 * float(counts.std(0).max()) / 200
    still, idle = Clocks(torch.zeros_like(log_w), g).ring(torch.zeros_like(log_w))
    assert not bool(idle.any())
    assert torch.equal(still[0], torch.arange(5))


@pytest.mark.parametrize("a", [0.0, 0.5])
def test_the_papers_table_is_the_one_formula(a):
    g = torch.Generator().manual_seed(0)
    s1, s2 = torch.randn(2, 6, 4, generator=g, dtype=torch.float64)
    zero = torch.zeros_like(s1)
    b, sigma = 1.7, 0.8  # the paper's sigma^2 dt; with rho = 1, dlam = sigma^2 dt / 2 * 2 / ...
    half = sigma**2 / 2

    def rate(*parts):  # (sigma^2/2) (|S|^2 - sum b |s|^2), eps = -s
        eps, powers = [p for p, _ in parts], [w for _, w in parts]
        squares = tuple((e**2).sum(1) for e in eps)
        gaps = {(i, j): ((eps[i] - eps[j]) ** 2).sum(1) for j in range(len(eps)) for i in range(j)}
        return half * Seen(zero, tuple(eps), squares, gaps).rate(powers)

    def dot(u, v):
        return (u * v).sum(1)

    cfg = half * b * (b - 1) * dot(s1 - s2, s1 - s2)
    assert torch.allclose(rate((s1, 1 - b), (s2, b)), cfg)
    assert torch.allclose(rate((s1, b)), (b - 1) * half * b * dot(s1, s1))
    both = b * (b - 1) * half * dot(s1 + s2, s1 + s2) + b * sigma**2 * dot(s1, s2)
    assert torch.allclose(rate((s1, b), (s2, b)), both)
    zeta2, eta = (b + 2 * a * (1 - b)) / b, b + (1 - b) * a
    assert math.isclose((1 + zeta2) / 2 * b, eta)
    name = "target_score" if a == 0 else "tempered_noise"
    assert math.isclose(policy(name, VE, (3.0, 1.0), b=b).steps[0].zeta ** 2, zeta2)


def test_product_of_gaussians_in_two_dimensions_is_the_closed_form():
    q1 = Mixture(VE, f64(1.0), torch.tensor([[0.5, -1.0]], dtype=torch.float64), f64(0.4))
    q2 = Mixture(VE, f64(1.0), torch.tensor([[-0.5, 0.3]], dtype=torch.float64), f64(0.2))
    long = noise.EDM(sigma_max=8.0, sigma_min=0.02)
    q1.noise = q2.noise = long
    schedule = ParticleSchedule.uniform(
        long, grid(long, 250, "logsnr"), zeta=1.0, weight="trapezoid", resample="ess"
    )
    result = run(schedule, product(q1, q2), exact_start=False, shape=(2,))
    v1, v2 = 0.4 + 0.02**2, 0.2 + 0.02**2
    v = v1 * v2 / (v1 + v2)
    mean = v * (q1.means[0] / v1 + q2.means[0] / v2)
    for k in range(2):
        require(result.mean(result.x)[:, k], float(mean[k]), 0.02)
        require(result.mean((result.x - mean) ** 2)[:, k], v, 0.02)
    square = float(((q1.means[0] - q2.means[0]) ** 2).sum())
    log_z = -math.log(2 * math.pi * (v1 + v2)) - square / 2 / (v1 + v2)
    require(result.log_normalizer, log_z, 0.08)


def ramp(schedule, top):
    """b rising from 0 to its full value as the states become clear."""
    sigma = torch.tensor(schedule.times[:-1])
    b = (top / (1 + 4 * sigma**2)).tolist()
    steps = [s.model_copy(update={"b": x}) for s, x in zip(schedule.steps, b, strict=True)]
    return schedule.model_copy(update={"steps": tuple(steps)})


@pytest.mark.parametrize("zeta", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("at", ["state", "data"])
def test_a_linear_reward_tilts_exactly(zeta, at):
    target = reward(known(two_modes(VE)), lambda y: 0.8 * y[:, 0], 1.5, at=at)
    schedule = ParticleSchedule.uniform(
        VE, grid(VE, 160, "logsnr"), zeta=zeta, weight="trapezoid", resample="ess"
    )
    schedule = ramp(schedule, 1.5)
    require_moments(run(schedule, target), target, schedule, bias=0.02, extra=lambda y: 1.2 * y)


def test_a_changing_b_is_exact_where_the_density_is_given():
    target = anneal(known(two_modes(VE)), 2.0)
    schedule = ParticleSchedule.uniform(
        VE, grid(VE, 160, "logsnr"), zeta=1.0, weight="trapezoid", resample="ess"
    )
    rising = [1 + i / 160 for i in range(160)]
    steps = [s.model_copy(update={"b": b}) for s, b in zip(schedule.steps, rising, strict=True)]
    schedule = schedule.model_copy(update={"steps": tuple(steps)})
    require_moments(run(schedule, target), target, schedule, bias=0.02)
    unknown = anneal(two_modes(VE), 2.0)
    with pytest.raises(
        ScheduleError, match=r"step 1: b changes from 1 to .* log_density of model 0"
    ):
        run(schedule, unknown, exact_start=False)


def test_states_at_infinite_rho_and_on_clean_data_are_fine():
    flow = noise.RectifiedFlow()
    q1, q2 = two_modes(flow), left_mode(flow)

    class Safe:  # what a network does at alpha = 0: D is the data mean
        def __init__(self, mixture):
            self.mixture, self.noise = mixture, mixture.noise

        def __call__(self, x, t, **_):
            if float(t[0]) == 1.0:
                return (self.mixture.weights @ self.mixture.means).expand_as(x)
            return self.mixture(x, t)

    times = (*grid(flow, 60, "time", t_end=0.01), 0.0)
    schedule = ParticleSchedule.uniform(flow, times, zeta=0.8, weight="trapezoid")
    result = run(schedule, guidance(Safe(q1), Safe(q2), 1.3), exact_start=False)
    assert bool(torch.isfinite(result.x).all())
    assert bool(torch.isfinite(result.log_normalizer).all())


def test_conditions_belong_to_populations_and_calls_are_counted():
    class Shifted(Mixture):
        def __call__(self, x, t, *, cond=None, guidance=None):
            shift = cond["shift"][:, None]
            return super().__call__(x - shift, t) + shift

    base = two_modes(VE)
    q = Shifted(VE, base.weights, base.means, base.variances)
    factors = [Factor(q, cond={"shift": f64(0.0, 5.0)}), Factor(q, cond={"shift": f64(0.0, 5.0)})]
    schedule = ParticleSchedule.uniform(VE, grid(VE, 30, "logsnr"), zeta=1.0)
    result = run(schedule, average(*factors), P=2, exact_start=False)
    assert result.calls == q.calls == 60
    assert 4 < float(result.x[1].mean() - result.x[0].mean()) < 5.5
    wrong = average(Factor(q, cond={"shift": f64(0.0, 1.0, 2.0)}), q)
    with pytest.raises(ModelError, match="'shift' of model 0 has 3 rows: give 1 or one for each"):
        run(schedule, wrong, P=2, exact_start=False)


def test_float32_states_have_float64_weights():
    schedule = ParticleSchedule.uniform(VE, grid(VE, 10, "logsnr"), zeta=1.0)
    target = anneal(two_modes(VE), 2.0)
    result = sample_particles(
        schedule, target, start_particles(schedule, target, torch.randn(2, 9, 1))
    )
    assert result.x.dtype == torch.float32
    assert result.log_weights.dtype == torch.float64
    assert result.draw(4).shape == (2, 4, 1)


# --- wrong input ---------------------------------------------------------------------------------


def test_models_on_another_noise_schedule_are_refused():
    schedule = ParticleSchedule.uniform(VE, grid(VE, 5, "logsnr"))
    with pytest.raises(
        ScheduleError, match=r"model 1 has noise .*vp_linear.* share the schedule's"
    ):
        run(schedule, product(two_modes(VE), two_modes(VP)), exact_start=False)


def test_an_exact_start_needs_densities():
    schedule = ParticleSchedule.uniform(VE, grid(VE, 5, "logsnr"))
    with pytest.raises(ScheduleError, match="exact_start needs log_density of model 0"):
        run(schedule, anneal(two_modes(VE), 2.0))


def test_a_model_that_diverges_is_named():
    schedule = ParticleSchedule.uniform(VE, grid(VE, 5, "logsnr"))

    class Broken(Mixture):
        def __call__(self, x, t, **_):
            return x * math.nan

    q = two_modes(VE)
    broken = Broken(VE, q.weights, q.means, q.variances)
    with pytest.raises(ModelError, match=r"data prediction of model 0 at t = 3 is not finite"):
        run(schedule, anneal(broken, 2.0), exact_start=False)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: anneal(two_modes(VE), -1.0), "sum to -1: the target has no start"),
    (lambda: anneal(two_modes(VE), math.nan), "must be finite"),
    (lambda: average(two_modes(VE), weights=[1, 2]), "give one >= 0 for each"),
    (lambda: product(), "at least one model"),
])  # fmt: skip
def test_a_target_that_means_nothing_is_one_clear_line(make, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
