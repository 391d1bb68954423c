"""The diffusers scheduler replays a schedule as `sample` does, inside real pipelines."""

from __future__ import annotations

import json

import pytest
import torch

from fewstep.samplers import from_model, sample, start
from fewstep.samplers.diffusers import FewstepScheduler
from fewstep.samplers.network import network_facts
from fewstep.space import (
    OdeSchedule,
    ProgramSchedule,
    ScheduleError,
    StepSpec,
    noise,
    save_schedule,
)
from fewstep.space.baselines import baseline

diffusers = pytest.importorskip("diffusers")
TABLE = noise.VPDiscrete()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def mixed() -> OdeSchedule:
    """Every kind of decision at once, on non-integer labels."""
    return OdeSchedule(
        noise=TABLE,
        times=(999.0, 760.25, 502.5, 301.1, 99.9, 0.0),
        steps=(
            StepSpec(corrector="reuse", corrector_relaxation="bh2"),
            StepSpec(order=2, formulation="noise", dt_query=4.5),
            StepSpec(order=3, corrector="reuse", compensation=1.05),
            StepSpec(order=2, basis="rho", formulation="noise", dt_land=-3.0),
            StepSpec(order=1, dt_start=2.0),
        ),
    )


def replayed(schedule: OdeSchedule, net, x, kind="epsilon"):
    scheduler = FewstepScheduler(schedule=schedule.to_dict(), prediction_type=kind)
    scheduler.set_timesteps(schedule.nfe)
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("name", ["unipc3-bh2/time", "dpmpp3m/logsnr", "ipndm4/edm", "mixed"])
def test_the_scheduler_equals_sample_to_float_rounding(name):
    schedule = mixed() if name == "mixed" else baseline(name, TABLE, 6)
    net = unet()
    model = lambda x, t: net(x, t).sample  # noqa: E731
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = sample(schedule, from_model(model, TABLE, "eps"), start(schedule, z))
        theirs = replayed(schedule, model, start(schedule, z))
    bound = 2e-7 * (1 + float(schedule.program.b.abs().max()))
    assert float((ours - theirs).abs().max()) <= bound * max(1.0, float(ours.abs().max()))


