"""Dynamic compensation: what a ratio means, how it is found, what the original recipe does."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fewstep.experiments.benchmarks.published_dc import as_published, published_indices
from fewstep.samplers import sample
from fewstep.search.strategies.compensation import (
    Settings,
    Trace,
    compensate,
    line_search,
    polynomial_minimum,
    with_ratios,
)
from fewstep.search.strategies.targets import (
    aligned_grid,
    aligned_targets,
)
from fewstep.space import OdeSchedule, ScheduleError, StepSpec, StudyError
from fewstep.space.baselines import baseline, unipc
from fewstep.space.coefficients import lagrange_at
from fewstep.space.noise import RectifiedFlow, VPDiscrete, VPLinear
from tests.oracles import f64, recorded_mixture

VP = VPLinear()
BASES = ("unipc2-bh2/logsnr/low", "dpmpp2m/logsnr", "ddim/time", "deis-tab2/quadratic")


def states(batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 2, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", BASES)
def test_ratio_one_is_the_base_bit_for_bit(name):
    base = baseline(name, VP, 6)
    assert with_ratios(base, [1.0] * 6).program.digest == base.program.digest
    model = recorded_mixture(VP)
    same = sample(with_ratios(base, [1.0] * 6), model, states(2))
    assert torch.equal(same, sample(base, model, states(2)))


@pytest.mark.parametrize("i", [0, 1])
def test_a_ratio_in_the_warm_up_is_refused(i):
    ratios = [1.0] * 5
    ratios[i] = 1.1
    with pytest.raises(ScheduleError, match=f"step {i}: compensation 1.1 needs 2 older points"):
        with_ratios(baseline("unipc2-bh2/logsnr", VP, 5), ratios)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_interpolation_is_exact_on_its_degree_and_keeps_constants(degree):
    nodes = list(f64(0.7, 0.9, 0.96, 1.0))[: degree + 1]
    for rho in (-1.0, 0.0, 0.4, 1.0, 1.7):
        at = rho * nodes[0] + (1 - rho) * nodes[1]
        weights = lagrange_at(nodes, at)
        assert float(sum(weights)) == pytest.approx(1.0, abs=1e-12)
        value = sum(w * (2 - 3 * t + t**degree) for w, t in zip(weights, nodes, strict=True))
        assert float(value) == pytest.approx(float(2 - 3 * at + at**degree), abs=1e-11)
    weights = lagrange_at(nodes, nodes[1])
    assert [float(w) for w in weights] == [0.0, 1.0, *[0.0] * (degree - 1)]


def test_the_buffer_keeps_the_compensated_value():
    """Step 3 of a two-point method must see the replaced output of step 2."""
    base = baseline("dpmpp2m/logsnr", VP, 4)
    program = with_ratios(base, [1.0, 1.0, 1.3, 1.0]).program
    assert not torch.allclose(program.b[2], base.program.b[2])
    lam = VP.lam(torch.tensor(base.times, dtype=torch.float64))
    nodes = list(torch.tensor(base.times, dtype=torch.float64)[[2, 1, 0]])
    weights = lagrange_at(nodes, 1.3 * nodes[0] - 0.3 * nodes[1])
    # row 3 of 2M: newest output D_3 and, as the older one, the replaced D_2
    h = float(lam[4] - lam[3])
    share = 0.5 * h / float(lam[3] - lam[2])
    alpha = float(VP.alpha(f64(base.times[4])))
    total = -alpha * np.expm1(-h)
    assert float(program.b[3, 3]) == pytest.approx(total * (1 + share), rel=1e-10)
    for j, w in zip((2, 1, 0), weights, strict=True):
        assert float(program.b[3, j]) == pytest.approx(-total * share * float(w), rel=1e-9)


@pytest.mark.parametrize("name", BASES)
def test_compensation_costs_no_calls_and_runs_twice_alike(name):
    schedule = with_ratios(baseline(name, VP, 5), [1.0, 1.0, 0.8, 1.1, 1.2])
    model = recorded_mixture(VP)
    first = sample(schedule, model, states(2))
    assert model.calls == schedule.nfe == 5
    assert torch.equal(first, sample(schedule, model, states(2)))


@pytest.mark.parametrize("name", BASES)
def test_the_trace_reproduces_the_sampler(name):
    schedule = with_ratios(baseline(name, VP, 5), [1.0, 1.0, 0.8, 1.1, 1.2])
    model, x_T = recorded_mixture(VP), states(3)
    trace = Trace(schedule, model, x_T)
    calls, landed = trace.plan([s.compensation for s in schedule.steps])
    end = trace.value(landed[-1][0], trace.ask(calls, [], landed[-1][1]))
    assert torch.allclose(end, sample(schedule, model, x_T), atol=1e-11)
    assert trace.calls == 5 * len(x_T)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_closed_form_is_the_minimum_a_line_search_finds(degree):
    generator = torch.Generator().manual_seed(degree)
    for _ in range(20):
        rows = torch.randn(degree + 1, 40, generator=generator, dtype=torch.float64)

        def landing(rho, rows=rows):
            return sum(row * (rho - 1) ** k for k, row in enumerate(rows))

        def loss(rho, landing=landing):
            value = float(landing(rho).square().mean())
            return value, value

        rho = polynomial_minimum(landing, degree, 0.5, 1.6)
        assert 0.5 <= rho <= 1.6
        searched, _ = line_search(loss, (0.5, 1.6), 1.0, loss(1.0), Settings(coarse=45, fine=40))
        assert loss(rho)[0] <= loss(searched)[0] + 1e-10
        assert loss(rho)[0] == pytest.approx(loss(searched)[0], abs=1e-10)


def test_a_teacher_equal_to_the_student_leaves_every_ratio_at_one():
    base, model, x_T = baseline("unipc2-bh2/logsnr/low", VP, 6), recorded_mixture(VP), states(8)
    trace = Trace(base, model, x_T)
    calls, landed = trace.plan([1.0] * 6)
    outputs = trace.ask(calls, [], base.nfe)
    own = [x_T, *(trace.value(vector, outputs) for vector, _ in landed)]
    result = compensate(base, model, x_T, own)
    assert result.ratios == (1.0,) * 6
    assert result.before == result.after == 0.0
    assert result.schedule.program.digest == base.program.digest


@pytest.mark.parametrize("name", BASES)
def test_the_held_out_error_never_rises_and_the_end_point_improves_on_new_noise(name):
    base, model = baseline(name, VP, 5), recorded_mixture(VP)
    x_T = states(48, 1)
    result = compensate(base, model, x_T, aligned_targets(base, model, x_T, calls=80))
    assert result.after <= result.before
    assert all(r.after <= r.before for r in result.steps)
    assert result.ratios[:2] == (1.0, 1.0)
    assert all(0.5 <= rho <= 1.6 for rho in result.ratios)
    fresh = states(64, 2)
    target = aligned_targets(base, model, fresh, calls=80)[-1]
    before, after = (
        float((sample(s, model, fresh) - target).square().mean()) for s in (base, result.schedule)
    )
    assert after < 1.02 * before


def test_the_original_recipe_goes_through_the_network_and_keeps_its_last_iterate():
    base, model = baseline("unipc2-bh2/logsnr/low", VP, 5), recorded_mixture(VP)
    x_T = states(10, 1)
    targets = aligned_targets(base, model, x_T, calls=80)
    short, full = (as_published(base, model, x_T, targets, iterations=n) for n in (1, 40))
    assert [r.method for r in full.steps] == ["adamw"] * 3
    # one AdamW step moves a ratio by its learning rate, after a decay of rate * weight_decay
    for rho in short.ratios[2:]:
        assert min(abs(rho - 0.9), abs(rho - 1.1)) < 0.003
    assert full.ratios[:2] == (1.0, 1.0)
    assert all(r.after < r.before for r in full.steps)
    assert full.after < full.before


@pytest.mark.parametrize(
    ("noise", "times"),
    [
        (VP, (1.0, 0.7, 0.4, 0.2, 0.05, 1e-3)),
        (VPDiscrete(), (999.0, 700.0, 300.0, 120.0, 30.0, -1.0)),
        (RectifiedFlow(t_end=0.0), (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)),
    ],
)
def test_the_five_targets_of_five_steps_are_the_states_at_its_times(noise, times):
    parts = aligned_grid(noise, times, 60)
    flat = [t for part in parts for t in part]
    assert [part[0] for part in parts] == list(times[:-1])
    assert all(a > b for a, b in pairwise(flat))
    if noise.type == "rectified_flow":
        return  # D at pure noise is fine for the grid; the mixture divides by alpha there
    steps = (StepSpec(),) * 5
    model, x_T = recorded_mixture(noise), states(2)
    coarse = OdeSchedule(noise=noise, times=times, steps=steps)
    targets = aligned_targets(coarse, model, x_T, calls=120)
    finer = aligned_targets(coarse, model, x_T, calls=480)
    assert len(targets) == 6
    assert torch.equal(targets[0], x_T)
    for a, b in zip(targets, finer, strict=True):
        assert torch.allclose(a, b, atol=5e-3)


def test_the_released_targets_repeat_both_slips():
    student = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    teacher = [1 - k / 10 for k in range(11)]
    found = published_indices(student, teacher)
    # one teacher step past the time asked; the last but one matched to the end
    assert found == [3, 5, 7, 10, 10]


def test_a_second_order_corrector_is_exact_where_the_fixed_half_is_not():
    """UniC-2 integrates outputs linear in lam exactly; the order-1 corrector with 1/2 does not."""
    noise, times = VP, tuple(float(VP.t_of_lam(f64(v))) for v in (-1.0, -0.4, 0.3))

    class Linear:
        def __init__(self):
            self.noise = noise

        def __call__(self, x, t, *, cond=None, guidance=None):
            lam = noise.lam(t.double())
            return torch.ones_like(x) * (1 + 2 * lam).reshape(-1, 1)

    def exact(x):
        lam = noise.lam(torch.tensor(times, dtype=torch.float64))
        h = float(lam[2] - lam[0])
        a, s0, s2 = (float(v) for v in (noise.alpha(f64(times[2])), noise.sigma(f64(times[0])),
                                        noise.sigma(f64(times[2]))))  # fmt: skip
        first = 1 + 2 * float(lam[0])
        integral = first * -np.expm1(-h) + 2 * (h + np.expm1(-h))
        return x * s2 / s0 + a * integral

    x = f64(0.3, -1.0)[:, None]
    errors = {}
    for relaxation in ("none", "bh2"):
        fields = unipc("bh2")(1, False) | {"corrector_relaxation": relaxation}
        steps = (StepSpec(order=1, **fields), StepSpec(order=2))
        schedule = OdeSchedule(noise=noise, times=times, steps=steps)
        errors[relaxation] = float((sample(schedule, Linear(), x) - exact(x)).abs().max())
    assert errors["none"] < 1e-12
    assert errors["bh2"] > 1e-4


def test_what_cannot_be_compensated_is_refused():
    base, model, x_T = baseline("dpmpp2m/logsnr", VP, 4), recorded_mixture(VP), states(4)
    targets = aligned_targets(base, model, x_T, calls=20)
    with pytest.raises(StudyError, match="4 targets for 5 times"):
        compensate(base, model, x_T, targets[1:])
    thresholded = base.model_copy(update={"options": {"threshold": {}}})
    with pytest.raises(StudyError, match="run-time options"):
        compensate(thresholded, model, x_T, targets)
    with pytest.raises(StudyError, match="eta > 0"):
        compensate(baseline("ddpm/logsnr", VP, 4), model, x_T, targets)
    with pytest.raises(StudyError, match="must lie around 1"):
        Settings(low=1.1)
