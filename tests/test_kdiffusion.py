"""The k-diffusion function: same samples as `sample`, image-to-image starts, one-line refusals."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fewstep.samplers import sample
from fewstep.samplers.kdiffusion import boundaries, sample_fewstep, sigmas_of
from fewstep.space import OdeSchedule, ProgramSchedule, ScheduleError, StepSpec
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline
from tests.oracles import recorded_mixture

VP, VE = noises.VPLinear(), noises.EDM()


def k_model(x, sigma, scale=1.0, seed=None):
    """The mixture as a k-diffusion denoiser."""
    return scale * recorded_mixture(VE)(x, sigma)


def z(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=g)


@pytest.mark.parametrize(
    "noise", [VP, VE, noises.RectifiedFlow(t_start=0.99)], ids=lambda n: n.type
)
def test_any_frame_gives_the_sample_in_variance_exploding_coordinates(noise):
    s = baseline("unipc3-bh2/edm", noise, 6)
    t = torch.tensor([s.times[0], s.times[-1]], dtype=torch.float64)
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    sigmas = torch.tensor([float(sigma[0] / alpha[0]), 0.0])
    x = z() * float(sigma[0] / alpha[0])
    seen = []
    out = sample_fewstep(k_model, x, sigmas, {"scale": 1.0}, seen.append, schedule=s)
    ours = sample(s, recorded_mixture(noise), x * float(alpha[0])) / float(alpha[1])
    assert torch.allclose(out, ours, rtol=0, atol=1e-9)
    assert [c["i"] for c in seen] == list(range(6))
    assert set(seen[0]) == {"x", "i", "sigma", "sigma_hat", "denoised"}


def test_a_start_in_the_middle_runs_the_remaining_steps_with_a_fresh_warm_up():
    s = baseline("dpmpp3m/edm", VE, 6)
    rest = OdeSchedule(
        noise=VE,
        times=s.times[3:],
        steps=(StepSpec(), StepSpec(order=2), s.steps[5]),
    )
    x = z() * s.times[3]
    out = sample_fewstep(k_model, x, torch.tensor([s.times[3], 0.0]), schedule=s)
    assert torch.allclose(out, sample(rest, recorded_mixture(VE), x), rtol=0, atol=1e-10)
    assert s.tail(3).nfe == 3


def test_a_first_sigma_that_is_no_level_is_refused():
    s = baseline("dpmpp2m/edm", VE, 4)
    with pytest.raises(ScheduleError, match="is not one of the schedule's levels"):
        sample_fewstep(k_model, z(), torch.tensor([40.0, 0.0]), schedule=s)
    with pytest.raises(ScheduleError, match="step 9 is not one of 4"):
        s.tail(9)


def plain(model, x, sigmas):
    """DDIM in variance-exploding coordinates."""
    for a, b in pairwise(sigmas.tolist()):
        D = model(x, torch.full((len(x),), a, dtype=torch.float64))
        x = D + (b / a) * (x - D)
    return x


def test_split_lists_stop_where_they_stop_and_go_on_from_there():
    s = OdeSchedule(noise=VE, times=(14.6, 5.0, 2.0, 0.8, 0.3, 0.0), steps=(StepSpec(),) * 5)
    sigmas, x = sigmas_of(s), z() * 14.6
    assert torch.allclose(sigmas, torch.tensor(s.times))
    whole = sample_fewstep(k_model, x, sigmas, schedule=s)
    for cut in (1, 2, 3, 4):
        high = sample_fewstep(k_model, x, sigmas[: cut + 1], schedule=s)
        assert torch.allclose(high, plain(k_model, x, sigmas[: cut + 1]), rtol=1e-6, atol=1e-6)
        low = sample_fewstep(k_model, high, sigmas[cut:], schedule=s)
        assert torch.allclose(low, whole, rtol=1e-6, atol=1e-6)
    part = sample_fewstep(k_model, plain(k_model, x, sigmas[:3]), sigmas[2:5], schedule=s)
    assert torch.allclose(part, plain(k_model, x, sigmas[:5]), rtol=1e-6, atol=1e-6)
    assert torch.equal(sample_fewstep(k_model, x, sigmas[:1], schedule=s), x)


@pytest.mark.parametrize("name", ["unipc3-bh2/logsnr", "dpmpp3m/edm", "heun/edm"])
@pytest.mark.parametrize("noise", [VP, VE], ids=lambda n: n.type)
def test_a_high_part_is_the_state_of_the_whole_run_at_that_level(name, noise):
    s = baseline(name, noise, 7)
    sigmas = sigmas_of(s)
    x = z() * float(sigmas[0])
    calls = dict(boundaries(s)[:-1])
    starts = list(calls)
    seen = []
    sample_fewstep(k_model, x, sigmas, None, seen.append, schedule=s)
    for at in range(1, len(sigmas) - 1):
        high = sample_fewstep(k_model, x, sigmas[: at + 1], schedule=s)
        assert torch.allclose(high, seen[starts[at]]["x"], rtol=1e-9, atol=1e-9)


def test_flow_lists_of_zero_to_one_have_their_own_states():
    flow = noises.RectifiedFlow(shift=3.0, t_end=0.0)
    s = OdeSchedule(noise=flow, times=(0.95, 0.8, 0.5, 0.2, 0.0), steps=(StepSpec(),) * 4)
    denoiser = recorded_mixture(flow)

    def model(x, sigma):  # told the flow's sigma; t of that level
        t = sigma.double() / (3.0 - 2.0 * sigma.double())
        return denoiser(x, t)

    sigmas, x = sigmas_of(s), z()
    assert float(sigmas[0]) == pytest.approx(3 * 0.95 / (1 + 2 * 0.95))
    assert float(sigmas[-1]) == 0.0
    ours = sample(s, denoiser, x)
    assert torch.allclose(sample_fewstep(model, x, sigmas, schedule=s), ours, atol=1e-9)
    high = sample_fewstep(model, x, sigmas[:3], schedule=s)
    low = sample_fewstep(model, high, sigmas[2:], schedule=s)
    assert torch.allclose(low, ours, atol=1e-9)
    assert float((high - ours).abs().max()) > 0.1
    at = float(sigmas[2])
    assert float(high.std()) > at / 2  # noise of that level is left
    inf = torch.tensor([float(s_) / (1 - float(s_)) for s_ in sigmas[1:]])
    explode = lambda y, sg: denoiser(  # noqa: E731
        y * (1 / (1 + sg.reshape(-1, 1, 1, 1))), sg / (1 + sg) / (3.0 - 2.0 * sg / (1 + sg))
    )
    rest = sample_fewstep(explode, x * inf[0], inf, schedule=s)
    own = sample(s.tail(1), denoiser, x * float(sigmas[1]))
    assert torch.allclose(rest, own, atol=1e-6)


class Sampling:
    def __init__(self, top):
        self.sigma_max = torch.tensor(top)


class Model:
    """As ComfyUI wraps one: the kind of model lies two levels in."""

    def __init__(self, top):
        self.inner_model = type("Guider", (), {})()
        self.inner_model.inner_model = type("Base", (), {"model_sampling": Sampling(top)})()

    def __call__(self, x, sigma, **extra):
        return k_model(x, sigma)


def test_a_model_of_the_other_convention_is_refused():
    s = baseline("dpmpp2m/edm", VE, 4)
    sample_fewstep(Model(80.0), z(), sigmas_of(s), schedule=s)
    with pytest.raises(ScheduleError, match="made for another model"):
        sample_fewstep(Model(1.0), z(), sigmas_of(s), schedule=s)
    flow = noises.RectifiedFlow(t_end=0.0)
    f = OdeSchedule(noise=flow, times=(1.0, 0.5, 0.0), steps=(StepSpec(),) * 2)
    with pytest.raises(ScheduleError, match="made for another model"):
        sample_fewstep(Model(14.6), z(), sigmas_of(f), schedule=f)


def test_guidance_of_every_call_goes_to_the_model_that_takes_it():
    steps = (StepSpec(guidance=7.5), StepSpec(guidance=3.0))
    s = OdeSchedule(noise=VE, times=(14.6, 2.0, 0.0), steps=steps)
    told = []

    def model(x, sigma, cond_scale):
        told.append(cond_scale)
        return k_model(x, sigma)

    sample_fewstep(model, z(), sigmas_of(s), {"cond_scale": 1.0}, schedule=s)
    assert told == [7.5, 3.0]
    with pytest.raises(ScheduleError, match="which this model does not take"):
        sample_fewstep(k_model, z(), sigmas_of(s), schedule=s)


def test_a_program_file_starts_and_stops_at_its_calls():
    s = ProgramSchedule.of(baseline("ddim/edm", VE, 5))
    sigmas, x = sigmas_of(s), z() * 80.0
    whole = sample_fewstep(k_model, x, sigmas, schedule=s)
    high = sample_fewstep(k_model, x, sigmas[:3], schedule=s)
    low = sample_fewstep(k_model, high, sigmas[2:], schedule=s)
    assert torch.allclose(low, whole, rtol=1e-5, atol=1e-6)


def test_a_seed_makes_fresh_noise_repeatable():
    s = baseline("ddpm/edm", VE, 4)
    runs = [sample_fewstep(k_model, z(), sigmas_of(s), {"seed": k}, schedule=s) for k in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ([80.0, 30.0, 0.0], r"sigmas\[1\] = 30 is not one of the schedule's levels"),
        ([80.0, 0.5], r"sigmas\[1\] = 0\.5 is not one of the schedule's levels"),
        ([80.0, 80.0, 0.0], "levels must decrease"),
        ([0.0, 80.0], "is not one of the schedule's levels"),
    ],
)
def test_every_value_of_a_list_must_be_a_level(sigmas, words):
    s = OdeSchedule(noise=VE, times=(80.0, 5.0, 2.0, 0.0), steps=(StepSpec(),) * 3)
    with pytest.raises(ScheduleError, match=words):
        sample_fewstep(k_model, z(), torch.tensor(sigmas), schedule=s)