def test_a_ddpm_pipeline_runs_the_file_and_counts_its_calls(tmp_path):
    schedule = mixed()
    path = save_schedule(schedule, tmp_path / "nfe05.json")
    stock = diffusers.DDPMScheduler(**BETAS, clip_sample=False)
    pipe = diffusers.DDPMPipeline(unet=unet(), scheduler=stock)
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, schedule=str(path))
    pipe.set_progress_bar_config(disable=True)
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: seen.append(float(args[1])))
    images = pipe(
        batch_size=2, num_inference_steps=5, output_type="np",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    hook.remove()
    assert images.shape == (2, 8, 8, 1)
    assert seen == pytest.approx(schedule.program.label.tolist(), abs=1e-4)
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    model = from_model(lambda x, t: pipe.unet(x, t).sample, TABLE, "eps")
    ours = (sample(schedule, model, z) / 2 + 0.5).clamp(0, 1)
    assert float((torch.from_numpy(images[..., 0]) - ours[:, 0]).abs().max()) < 2e-6


def test_a_refined_digits_schedule_replays_on_the_shipped_model():
    """A fitted program, all of its numbers moved, on the real class-conditional network."""
    from fewstep.experiments.models.digits import load_network, problem
    from fewstep.space.unknowns import FreeProgram, canonical

    subject = problem()
    base = baseline("ipndm3/quadratic", subject.denoiser.noise, 6)
    model, g = FreeProgram(canonical(base.program), base.noise), torch.Generator().manual_seed(4)
    theta = 0.05 * torch.randn(model.size, generator=g, dtype=torch.float64)
    theta[6] = 0.0  # p_0: this loop does not call scale_model_input
    schedule = ProgramSchedule(
        noise=base.noise, program=model.program(theta), start=base.start, end=base.end
    )
    z = torch.randn(8, 1, 8, 8, generator=g)
    cond = subject.cond(torch.arange(8))
    net = load_network()
    with torch.no_grad():
        ours = sample(schedule, subject.denoiser, z, cond=cond)
        theirs = replayed(schedule, lambda x, t: net(x, t, **cond), z)
    bound = 2e-7 * (1 + float(schedule.program.b.abs().max()))
    assert float((ours - theirs).abs().max()) <= bound * max(1.0, float(ours.abs().max()))


def analytical() -> OdeSchedule:
    """An analytical first step from a constant image, which later steps use, too."""
    image = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    return OdeSchedule(
        noise=TABLE,
        times=(999.0, 800.0, 502.5, 301.1, 0.0),
        steps=(StepSpec(), StepSpec(order=2), StepSpec(order=3), StepSpec(weights=(0.1, 0.2))),
        first="mean",
    ).with_constant(image)


def test_an_analytical_first_step_starts_where_the_pipeline_scales_its_input(tmp_path):
    net = unet()
    model = lambda x, t: net(x, t).sample  # noqa: E731
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    schedule = analytical()
    path = save_schedule(schedule, tmp_path / "nfe03.json")
    FewstepScheduler(schedule=str(path)).save_pretrained(tmp_path / "kept")
    scheduler = FewstepScheduler.from_pretrained(tmp_path / "kept")
    scheduler.set_timesteps(3)
    with torch.no_grad():
        ours = sample(schedule, from_model(model, TABLE, "eps"), z)
        for _ in range(2):  # a scheduler serves one picture after another
            x = z
            for t in scheduler.timesteps:
                both = scheduler.scale_model_input(torch.cat([x, x]), t)  # as for guidance
                out = model(both, t.expand(len(both))).chunk(2)[0]
                x = scheduler.step(out, t, x).prev_sample
            assert torch.allclose(x, ours, rtol=0, atol=5e-6)
    with pytest.raises(ScheduleError, match="does not call scale_model_input"):
        scheduler.step(torch.zeros_like(z), scheduler.timesteps[0], z)
    alone = FewstepScheduler(schedule=schedule.to_dict())
    with pytest.raises(ScheduleError, match="safetensors beside it"):
        alone.scale_model_input(z)


def test_saving_and_loading_keeps_the_schedule(tmp_path):
    scheduler = FewstepScheduler(schedule=mixed().to_dict())
    scheduler.save_pretrained(tmp_path)
    again = FewstepScheduler.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"]
    assert torch.equal(again.timesteps, scheduler.timesteps)
    assert again._schedule.digest == mixed().digest


def test_a_program_equals_diffusers_own_multistep_scheduler():
    """All-order-2 DPM-Solver++ and UniPC as programs against the stock schedulers, same labels."""
    net = unet()
    model = lambda x, t: net(x, t).sample  # noqa: E731
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for cls, solver in (
        (diffusers.DPMSolverMultistepScheduler, "dpmpp2m"),
        (diffusers.UniPCMultistepScheduler, "unipc2-bh2"),
    ):
        stock = cls(**BETAS, final_sigmas_type="sigma_min")
        stock.set_timesteps(8)
        x = z.clone()
        with torch.no_grad():
            for t in stock.timesteps:
                x = stock.step(model(x, t.expand(2)), t, x).prev_sample
        times = (*(float(t) for t in stock.timesteps), 0.0)
        named = baseline(f"{solver}/time/low", TABLE, 8)
        with torch.no_grad():
            ours = replayed(OdeSchedule(noise=TABLE, times=times, steps=named.steps), model, z)
        assert float((ours - x).abs().max()) < 1e-4, solver


def test_other_step_counts_interpolate_and_a_middle_start_recompiles():
    scheduler = FewstepScheduler(schedule=mixed().to_dict())
    scheduler.set_timesteps(9)
    assert len(scheduler.timesteps) == 9
    assert float(scheduler.timesteps[0]) == 999.0
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
    assert bool(torch.isfinite(x).all())
    assert scheduler.step_index == 5


def test_bad_input_is_one_clear_line():
    with pytest.raises(ScheduleError, match="made for another model"):
        FewstepScheduler(schedule=mixed().to_dict(), **BETAS | {"beta_end": 0.02})
    with pytest.raises(ScheduleError, match="schedule is missing"):
        FewstepScheduler()
    with pytest.raises(ScheduleError, match="prediction_type"):
        FewstepScheduler(schedule=mixed().to_dict(), prediction_type="noise")
    with pytest.raises(ScheduleError, match="two schedules have 5 calls"):
        FewstepScheduler(schedule=[mixed().to_dict(), baseline("ddim/time", TABLE, 5).to_dict()])
    other = baseline("ddim/time", noise.VPDiscrete(beta_end=0.02), 3)
    with pytest.raises(ScheduleError, match="made for another model"):
        FewstepScheduler(schedule=[mixed().to_dict(), other.to_dict()], **BETAS)
    flows = diffusers.FlowMatchEulerDiscreteScheduler().config
    with pytest.raises(ScheduleError, match="the network returns epsilon, which no network of"):
        FewstepScheduler.from_config(flows, schedule=flow().to_dict(), prediction_type="epsilon")


FLOW = noise.RectifiedFlow(shift=3.0, label_scale=1000.0, t_end=0.0)


def flow(first=1.0) -> OdeSchedule:
    steps = (StepSpec(), StepSpec(order=2), StepSpec(order=2), StepSpec())
    return OdeSchedule(noise=FLOW, times=(first, 0.8, 0.5, 0.2, 0.0), steps=steps)


def z(seed=1, *shape):
    return torch.randn(shape or (2, 4, 8), generator=torch.Generator().manual_seed(seed))


def test_a_flow_starts_at_its_own_level_or_is_refused():
    """A caller scales its noise by init_noise_sigma; one that does not is told."""
    schedule, net = flow(first=0.9), lambda x, t: torch.tanh(x) * t.reshape(-1, 1, 1) / 1000
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    scheduler = FewstepScheduler.from_config(config, schedule=schedule.to_dict())
    scheduler.set_timesteps(4)
    level = float(FLOW.sigma(torch.tensor(0.9).double()))
    x = z() * scheduler.init_noise_sigma
    assert scheduler.init_noise_sigma == pytest.approx(level)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.expand(len(x))), t, x).prev_sample
    ours = sample(schedule, from_model(net, FLOW, "flow"), start(schedule, z()))
    assert float((x - ours).abs().max()) < 1e-6
    scheduler.set_timesteps(4)
    with pytest.raises(ScheduleError, match="does not multiply its noise by init_noise_sigma"):
        scheduler.step(z(), scheduler.timesteps[0], z())


