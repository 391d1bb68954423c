"""Diffusers pipelines of every family as denoisers, against what the pipelines themselves do."""

from __future__ import annotations

import inspect

import pytest
import torch

from fewstep.samplers import sample, start
from fewstep.samplers.problems import Problem
from fewstep.space import ModelError

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fewstep.samplers.pipelines import PipelineDenoiser, pipeline_problem
from fewstep.samplers.saved_pipeline import load_pipeline
from tests.tiny_pipelines import BUILDERS, SD_BETAS, build, unet, with_text

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NO_LATENTS = ("sd_img2img", "dit", "ddpm")


def first(call):
    """The arguments of a call for one sample."""
    rows = {k: v[:1] for k, v in call.items() if "prompt" in k or k == "class_labels"}
    return {**call, **rows}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shown(pipe, name, z, call, steps):
    """What the pipeline itself makes of unit noise z in `steps` steps: latents."""
    more = {"num_inference_steps": steps, "generator": seeded(), "return_dict": False}
    if name == "ddpm":  # its images are the states
        images = pipe(output_type="pt", **more)[0]
        return images if isinstance(images, torch.Tensor) else torch.as_tensor(images)
    x = z
    if name == "sdxl_refiner":  # takes its latents as they are, at the level of its first step
        pipe.scheduler.set_timesteps(steps)
        x = z * pipe.scheduler.init_noise_sigma
    if name in ("sdxl_refiner", "sd_inpaint"):
        more["strength"] = 1.0
    return pipe(latents=x, output_type="latent", **more, **first(call))[0]


def close(a, b, tolerance=2e-7):
    return float(((a - b).abs() / (1 + b.abs().max())).max()) <= tolerance


@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in NO_LATENTS])
def test_the_schedule_of_the_pipelines_own_scheduler_does_what_the_scheduler_does(name):
    pipe, call = build(name)
    denoiser = PipelineDenoiser(pipe, (), call)
    stock = denoiser.stock(5)
    z = torch.randn(1, *denoiser.shape, generator=seeded(1))
    ours = sample(stock, denoiser, start(stock, z))
    theirs = shown(pipe, name, z, call, stock.provenance["steps"])
    assert close(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_images_of_many_times_prompts_and_scales_are_each_as_if_alone(name):
    pipe, call = build(name)
    denoiser = PipelineDenoiser(pipe, (), call)
    high, low = denoiser.noise.t_range
    t = torch.tensor([0.9 * high + 0.1 * low, 0.3 * high, 0.3 * high], dtype=torch.float64)
    x = torch.randn(3, *denoiser.shape, generator=seeded())
    prompt = torch.tensor([0, 1, 1])
    scale = None
    if denoiser.guidance is not None:
        scale = torch.tensor([denoiser.guidance, 1.0, 1.0], dtype=torch.float64)
    before = denoiser.calls
    together = denoiser(x, t, cond={"prompt": prompt}, guidance=scale)
    assert denoiser.calls == before + 2
    for i in range(3):
        alone = denoiser(
            x[i : i + 1],
            t[i : i + 1],
            cond={"prompt": prompt[i : i + 1]},
            guidance=None if scale is None else float(scale[i]),
        )
        assert close(together[i : i + 1], alone, 1e-5)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "qwen_image", "ltx", "wan", "dit"])
def test_an_unguided_call_asks_the_network_once_and_a_guided_one_twice(name):
    pipe, call = build(name)
    denoiser = PipelineDenoiser(pipe, (), call)
    rows = []
    network = getattr(pipe, "unet", None) or pipe.transformer
    network.register_forward_hook(lambda m, args, out: rows.append(len(out[0])))
    x = torch.randn(1, *denoiser.shape, generator=seeded())
    t = torch.tensor([denoiser.noise.t_range[0]], dtype=torch.float64)
    for scale, images in ((1.0, 1), (3.0, 2)):
        rows.clear()
        denoiser(x, t, guidance=scale)
        assert sum(rows) == images


def test_the_scale_of_a_guided_network_reaches_it_embedded():
    pipe, call = build("flux")
    denoiser = PipelineDenoiser(pipe, (), call)
    told = []
    pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: told.append(kwargs["guidance"].tolist()), with_kwargs=True
    )
    x, t = torch.randn(1, *denoiser.shape), torch.tensor([0.5], dtype=torch.float64)
    for scale, expected in ((None, 3.5), (1.0, 1.0), (6.0, 6.0)):
        denoiser(x, t, guidance=scale)
        assert told.pop() == [expected]
        assert not told


