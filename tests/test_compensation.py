"""Dynamic compensation: what a ratio means, how it is found, what the original recipe does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.experiments.benchmarks.published_dc import (
    as_published,
    published_indices,
    published_targets,
)
from fewstep.predictors.compensate import compensate
from fewstep.predictors.gauss_newton import Batch
from fewstep.predictors.settings import CompensationTable
from fewstep.samplers import sample
from fewstep.space import OdeSchedule, ScheduleError, StepSpec, StudyError
from fewstep.space.baselines import baseline, unipc
from fewstep.space.coefficients import lagrange_at
from fewstep.space.noise import VPLinear
from fewstep.space.unknowns import with_ratios
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


def ratios(result) -> list[float]:
    return [step.compensation for step in result.schedule.steps]


def teacher(x_T: torch.Tensor, model) -> Batch:
    """Noise and its end points."""
    return Batch(x_T, sample(baseline("dpmpp3m/logsnr", VP, 80), model, x_T))


def test_a_teacher_equal_to_the_student_leaves_every_ratio_at_one():
    base, model, x_T = baseline("unipc2-bh2/logsnr/low", VP, 6), recorded_mixture(VP), states(8)
    batch = Batch(x_T, sample(base, model, x_T))
    result = compensate(base, model, batch, CompensationTable())
    assert ratios(result) == pytest.approx([1.0] * 6, abs=1e-9)
    assert result.after <= result.before < 1e-25


@pytest.mark.parametrize("name", BASES)
def test_the_held_out_error_never_rises_and_the_end_point_improves_on_new_noise(name):
    base, model = baseline(name, VP, 5), recorded_mixture(VP)
    table = CompensationTable(polish=6)
    result = compensate(base, model, teacher(states(48, 1), model), table)
    assert result.after <= result.before
    assert ratios(result)[:2] == [1.0, 1.0]
    assert all(0.5 <= rho <= 1.6 for rho in ratios(result))
    fresh = teacher(states(64, 2), model)
    before, after = (
        float((sample(s, model, fresh.x_T) - fresh.target).square().mean())
        for s in (base, result.schedule)
    )
    assert after < 1.02 * before


def test_ratios_stop_at_their_bounds_and_the_fit_finds_the_best_within():
    base, model = baseline("unipc2-bh2/logsnr/low", VP, 3), recorded_mixture(VP)
    batch = teacher(states(32, 1), model)

    def error(rho: float) -> float:
        schedule = with_ratios(base, [1.0, 1.0, rho])
        return float(batch.errors([schedule.program], model).mean())

    scanned = min((round(0.5 + 0.01 * k, 2) for k in range(111)), key=error)
    free = compensate(base, model, batch, CompensationTable(held=0.0, polish=8))
    assert ratios(free)[2] == pytest.approx(scanned, abs=0.011)
    assert scanned != 1.0
    bounds = {"low": 0.999} if scanned < 1 else {"high": 1.001}
    tight = compensate(base, model, batch, CompensationTable(held=0.0, polish=8, **bounds))
    assert ratios(tight)[2] == pytest.approx(next(iter(bounds.values())), abs=1e-6)


def test_the_original_recipe_goes_through_the_network_and_keeps_its_last_iterate():
    base, model = baseline("unipc2-bh2/logsnr/low", VP, 5), recorded_mixture(VP)
    x_T = states(10, 1)
    targets = published_targets(base, model, x_T, steps=80)
    short, full = (as_published(base, model, x_T, targets, iterations=n) for n in (1, 40))
    assert len(full.losses) == 3
    # one AdamW step moves a ratio by its learning rate, after a decay of rate * weight_decay
    for rho in short.ratios[2:]:
        assert min(abs(rho - 0.9), abs(rho - 1.1)) < 0.003
    assert full.ratios[:2] == (1.0, 1.0)
    assert all(last < first for first, last in full.losses)


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
    base, model = baseline("dpmpp2m/logsnr", VP, 4), recorded_mixture(VP)
    batch = teacher(states(4), model)
    shift = {"time_shift": {"rule": "variance", "window": 10, "cutoff": 0.1}}
    for schedule in (
        baseline("ddpm/logsnr", VP, 4),
        base.model_copy(update={"options": shift}),
    ):
        with pytest.raises(StudyError, match="no program to fit"):
            compensate(schedule, model, batch, CompensationTable())
    short = baseline("ddim/logsnr", VP, 2)  # no step has the older points that a ratio needs
    assert compensate(short, model, batch, CompensationTable()).schedule == short