@pytest.mark.parametrize("name", ["heun/edm", "s-pndm/time", "dpmpp2m/edm", "unipc3-bh2/logsnr"])
def test_a_start_in_the_middle_is_at_a_whole_step_with_the_states_own_level(name):
    schedule = baseline(name, TABLE, 7)
    scheduler = FewstepScheduler(schedule=schedule.to_dict())
    scheduler.set_timesteps(7)
    net = lambda x, t: 0.3 * torch.sin(x + t.reshape(-1, 1, 1) / 500)  # noqa: E731
    inside = {"heun/edm": 3, "s-pndm/time": 1}.get(name)
    if inside:
        scheduler.set_begin_index(inside)
        with pytest.raises(ScheduleError, match="several calls a step: start at one of calls"):
            scheduler.step(z(), scheduler.timesteps[inside], z())
    call, step = (4, 2) if name == "heun/edm" else (4, 3) if name == "s-pndm/time" else (4, 4)
    for pipeline_says_so in (True, False):
        scheduler.set_timesteps(7)
        if pipeline_says_so:
            scheduler.set_begin_index(call)
        t = torch.tensor([schedule.times[step]], dtype=torch.float64)
        alpha, sigma = TABLE.alpha(t).float(), TABLE.sigma(t).float()
        noisy = scheduler.add_noise(z(2), z(3), scheduler.timesteps[call : call + 1])
        assert torch.allclose(noisy, alpha * z(2) + sigma * z(3), atol=1e-6)
        x = noisy
        for label in scheduler.timesteps[call:]:
            x = scheduler.step(net(x, label.expand(len(x))), label, x).prev_sample
        rest = sample(schedule.tail(step), from_model(net, TABLE, "eps"), noisy)
        assert float((x - rest).abs().max()) < 1e-5


