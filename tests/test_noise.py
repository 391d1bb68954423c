"""Noise schedules: exact inverses, consistent rates, one-line refusals."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.space import ScheduleError
from fewstep.space import noise as noises
from fewstep.space.noise import noise_from_dict, noise_to_dict

ALL = [
    noises.VPLinear(),
    noises.VPLinear(beta_min=1.0, beta_max=1.0, t_start=10.0),
    noises.VPCosine(),
    noises.VPDiscrete(),
    noises.VPDiscrete(betas="linear", beta_start=1e-4, beta_end=0.02),
    noises.VPDiscrete(alphas_cumprod=(0.9, 0.7, 0.4, 0.1, 0.01)),
    noises.EDM(),
    noises.RectifiedFlow(),
    noises.RectifiedFlow(shift=3.0),
]
IDS = [f"{n.type}-{i}" for i, n in enumerate(ALL)]


def inner_times(noise, n=200):
    a, b = noise.t_range
    share = torch.linspace(0.001, 0.999, n, dtype=torch.float64)
    return b + (a - b) * share


@pytest.mark.parametrize("noise", ALL, ids=IDS)
def test_t_of_lam_inverts_lam(noise):
    t = inner_times(noise)
    back = noise.t_of_lam(noise.lam(t))
    assert float(((back - t).abs() / (1e-3 + t)).max()) < 1e-10


@pytest.mark.parametrize("noise", ALL, ids=IDS)
def test_lam_is_log_alpha_minus_log_sigma_and_decreases_in_t(noise):
    t = inner_times(noise)
    direct = torch.log(noise.alpha(t)) - torch.log(noise.sigma(t))
    assert torch.allclose(noise.lam(t), direct, rtol=0, atol=1e-9)
    assert bool((noise.lam(t).diff() < 0).all())


@pytest.mark.parametrize("noise", [n for n in ALL if n.type.startswith("vp")])
def test_vp_schedules_preserve_variance(noise):
    t = inner_times(noise)
    assert torch.allclose(
        noise.alpha(t) ** 2 + noise.sigma(t) ** 2, torch.ones_like(t), atol=1e-14
    )


@pytest.mark.parametrize("noise", ALL, ids=IDS)
def test_rates_are_the_derivatives_of_alpha_and_sigma(noise):
    t = (inner_times(noise, 50) + 0.137 * (noise.type == "vp_discrete")).requires_grad_()
    for value, rate in zip((noise.alpha(t), noise.sigma(t)), noise.rates(t), strict=True):
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        else:
            slope = torch.zeros_like(t)
        assert torch.allclose(slope, rate.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("noise", ALL, ids=IDS)
def test_clean_data_is_where_sigma_is_zero(noise):
    t = torch.tensor([noise.t_data], dtype=torch.float64)
    assert float(noise.sigma(t)) == 0.0
    assert float(noise.alpha(t)) == 1.0
    assert float(noise.lam(t)) == math.inf
    assert float(noise.t_of_lam(noise.lam(t))) == pytest.approx(noise.t_data, abs=1e-12)


@pytest.mark.parametrize("noise", ALL, ids=IDS)
def test_the_json_form_is_inverted_exactly(noise):
    assert noise_from_dict(noise_to_dict(noise)) == noise


def test_integer_labels_of_a_table_give_the_table():
    noise = noises.VPDiscrete()
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    t = torch.arange(1000, dtype=torch.float64)
    assert torch.allclose(noise.alpha(t) ** 2, torch.cumprod(1 - beta, 0), rtol=1e-12)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"type": "vp"}, "noise.type 'vp' is unknown"),
        ({"type": "vp_linear", "beta": 1}, "noise.beta is not a field"),
        ({"type": "vp_linear", "beta_min": -1}, "noise.beta_min = -1 must be a positive number"),
        ({"type": "edm", "sigma_max": 0.001}, "first time 0.001 must lie above"),
        ({"type": "vp_discrete", "betas": "cosine"}, "noise.betas 'cosine'"),
        ({"type": "vp_discrete", "alphas_cumprod": [0.5, 0.6]}, "decrease strictly"),
        ({"type": "rectified_flow", "t_start": 2.0}, "above 1"),
        ({"type": "vp_cosine", "t_start": 1.0}, "below 1"),
        ({"type": "edm", "sigma_max": True}, "numbers are needed"),
        ([], "noise.type"),
    ],
)
def test_bad_noise_schedules_are_one_clear_line(data, words):
    with pytest.raises(ScheduleError, match="noise") as caught:
        noise_from_dict(data)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
