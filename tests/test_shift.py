"""The variance-driven time shift: neutral settings, hand cases of both semantics, its bias."""

from __future__ import annotations

import pytest
import torch

from fewstep.samplers import run, sample
from fewstep.samplers.shift import main_calls, select
from fewstep.space import OdeSchedule, ScheduleError, StepSpec
from fewstep.space.baselines import baseline, f_pndm, named
from fewstep.space.errors import ModelError
from fewstep.space.noise import EDM, VPDiscrete, VPLinear
from fewstep.space.options import VarianceRule
from tests.oracles import Mixture, f64, gaussian, recorded_mixture, reference_noise

DDPM = reference_noise("ddpm_linear")
OFF = {"rule": "variance", "window": 0, "cutoff": 200.0}


def shifted(schedule: OdeSchedule, **changes) -> OdeSchedule:
    return schedule.model_copy(update={"options": {"time_shift": OFF | changes}})


def rule_of(schedule: OdeSchedule) -> VarianceRule:
    return VarianceRule.of(schedule.options)


def states(batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 2, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("semantics", ["paper", "pnm"])
@pytest.mark.parametrize("name", ["ddim/time", "unipc3-bh2/logsnr", "s-pndm/time", "heun/edm"])
@pytest.mark.parametrize("change", [{}, {"window": 30, "cutoff": 999.0}])
def test_a_window_of_zero_and_a_cutoff_above_all_times_are_the_base_bit_for_bit(
    name, semantics, change
):
    base, model = baseline(name, DDPM, 7), recorded_mixture(DDPM)
    for dtype in (torch.float32, torch.float64):
        x_T = states(3).to(dtype)
        x = sample(shifted(base, semantics=semantics, **change), model, x_T)
        assert torch.equal(x, sample(base, model, x_T))


@pytest.mark.parametrize("semantics", ["paper", "pnm"])
@pytest.mark.parametrize("name", ["ddim/time", "unipc3-bh2/time", "deis-tab2/time", "f-pndm/time"])
def test_an_image_gets_the_same_sample_alone_and_in_a_batch(name, semantics):
    schedule = shifted(baseline(name, DDPM, 13), window=20, semantics=semantics)
    model, x_T = recorded_mixture(DDPM), states(4)
    together = sample(schedule, model, x_T)
    assert not torch.allclose(together, sample(baseline(name, DDPM, 13), model, x_T), atol=1e-4)
    for i in range(len(x_T)):
        alone = sample(schedule, model, x_T[i : i + 1])
        assert torch.allclose(alone[0], together[i], atol=1e-12)


def test_one_image_with_its_chosen_shifts_is_an_ordinary_schedule():
    """A shifted run equals the constant shifts it chose, written down as choices."""
    base, model, x_T = baseline("dpmpp2m/time", DDPM, 6), recorded_mixture(DDPM), states(1, 3)
    times: list[float] = []
    schedule = shifted(base, window=25)
    x = sample(schedule, model, x_T, callback=lambda p: times.append(float(p.t[0])))
    offsets = [t - nominal for t, nominal in zip(times, base.times, strict=False)]
    assert offsets[0] == 0.0
    assert max(map(abs, offsets)) == 25.0
    steps = tuple(
        step.model_copy(update={"dt_query": d, "dt_start": d})
        for step, d in zip(base.steps, offsets, strict=True)
    )
    fixed = base.model_copy(update={"steps": steps})
    assert torch.allclose(sample(fixed, model, x_T), x, atol=1e-12)


def test_no_network_call_is_added():
    model = recorded_mixture(DDPM)
    for name, schedule in named(DDPM, 5).items():
        if name.endswith("/time"):
            model.calls = 0
            sample(shifted(schedule, window=15, semantics="pnm"), model, states(2))
            assert model.calls == schedule.nfe == 5, name


@pytest.mark.parametrize("semantics", ["paper", "pnm"])
def test_two_steps_by_hand(semantics):
    noise = DDPM
    times = (600.0, 300.0, 100.0)
    steps = (StepSpec(formulation="noise"),) * 2
    base = OdeSchedule(noise=noise, times=times, steps=steps)
    model, x = recorded_mixture(noise), states(1)
    level = {t: (float(noise.alpha(f64(t))), float(noise.sigma(f64(t)))) for t in times}

    def eps(y, t):
        alpha, sigma = (f64(float(v)) for v in (noise.alpha(f64(t)), noise.sigma(f64(t))))
        return model.eps(y, alpha, sigma)

    def ddim(y, e, start, land):
        (a, s), (a2, s2) = start, land
        return a2 * (y - s * e) / a + s2 * e

    y = ddim(x, eps(x, 600.0), level[600.0], level[300.0])
    variance = float(y.var())
    centre = 300 if semantics == "paper" else 100
    window = range(centre - 40, centre + 41)
    chosen = float(min(window, key=lambda k: abs(float(noise.sigma(f64(k))) ** 2 - variance)))
    assert chosen != centre
    moved = (float(noise.alpha(f64(chosen))), float(noise.sigma(f64(chosen))))
    if semantics == "paper":
        expected = ddim(y, eps(y, chosen), moved, level[100.0])
    else:
        expected = ddim(y, eps(y, 300.0), level[300.0], moved)
    found = sample(shifted(base, window=40, cutoff=50.0, semantics=semantics), model, x)
    assert torch.allclose(found, expected, atol=1e-12)


def test_per_batch_uses_the_mean_variance_and_gives_one_shift():
    model, times = recorded_mixture(DDPM), []
    schedule = shifted(baseline("ddim/time", DDPM, 5), window=20, per="batch")
    sample(schedule, model, states(6), callback=lambda p: times.append(p.t))
    assert all(bool((t == t[0]).all()) for t in times)
    rule = rule_of(schedule)
    x = states(6, 9)
    sigma2 = DDPM.sigma(torch.arange(380.0, 421.0, dtype=torch.float64)) ** 2
    nearest = int((sigma2 - x.flatten(1).var(1).mean()).abs().argmin()) - 20
    assert select(rule, schedule, x, 400.0) == nearest


def test_unit_variance_data_always_ask_for_the_upper_edge():
    """N(0, I) has variance 1 at every time; 1 - A never reaches it."""
    schedule = shifted(baseline("ddim/time", DDPM, 5), window=10)
    x = torch.ones(1, 4096, dtype=torch.float64)
    x[:, ::2] = -1
    for centre in (250.0, 400.0, 700.0):
        assert float(select(rule_of(schedule), schedule, x, centre)) == 10.0


@pytest.mark.parametrize(
    ("t", "bias"), [(100, 94), (200, 61), (300, 44), (400, 34), (500, 28), (600, 23), (700, 20)]
)
def test_the_published_rule_is_biased_and_the_correction_removes_it(t, bias):
    """A perfect sample of pixel variance v has v A + 1 - A; without v the rule asks for more."""
    v = 0.25
    square = float(DDPM.alpha(f64(t))) ** 2
    x = torch.tensor([[-1.0, 1.0]], dtype=torch.float64) / 2**0.5
    x = x * (v * square + 1 - square) ** 0.5
    for correction, expected in ((0.0, bias), (v, 0)):
        schedule = shifted(baseline("ddim/time", DDPM, 5), window=150, data_variance=correction)
        found = select(rule_of(schedule), schedule, x, float(t))
        assert abs(float(found) - expected) <= 1


def test_a_point_mass_with_exact_eps_keeps_the_nominal_time_up_to_the_noise():
    d = 4096
    noise = DDPM
    model = Mixture(noise, f64(1.0), torch.zeros(1, d, dtype=torch.float64), f64(1e-12))
    x_T = torch.randn(4, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    schedule, seen = shifted(baseline("ddim/time", noise, 8), window=60, cutoff=50.0), []
    sample(schedule, model, x_T, callback=lambda p: seen.append(p.t))
    for t, nominal in zip(seen, schedule.times, strict=False):
        if 100 < nominal < 600:
            square = float(noise.alpha(f64(nominal))) ** 2
            slope = float(-noise.dlog_alpha(f64(nominal))) * 2 * square
            spread = (1 - square) * (2 / d) ** 0.5 / slope
            assert float((t - nominal).abs().max()) < 4 * spread + 1


@pytest.mark.parametrize(
    ("noise", "unit"), [(VPLinear(), 1e-3), (VPLinear(1.0, 1.0, t_start=10.0), 1e-2)]
)
def test_the_unit_is_a_thousandth_of_a_continuous_range(noise, unit):
    schedule, seen = shifted(baseline("ddim/time", noise, 5), window=30, cutoff=0.0), []
    sample(schedule, gaussian(noise), states(2)[:, :1, 0], callback=lambda p: seen.append(p.t))
    moves = torch.stack([t - n for t, n in zip(seen, schedule.times, strict=False)])
    assert float(moves.abs().max()) == pytest.approx(30 * unit)


def test_f_pndm_stages_between_labels_take_the_level_of_the_lower_one():
    times = (801.0, 700.0, 600.0, 500.0, 400.0)
    exact, released = (
        OdeSchedule(noise=DDPM, times=times, steps=f_pndm(4, basis)).program
        for basis in ("t", "label")
    )
    assert released.t.tolist() == exact.t.tolist()  # the network is told the time between
    assert released.t[1] == 750.5
    assert not torch.allclose(released.r, exact.r)
    times = (0.9, 0.7, 0.5, 0.3, 0.1)
    continuous = [
        OdeSchedule(noise=VPLinear(), times=times, steps=f_pndm(4, basis))
        for basis in ("t", "label")
    ]
    assert continuous[0].program.digest == continuous[1].program.digest


def test_pndm_baselines_count_their_true_calls():
    assert baseline("s-pndm/time", DDPM, 10).n_steps == 9
    assert baseline("f-pndm/time", DDPM, 13).n_steps == 4
    solvers = {name.split("/")[0] for name in named(VPLinear(), 5)}
    assert "s-pndm" in solvers
    assert "f-pndm" not in solvers
    with pytest.raises(ScheduleError, match="at least 13 calls, not 12"):
        baseline("f-pndm/time", DDPM, 12)
    assert sorted(main_calls(baseline("f-pndm/time", DDPM, 14))) == [0, 4, 8, 12, 13]
    assert sorted(main_calls(baseline("s-pndm/time", DDPM, 4))) == [0, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 2.5}, "window 2.5 must be a whole number"),
        ({"window": -1}, "window -1 must be"),
        ({"semantics": "adm"}, "semantics 'adm' is unknown"),
        ({"per": "pixel"}, "per 'pixel'"),
        ({"rule": "mean"}, "rule 'mean' is unknown"),
        ({"data_variance": -0.1}, "data_variance -0.1"),
        ({"cutoff": None}, "cutoff None must be a time"),
        ({"windows": 3}, "windows is unknown"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ScheduleError, match=message):
        shifted(baseline("ddim/time", DDPM, 4), **change)


def test_what_cannot_be_shifted_is_refused():
    edm = shifted(baseline("ddim/edm", EDM(), 4), window=3)
    with pytest.raises(ScheduleError, match="not edm"):
        sample(edm, recorded_mixture(EDM()), states(1))
    discrete = shifted(baseline("ddim/time", VPDiscrete(), 4), window=3)
    with pytest.raises(ScheduleError, match=r"call sample\(\)"):
        run(discrete.program, gaussian(VPDiscrete()), states(1), options=discrete.options)


def test_shifted_images_of_a_stochastic_schedule_get_their_own_fresh_noise():
    base, model, x_T = baseline("dpmpp2m/time", DDPM, 6), recorded_mixture(DDPM), states(3)
    noisy = base.model_copy(
        update={"steps": tuple(s.model_copy(update={"eta": 1.0}) for s in base.steps)}
    )
    schedule = shifted(noisy, window=25, semantics="pnm")
    found = [
        sample(schedule, model, x_T, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)
    twice = sample(
        schedule, model, x_T[:1].repeat(2, 1, 1, 1), generator=torch.Generator().manual_seed(0)
    )
    assert not torch.allclose(twice[0], twice[1], atol=1e-3)


def test_a_state_that_is_not_finite_is_the_models_fault():
    model = recorded_mixture(DDPM)

    class Broken:
        noise = DDPM

        def __call__(self, x, t, **kwargs):
            return model(x, t) * (float("nan") if float(t[0]) < 700 else 1.0)

    with pytest.raises(ModelError, match=r"network call 2 .* not finite"):
        sample(shifted(baseline("dpmpp2m/time", DDPM, 6), window=25), Broken(), states(2))


def test_the_option_survives_the_file():
    schedule = shifted(baseline("ddim/time", DDPM, 5), window=20, semantics="pnm")
    again = OdeSchedule.from_dict(schedule.to_dict())
    assert again == schedule
    assert again.digest == schedule.digest != baseline("ddim/time", DDPM, 5).digest