def test_levels_are_those_of_the_state_and_unknown_labels_have_their_own():
    steps = (StepSpec(), StepSpec(order=2, dt_query=-60.0), StepSpec(dt_query=25.0))
    schedule = OdeSchedule(noise=TABLE, times=(999.0, 400.0, 150.0, -1.0), steps=steps)
    scheduler = FewstepScheduler(schedule=schedule.to_dict())
    scheduler.set_timesteps(3)
    one, none = torch.ones(1, 1, 2), torch.zeros(1, 1, 2)
    for k, label in enumerate(scheduler.timesteps):
        t = torch.tensor(schedule.times[k], dtype=torch.float64)
        for x0, eps, level in ((one, none, TABLE.alpha(t)), (none, one, TABLE.sigma(t))):
            for call in (scheduler.add_noise, lambda a, e, s: scheduler.scale_noise(a, s, e)):
                assert float(call(x0, eps, label[None]).mean()) == pytest.approx(float(level))
    between = scheduler.add_noise(one, none, torch.tensor([600]))
    assert float(between.mean()) == pytest.approx(float(TABLE.alpha(torch.tensor(600.0).double())))
    with pytest.raises(ScheduleError, match="none that the network is told"):
        scheduler.add_noise(one, none, torch.tensor([5000.0]))


def test_edits_in_place_of_half_precision_latents_are_respected_and_nothing_else_is_rounded():
    schedule = baseline("dpmpp2m/time", TABLE, 4)
    net = lambda x, t: torch.tanh(x.float())  # noqa: E731

    def run(edit, dtype):
        scheduler = FewstepScheduler(schedule=schedule.to_dict())
        scheduler.set_timesteps(4)
        x = z().to(dtype)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(net(x, t), t, x).prev_sample
            if i == 1:
                edit(x)
        return x, scheduler

    def zero(x):
        x[:, :2] = 0.0

    edited, _ = run(zero, torch.bfloat16)
    plain, scheduler = run(lambda x: None, torch.bfloat16)
    exact, _ = run(zero, torch.float32)
    assert float((edited - plain)[:, :2].abs().max()) > 0.05
    assert torch.allclose(edited.float(), exact, rtol=0.02, atol=0.02)
    assert torch.equal(edited[:, 2:], plain[:, 2:])
    assert scheduler._run.state.dtype == torch.float32


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_an_edm_preconditioned_network_runs_as_its_own_scheduler_does(kind):
    stock = diffusers.EDMEulerScheduler(sigma_data=0.6, sigma_max=50.0, prediction_type=kind)
    stock.set_timesteps(6)
    edm = noise.EDM(sigma_max=50.0)
    schedule = OdeSchedule(
        noise=edm, times=tuple(stock.sigmas.double().tolist()), steps=(StepSpec(),) * 6
    )
    ours = FewstepScheduler.from_config(stock.config, schedule=schedule.to_dict())
    ours.set_timesteps(6)
    net = lambda x, t: torch.sin(3 * x + t)  # noqa: E731
    start_at, found = z() * 50.0, []
    for scheduler in (stock, ours):
        x = start_at
        for t in scheduler.timesteps:
            x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        found.append(x)
    assert torch.allclose(ours.timesteps, stock.timesteps, atol=1e-6)
    assert float((found[0] - found[1]).abs().max()) < 1e-5
    ours.set_timesteps(6)
    with pytest.raises(ScheduleError, match="scale_model_input, which EDM preconditioning needs"):
        ours.step(start_at, ours.timesteps[0], start_at)


def test_clipping_of_the_pipelines_configuration_is_run():
    stock = diffusers.DDIMScheduler(**BETAS, set_alpha_to_one=True, timestep_spacing="trailing")
    stock.set_timesteps(4)
    times = (*(float(t) for t in stock.timesteps), -1.0)
    schedule = OdeSchedule(noise=TABLE, times=times, steps=(StepSpec(),) * 4)
    ours = FewstepScheduler.from_config(stock.config, schedule=schedule.to_dict())
    ours.set_timesteps(4)
    x = z()
    for t in ours.timesteps:
        x = ours.step(torch.sin(5 * x), t, x).prev_sample
    assert float(x.abs().max()) <= 1 + 1e-6  # the last data prediction, clipped


