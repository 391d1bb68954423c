"""The k-diffusion function: same samples as `sample`, image-to-image starts, one-line refusals."""

from __future__ import annotations

import pytest
import torch

from fewstep.samplers import sample
from fewstep.samplers.kdiffusion import sample_fewstep
from fewstep.space import OdeSchedule, ScheduleError, StepSpec
from fewstep.space import noise as noises
from fewstep.space.baselines import baseline
from tests.oracles import recorded_mixture

VP, VE = noises.VPLinear(), noises.EDM()


def k_model(x, sigma, scale=1.0):
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
    heun = baseline("heun/edm", VE, 5)
    with pytest.raises(ScheduleError, match="one call each"):
        heun.tail(1)
