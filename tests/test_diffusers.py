"""The diffusers scheduler replays a schedule as `sample` does, inside real pipelines."""

from __future__ import annotations

import json

import pytest
import torch

from fewstep.samplers import from_model, sample, start
from fewstep.samplers.diffusers import FewstepScheduler
from fewstep.space import OdeSchedule, ScheduleError, StepSpec, noise, save_schedule
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
    stock = diffusers.DDPMScheduler(**BETAS)
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
    """Weights, shifts and moved times, on the real class-conditional network."""
    from fewstep.experiments.models.digits import load_network, problem
    from fewstep.search.strategies.knobs import Knobs

    subject = problem()
    knobs = Knobs(baseline("ipndm3/quadratic", subject.denoiser.noise, 6))
    g = torch.Generator().manual_seed(4)
    schedule = knobs.apply(0.05 * torch.randn(knobs.size, generator=g, dtype=torch.float64))
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
    assert scheduler.step_index == 3


def test_bad_input_is_one_clear_line():
    with pytest.raises(ScheduleError, match="made for another model"):
        FewstepScheduler(schedule=mixed().to_dict(), **BETAS | {"beta_end": 0.02})
    with pytest.raises(ScheduleError, match="schedule is missing"):
        FewstepScheduler()
    with pytest.raises(ScheduleError, match="prediction_type"):
        FewstepScheduler(schedule=mixed().to_dict(), prediction_type="noise")