def test_the_two_experts_of_a_pipeline_are_asked_on_their_sides_of_the_boundary():
    pipe, call = build("wan")
    denoiser = PipelineDenoiser(pipe, (), call)
    asked = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_hook(lambda m, a, o, name=name: asked.append(name))
    x = torch.randn(1, *denoiser.shape)
    for level, expected in ((0.95, "transformer"), (0.8, "transformer_2")):
        asked.clear()
        t = denoiser.noise.t_of_lam(torch.tensor([1 - level]).log() - torch.tensor([level]).log())
        denoiser(x, t.double())
        assert set(asked) == {expected}


def test_the_pipeline_is_left_as_it_was():
    pipe, call = build("sd3")
    before, config = dict(pipe.__dict__), dict(pipe.config)
    denoiser = PipelineDenoiser(pipe, (), call)
    denoiser(torch.randn(1, *denoiser.shape), torch.tensor([0.5], dtype=torch.float64))
    denoiser.decode(torch.randn(1, *denoiser.shape))
    after = {k: v for k, v in pipe.__dict__.items() if k in before}
    assert after["scheduler"] is before["scheduler"]
    assert set(before) == set(after)
    assert "encode_prompt" not in pipe.__dict__
    assert pipe._progress_bar_config == before["_progress_bar_config"]
    assert dict(pipe.config) == config


def test_pictures_are_what_the_pipeline_shows():
    pipe, call = build("sd15")
    denoiser = PipelineDenoiser(pipe, (), call)
    z = torch.randn(1, *denoiser.shape, generator=seeded(1))
    theirs = pipe(latents=z, num_inference_steps=4, output_type="np", **first(call)).images
    latents = pipe(latents=z, num_inference_steps=4, output_type="latent", **first(call)).images
    ours = denoiser.decode(latents)
    assert ours.shape == (1, 3, 8, 8)
    assert torch.allclose(ours.movedim(1, -1), torch.as_tensor(theirs), atol=1e-6)


def test_a_saved_pipeline_and_prompts_are_a_problem_and_each_prompt_is_encoded_once(tmp_path):
    with_text(tmp_path / "tokenizer").save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n  rain \n")
    pipe = load_pipeline(tmp_path / "pipe")
    encoded = []
    pipe.text_encoder.register_forward_hook(lambda m, args, out: encoded.append(len(out[0])))
    problem = pipeline_problem(pipe, tmp_path / "prompts.txt", {"negative_prompt": "fog"})
    assert isinstance(problem, Problem)
    assert problem.guidance == 7.5
    cond = problem.cond(torch.arange(6))
    assert cond["prompt"].tolist() == [0, 1, 2, 0, 1, 2]
    x = torch.randn(6, *problem.shape)
    t = torch.full((6,), 500.0, dtype=torch.float64)
    first_answer = problem.denoiser(x, t, cond=cond, guidance=7.5)
    count = len(encoded)
    assert torch.equal(problem.denoiser(x, t, cond=cond, guidance=7.5), first_answer)
    problem.denoiser(x[:4], t[:4], cond={"prompt": cond["prompt"][:4]}, guidance=7.5)
    assert len(encoded) == count
    direct = pipe.encode_prompt(["a cat", "a dog", "rain"], "cpu", 1, True, ["fog"] * 3)[0]
    assert (direct[0] - direct[1]).abs().max() > 1e-3  # prompts differ
    assert problem.picture(x).shape == (6, 8, 8, 3)
    assert list(problem.baselines(4)) == ["stock:EulerDiscreteScheduler"]


@pytest.mark.parametrize(
    ("name", "prompts", "call", "line"),
    [
        ("sd15", (), {"num_inference_steps": 4}, "num_inference_steps cannot be set: the sched"),
        ("sd15", (), {"skip_guidance_layers": [1]}, "depends on the index of a step"),
        ("sd15", (), {"guidence_scale": 4.0}, "call.guidence_scale is no argument of StableDiff"),
        ("sd15", "a cat", {}, "prompts is one string"),
        ("sd15", ["a"], {"prompt": ["b"]}, "prompts are given twice"),
        ("sd_img2img", (), {"strength": 0.6}, "call.strength is 0.6: a search goes the whole way"),
        ("sd3", (), {"prompt_embeds": None, "pooled_prompt_embeds": None}, "could not be called"),
    ],
)
def test_what_cannot_be_asked_is_one_line(name, prompts, call, line):
    pipe, given = build(name)
    with pytest.raises(ModelError, match=line) as caught:
        PipelineDenoiser(pipe, prompts, {**given, **call})
    assert "\n" not in str(caught.value)


