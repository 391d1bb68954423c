"""Named solvers equal diffusers' own schedulers on the same timesteps, to 1e-5."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fewstep.samplers import sample, start
from fewstep.samplers.diffusers import FewstepScheduler
from fewstep.samplers.network import network_facts
from fewstep.samplers.stock import stock_schedule
from fewstep.space import ScheduleError
from fewstep.space.baselines import on_times
from fewstep.space.noise import RectifiedFlow

diffusers = pytest.importorskip("diffusers")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def net(seed=0):
    """A small random network, told whole labels as trained ones are."""
    torch.manual_seed(seed)
    a, b = torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 3, padding=1)

    @torch.no_grad()
    def model(x, t):
        return b(torch.tanh(a(x) + torch.floor(torch.as_tensor(t).float() + 1e-3) / 500))

    return model


def run(scheduler, x, n=None, **settings):
    """A pipeline's loop."""
    scheduler.set_timesteps(**({"num_inference_steps": n} if n else {}), **settings)
    model = net()
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def noise(seed=1):
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


MULTISTEP = [
    ("DPMSolverMultistepScheduler", {}, "dpmpp2m/low"),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp3m/low"),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, "ddim"),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "dpmpp2m/low"),
    ("UniPCMultistepScheduler", {}, "unipc2-bh2/low"),
    ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc3-bh2/low"),
    (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        "unipc3-bh1/low",
    ),  # at sigma = 0 the stock bh1 is not finite
    ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "unipc2-bh2/low"),
    ("DEISMultistepScheduler", {}, "deis-logrho1/low"),
    ("DEISMultistepScheduler", {"solver_order": 3}, "deis-logrho2/low"),
]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("cls", "options", "solver"), MULTISTEP)
def test_multistep_solvers_equal_the_stock_ones(cls, options, solver, kind):
    stock = getattr(diffusers, cls)(**BETAS, **options, prediction_type=kind)
    theirs = run(stock, noise(), 8)
    zero = getattr(stock.config, "final_sigmas_type", "sigma_min") == "zero"
    times = (*(float(t) for t in stock.timesteps), -1.0 if zero else 0.0)
    name, _, low = solver.partition("/")
    network = network_facts(stock.config)
    schedule = on_times(name, network.noise, times, low=bool(low))
    ours = run(FewstepScheduler.from_config(stock.config, schedule=schedule.to_dict()), noise(), 8)
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max().clamp(min=1))


def test_heun_equals_the_stock_one_in_its_own_coordinates():
    stock = diffusers.HeunDiscreteScheduler(**BETAS)
    stock.set_timesteps(5)
    sigma = stock.sigmas[0]
    theirs = run(stock, noise() * stock.init_noise_sigma, 5)
    times = (*dict.fromkeys(float(t) for t in stock.timesteps), -1.0)
    schedule = on_times("heun", network_facts(stock.config).noise, times)
    assert schedule.nfe == len(stock.timesteps) == 9
    x = noise() * stock.init_noise_sigma / (sigma**2 + 1) ** 0.5
    ours = run(FewstepScheduler.from_config(stock.config, schedule=schedule.to_dict()), x, 9)
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"shift": 3.0}, {}),
        ({"shift": 1.0}, {}),
        ({"use_dynamic_shifting": True}, {"mu": 0.9}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 1.7}),
        ({"shift": 3.0, "use_karras_sigmas": True}, {}),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, {"mu": 1.1}),
    ],
    ids=str,
)
def test_flow_euler_equals_the_stock_one_with_shift_and_mu(options, settings):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    stock.scale_model_input = lambda x, t: x  # flow pipelines do not call it
    theirs = run(stock, noise(), 6, **settings)
    network = network_facts(stock.config, mu=settings.get("mu"))
    made = network.noise
    assert isinstance(made, RectifiedFlow)
    s = stock.sigmas.double()
    times = s / (made.shift - (made.shift - 1) * s)
    schedule = on_times("euler", made, tuple(times.tolist()))
    ours = FewstepScheduler.from_config(stock.config, schedule=schedule.to_dict())
    found = run(ours, noise() * ours.init_noise_sigma / float(s[0]), 6)
    assert torch.allclose(ours.timesteps, stock.timesteps, rtol=0, atol=1e-3)
    assert float((found - theirs).abs().max()) < 1e-5 * float(theirs.abs().max().clamp(min=1))


def test_flow_unipc_equals_the_stock_one():
    """As Wan uses it: UniPC on flow sigmas, its shift once."""
    stock = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    theirs = run(stock, noise(), 6)
    made = network_facts(stock.config).noise
    s = stock.sigmas.double()
    times = (s / (made.shift - (made.shift - 1) * s)).tolist()
    schedule = on_times("unipc2-bh2", made, tuple(times), low=True)
    ours = FewstepScheduler.from_config(stock.config, schedule=schedule.to_dict())
    found = run(ours, noise(), 6)
    assert float((found - theirs).abs().max()) < 2e-5 * float(theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("UniPCMultistepScheduler", {"thresholding": True, "sample_max_value": 2.0}),
        ("EDMDPMSolverMultistepScheduler", {"thresholding": True}),
    ],
)
def test_the_schedule_of_a_scheduler_that_clips_does_what_the_scheduler_does(cls, options):
    stock, model = getattr(diffusers, cls)(**options), net()
    network = network_facts(stock.config)
    schedule = stock_schedule(stock, network, 4)

    def loud(x, t):
        return 40 * model(x, t)

    def denoiser(x, t, *, cond=None, guidance=None):
        told = network.noise.label(t)[0]
        return network.data(x, loud(network.network_input(x, t), told), t)

    denoiser.noise = network.noise
    stock.set_timesteps(4)
    theirs = noise() * stock.init_noise_sigma
    for t in stock.timesteps:
        out = loud(stock.scale_model_input(theirs, t), t)
        theirs = stock.step(out, t, theirs).prev_sample
    ours = sample(schedule, denoiser, start(schedule, noise()))
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())
    off = stock_schedule(stock, dataclasses.replace(network, clip=None), 4)
    network = dataclasses.replace(network, clip=None)
    unclipped = sample(off, denoiser, start(off, noise()))
    assert float((unclipped - theirs).abs().max()) > 0.1  # there was something to clip


@pytest.mark.parametrize("cls", ["DDIMScheduler", "TCDScheduler"])
def test_a_scheduler_that_clips_one_prediction_and_goes_on_with_the_other_has_no_schedule(cls):
    stock = getattr(diffusers, cls)(clip_sample=True)
    with pytest.raises(ScheduleError, match="clips data predictions in a way that no schedule"):
        stock_schedule(stock, network_facts(stock.config), 4)


def test_a_scheduler_whose_step_asks_for_more_is_one_line():
    stock = diffusers.CogVideoXDPMScheduler()
    with pytest.raises(ScheduleError, match="takes no plain step") as caught:
        stock_schedule(stock, network_facts(stock.config), 4)
    assert "\n" not in str(caught.value)
