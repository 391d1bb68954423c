"""Schedules replayed in diffusers pipelines of every family are what `sample` makes of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fewstep.samplers import sample, start
from fewstep.samplers.replay import from_call
from fewstep.space import ProgramSchedule, ScheduleError
from fewstep.space.baselines import baseline, named

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

from fewstep.samplers.diffusers import FewstepScheduler
from fewstep.samplers.pipelines import PipelineDenoiser
from tests.test_wild_pipelines import NO_LATENTS, close, first, seeded, shown
from tests.tiny_pipelines import BUILDERS, build, rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in NO_LATENTS])
def test_a_schedule_replayed_in_the_pipeline_equals_sample(name):
    pipe, call = build(name)
    denoiser = PipelineDenoiser(pipe, (), call)
    z = torch.randn(1, *denoiser.shape, generator=seeded(1))
    config = json.loads(pipe.scheduler.to_json_string())
    schedules = [s for n, s in named(denoiser.noise, 4).items() if not n.startswith("ddpm")]
    for schedule in (*schedules[5::12], denoiser.stock(4)):
        if schedule.program.stochastic:
            continue
        ours = sample(schedule, denoiser, start(schedule, z))
        pipe.scheduler = FewstepScheduler.from_config(config, schedule=schedule.to_dict())
        assert close(shown(pipe, name, z, call, 4), ours)


def watched(scheduler):
    """The states that a pipeline hands a scheduler and gets back, as lists that fill."""
    given, made, step = [], [], scheduler.step

    def spy(output, timestep, state, *args, **kwargs):
        result = step(output, timestep, state, *args, **kwargs)
        given.append(state.clone())
        made.append((result[0] if isinstance(result, tuple) else result.prev_sample).clone())
        return result

    scheduler.step = spy
    return given, made


@pytest.mark.parametrize("name", ["dit", "ddpm"])
@pytest.mark.parametrize("solver", ["unipc2-bh2/logsnr", "dpmpp3m/quadratic"])
def test_a_pipeline_that_draws_its_own_start_replays_from_it(name, solver):
    pipe, call = build(name)
    denoiser = PipelineDenoiser(pipe, (), call)
    config = json.loads(pipe.scheduler.to_json_string())
    schedule = named(denoiser.noise, 4)[solver]
    pipe.scheduler = FewstepScheduler.from_config(config, schedule=schedule.to_dict())
    given, made = watched(pipe.scheduler)
    pipe(num_inference_steps=4, generator=seeded(), output_type="np", **first(call))
    ours = sample(schedule, denoiser, given[0][:1])  # DiT carries the two halves of guidance
    assert len(made) == 4
    assert close(made[-1][:1], ours)


def image_to_image(name):
    if name == "sd_img2img":
        return build(name)
    pipe, call = build("sd3")
    image = rows(1, 3, 16, 16, seed=5).sigmoid()
    made = diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made, {**call, "image": image}


@pytest.mark.parametrize(("strength", "calls"), [(0.75, 6), (0.5, 4), (0.25, 2)])
@pytest.mark.parametrize("solver", ["unipc3-bh2/logsnr", "dpmpp2m/edm", "fitted"])
@pytest.mark.parametrize("name", ["sd_img2img", "sd3_img2img"])
def test_image_to_image_starts_in_the_middle_as_the_rest_of_the_schedule_does(
    name, solver, strength, calls
):
    pipe, call = image_to_image(name)
    denoiser = PipelineDenoiser(pipe, (), call)
    config = json.loads(pipe.scheduler.to_json_string())
    schedule = baseline("unipc2-bh1/edm" if solver == "fitted" else solver, denoiser.noise, 8)
    if solver == "fitted":
        schedule = ProgramSchedule.of(schedule)
    pipe.scheduler = FewstepScheduler.from_config(config, schedule=schedule.to_dict())
    given, made = watched(pipe.scheduler)
    more = {"strength": strength, "generator": seeded(), "output_type": "latent"}
    pipe(num_inference_steps=8, **more, **first(call))
    rest = from_call(schedule, 8 - calls)
    ours = sample(rest, denoiser, given[0])
    assert len(made) == calls
    assert close(made[-1], ours)


def counted(pipe):
    """Images that each network call of a pipeline sees, as a list that fills."""
    sizes, network = [], getattr(pipe, "unet", None) or pipe.transformer
    forward = network.forward

    def spy(*args, **kwargs):
        state = args[0] if args else kwargs["hidden_states"]
        sizes.append(len(state))
        return forward(*args, **kwargs)

    network.forward = spy
    return sizes


@pytest.mark.parametrize(
    "scales", [(1.0, 3.0, 2.5, 1.0), (4.0, 1.0, 1.0, 2.0), (1.0, 1.0, 1.0, 1.0)]
)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_calls_left_unguided_ask_the_network_once_and_the_samples_are_our_own(name, scales):
    pipe, call = build(name)
    denoiser = PipelineDenoiser(pipe, (), call)
    config = json.loads(pipe.scheduler.to_json_string())
    program = ProgramSchedule.of(baseline("unipc2-bh2/logsnr", denoiser.noise, 4))
    guidance = torch.tensor(scales, dtype=torch.float64)
    schedule = program.model_copy(update={"program": replace(program.program, guidance=guidance)})
    pipe.scheduler = FewstepScheduler.from_config(config, schedule=schedule.to_dict())
    given, made = watched(pipe.scheduler)
    sizes = counted(pipe)
    more = {**first(call), "guidance_scale": max(scales[0], 1 + 1e-7), "output_type": "latent"}
    more |= {"callback_on_step_end": pipe.scheduler.guidance_callback(pipe)}
    for _ in range(2):  # a pipeline runs again
        made.clear(), given.clear(), sizes.clear()
        pipe(num_inference_steps=4, generator=seeded(), **more)
        assert sizes == [1 if w == 1 else 2 for w in scales]
        sizes.clear()
        ours = sample(schedule, denoiser, given[0])
        assert sizes == [1 if w == 1 else 2 for w in scales]
        assert close(made[-1], ours)


def test_a_pipeline_that_cannot_leave_a_call_unguided_is_refused():
    pipe, call = build("dit")
    denoiser = PipelineDenoiser(pipe, (), call)
    program = ProgramSchedule.of(baseline("ddim/logsnr", denoiser.noise, 2))
    guidance = torch.tensor([1.0, 4.0], dtype=torch.float64)
    schedule = program.model_copy(update={"program": replace(program.program, guidance=guidance)})
    scheduler = FewstepScheduler.from_config(pipe.scheduler.config, schedule=schedule.to_dict())
    with pytest.raises(ScheduleError, match=r"leaves calls unguided.*: pass the pipeline"):
        scheduler.guidance_callback()
    with pytest.raises(ScheduleError, match="DiTPipeline does not ask for both branches"):
        scheduler.guidance_callback(pipe)