def test_a_scale_asked_of_a_pipeline_without_guidance_is_refused():
    pipe, call = build("ddpm")
    denoiser = PipelineDenoiser(pipe, (), call)
    x, t = torch.randn(1, *denoiser.shape), torch.tensor([500.0], dtype=torch.float64)
    denoiser(x, t, guidance=1.0)
    with pytest.raises(ModelError, match="guidance 3 is asked of DDPMPipeline: its call takes no"):
        denoiser(x, t, guidance=3.0)


def test_networks_that_reuse_activations_between_steps_are_refused():
    from diffusers.hooks import FirstBlockCacheConfig

    pipe, call = build("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ModelError, match="disable_cache"):
        PipelineDenoiser(pipe, (), call)


class OneAtATime(diffusers.StableDiffusionPipeline):
    """Takes neither two prompts nor a list of one, as some video pipelines."""

    def __call__(self, prompt=None, prompt_embeds=None, **more):
        if isinstance(prompt, list) or (prompt_embeds is not None and len(prompt_embeds) > 1):
            raise ValueError("one prompt, please")
        return super().__call__(prompt, prompt_embeds=prompt_embeds, **more)

    __call__.__signature__ = inspect.signature(diffusers.StableDiffusionPipeline.__call__)


def test_a_pipeline_for_whose_pairs_the_memory_is_too_small_is_asked_for_single_images(caplog):
    class Large(diffusers.StableDiffusionPipeline):
        def __call__(self, *args, prompt_embeds=None, **more):
            if len(prompt_embeds) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(*args, prompt_embeds=prompt_embeds, **more)

        __call__.__signature__ = inspect.signature(diffusers.StableDiffusionPipeline.__call__)

    pipe, call = build("sd15")
    denoiser = PipelineDenoiser(Large(**pipe.components), (), call)
    assert "one image at a time: two together: CUDA out of memory" in caplog.text
    x, t = torch.randn(2, *denoiser.shape), torch.full((2,), 500.0, dtype=torch.float64)
    assert close(denoiser(x, t), PipelineDenoiser(pipe, (), call)(x, t), 1e-5)


@pytest.mark.parametrize("text", [False, True])
def test_a_pipeline_that_takes_one_image_is_asked_for_one_after_another(tmp_path, caplog, text):
    plain, call = (with_text(tmp_path), {}) if text else build("sd15")
    prompts = ["a cat", "rain"] if text else ()
    alone = OneAtATime(**plain.components)
    alone.set_progress_bar_config(disable=True)
    whole = PipelineDenoiser(plain, prompts, call)
    assert "one image at a time" not in caplog.text
    single = PipelineDenoiser(alone, prompts, call)
    assert "OneAtATime is asked for one image at a time" in caplog.text
    x = torch.randn(3, *whole.shape, generator=seeded())
    t = torch.tensor([700.0, 200.0, 200.0], dtype=torch.float64)
    cond = {"prompt": torch.tensor([0, 1, 0])}
    assert close(single(x, t, cond=cond), whole(x, t, cond=cond), 1e-5)
    assert single.decode(x).shape == whole.decode(x).shape


class NoLatents(diffusers.StableDiffusionPipeline):
    """Refuses the latents that its call lists, as pipelines that are given a video."""

    def __call__(self, *args, latents=None, **more):
        if latents is not None:
            raise ValueError("only one of video or latents")
        return super().__call__(*args, **more)

    __call__.__signature__ = inspect.signature(diffusers.StableDiffusionPipeline.__call__)


def test_a_pipeline_that_refuses_latents_gets_its_state_at_the_network():
    plain, call = build("sd15")
    refusing = NoLatents(**plain.components)
    refusing.set_progress_bar_config(disable=True)
    whole, hooked = (PipelineDenoiser(pipe, (), call) for pipe in (plain, refusing))
    x = torch.randn(3, *whole.shape, generator=seeded())
    t = torch.tensor([700.0, 200.0, 200.0], dtype=torch.float64)
    assert close(hooked(x, t), whole(x, t), 1e-5)
    assert torch.equal(hooked.decode(x), whole.decode(x))


def test_noise_that_the_pipeline_draws_itself_is_not_taken_for_the_state():
    class Own(diffusers.StableDiffusionPipeline):
        """Draws its noise whatever it is given, and shows its network more than the state."""

        def __call__(self, *args, latents=None, **more):
            def inner(module, args, kwargs):
                return (torch.cat([args[0], args[0]], -1), *args[1:]), kwargs

            def cut(module, args, output):
                return (output[0][..., : output[0].shape[-1] // 2],)

            handles = [self.unet.register_forward_pre_hook(inner, with_kwargs=True, prepend=True)]
            handles.append(self.unet.register_forward_hook(cut))
            try:
                return super().__call__(*args, **more)
            finally:
                for handle in handles:
                    handle.remove()

        __call__.__signature__ = inspect.signature(diffusers.StableDiffusionPipeline.__call__)

    pipe, call = build("sd15")
    with pytest.raises(ModelError, match="does not hand its scheduler the state"):
        PipelineDenoiser(Own(**pipe.components), (), call)


def scaling(pipe, factor):
    """A pipeline that multiplies its network's output by a factor of its scheduler."""

    class Scaling(diffusers.StableDiffusionPipeline):
        def __call__(self, *args, **more):
            def scaled(module, args, output):
                return (output[0] * factor(self.scheduler),)

            handle = self.unet.register_forward_hook(scaled)
            try:
                return super().__call__(*args, **more)
            finally:
                handle.remove()

        __call__.__signature__ = inspect.signature(diffusers.StableDiffusionPipeline.__call__)

    return Scaling(**pipe.components)


def test_a_pipeline_that_computes_with_its_schedulers_sigmas_is_refused():
    pipe, call = build("sd15")
    upscaling = scaling(pipe, lambda scheduler: float(scheduler.sigmas[0]))
    with pytest.raises(ModelError, match="computes with its scheduler's sigmas itself"):
        PipelineDenoiser(upscaling, (), call)


def warned(caplog, pipe, call):
    """What is said of a pipeline when it is looked at."""
    caplog.clear()
    PipelineDenoiser(pipe, (), call)
    return caplog.text


def test_what_a_pipeline_does_between_steps_is_said(caplog):
    for name in ("sd15", "sdxl", "sd3", "flux", "qwen_image", "ltx", "wan", "dit", "sd_inpaint"):
        assert "a search asks for single calls" not in warned(caplog, *build(name))
    nine, call = build("sd_inpaint")
    blending = diffusers.StableDiffusionInpaintPipeline(**nine.components | {"unet": unet(4)})
    assert "changes states between its steps" in warned(caplog, blending, call)

    pipe, call = build("sd15")
    next_time = scaling(pipe, lambda scheduler: 1 + 0.1 * len(scheduler.timesteps))
    assert "more than state and time" in warned(caplog, next_time, call)


def test_a_guider_that_follows_the_steps_is_said(caplog):
    from diffusers import guiders

    pipe, call = build("sd15")
    for guider, said in (
        (guiders.ClassifierFreeGuidance(), False),
        (guiders.ClassifierFreeGuidance(stop=0.5), True),
        (guiders.AdaptiveProjectedGuidance(), True),
    ):
        pipe.guider = guider
        assert ("that follows the steps" in warned(caplog, pipe, call)) == said


def test_what_a_pipeline_changed_in_its_schedulers_configuration_is_what_its_baseline_does():
    scheduler = diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False)  # steps_offset by default
    pipe = diffusers.StableDiffusionPipeline(
        **build("sd15")[0].components | {"scheduler": scheduler}
    )
    assert pipe.scheduler.config.steps_offset == 1  # Stable Diffusion's pipeline sets it
    denoiser = PipelineDenoiser(pipe, (), build("sd15")[1])
    assert denoiser.stock(4).program.t.tolist() == [751.0, 501.0, 251.0, 1.0]


def test_a_scheduler_of_another_kind_is_said_before_anything_is_run():
    pipe, call = build("sd15")
    pipe.scheduler = diffusers.DDPMWuerstchenScheduler()
    with pytest.raises(ModelError, match="DDPMWuerstchenScheduler belongs to another kind"):
        PipelineDenoiser(pipe, (), call)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"pipeline": "nowhere"}, "no model_index.json there"),
        ({"dtype": "int8"}, "no floating point type"),
        ({"prompts": "nowhere.txt"}, "cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, change, line):
    build("ddpm")[0].save_pretrained(tmp_path / "pipe")
    given = {"pipeline": tmp_path / "pipe", **change}
    with pytest.raises(ModelError, match=line) as caught:
        pipeline_problem(**given)
    assert "\n" not in str(caught.value)