class Guided:
    """The part of a pipeline that guidance concerns."""

    def __init__(self, scheduler, scale):
        self.scheduler, self._guidance_scale = scheduler, scale

    def __call__(self, x, callback=None):
        self.scheduler.set_timesteps(3)
        used = []
        for i, t in enumerate(self.scheduler.timesteps):
            noise_pred = 0.1 * x + self._guidance_scale * 0.01 * x
            used.append(self._guidance_scale)
            x = self.scheduler.step(noise_pred, t, x).prev_sample
            if callback is not None:
                callback(self, i, t, {})
        return used


class GuidedOnce(Guided):
    def __call__(self, x, callback=None):
        scale = self._guidance_scale
        self.scheduler.set_timesteps(3)
        for i, t in enumerate(self.scheduler.timesteps):
            x = self.scheduler.step(scale + 0.1 * x, t, x).prev_sample
            callback(self, i, t, {})


def test_guidance_of_every_call_runs_by_the_callback_and_is_refused_without():
    steps = (StepSpec(guidance=7.5), StepSpec(guidance=3.0), StepSpec(guidance=1.5))
    schedule = OdeSchedule(noise=TABLE, times=(999.0, 500.0, 200.0, -1.0), steps=steps)
    scheduler = FewstepScheduler(schedule=schedule.to_dict())
    pipe, x = Guided(scheduler, 7.5), z()
    with pytest.raises(ScheduleError, match="the guidance scale of every call: pass guidance"):
        pipe(x)
    callback = scheduler.guidance_callback()
    for _ in range(2):
        assert pipe(x, callback) == pytest.approx([7.5, 3.0, 1.5])
    with pytest.raises(ScheduleError, match=r"first guidance scale is 7\.5: pass guidance_scale"):
        Guided(scheduler, 5.0)(x, scheduler.guidance_callback())
    with pytest.raises(ScheduleError, match="does not read its guidance scale at every call"):
        GuidedOnce(scheduler, 7.5)(x, scheduler.guidance_callback())
    scheduler.set_timesteps(3)
    scheduler._armed = False
    with pytest.raises(ScheduleError, match="sets the guidance scale of every call"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_a_pipeline_that_passes_ddims_arguments_runs_and_is_told_of_eta(caplog):
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    pipe = diffusers.DDIMPipeline(net, diffusers.DDIMScheduler(**BETAS, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    file = baseline("ddim/logsnr", network_facts(pipe.scheduler.config).noise, 3).to_dict()
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, schedule=file)
    made = [
        pipe(generator=torch.Generator().manual_seed(0), eta=eta, num_inference_steps=3,
             output_type="np").images
        for eta in (0.0, 1.0)
    ]  # fmt: skip
    assert (made[0] == made[1]).all()
    assert "eta = 1.0: the schedule decides" in caplog.text


def test_a_latent_consistency_pipeline_shows_where_the_schedule_ends():
    own = diffusers.LCMScheduler(**BETAS)
    file = baseline("dpmpp2m/logsnr/low", network_facts(own.config).noise, 3).to_dict()
    ours = FewstepScheduler.from_config(own.config, schedule=file)
    assert ours.config.original_inference_steps == 50  # the pipeline reads it
    ours.set_timesteps(3, original_inference_steps=50)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * ours.init_noise_sigma
    for i, t in enumerate(ours.timesteps):
        out = 0.1 * x
        before = x
        x, denoised = ours.step(out, t, x, return_dict=False)
        alpha, sigma = (
            f(t.double()[None]).float()
            for f in (ours._network.noise.alpha, ours._network.noise.sigma)
        )
        if i < 2:
            assert torch.allclose(denoised, (before - sigma * out) / alpha, atol=1e-4)
    assert torch.equal(denoised, x)
