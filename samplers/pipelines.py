"""Any diffusers pipeline as a Denoiser: one call of the pipeline is one network call.

The pipeline runs with a scheduler of ours (`samplers.inner`), which gives it the state and the
label of one timestep and takes from it what it made of the network's output: guidance, embeddings,
packing, control networks, and whatever else stands in the pipeline. What that output means (noise
schedule, output kind, time scale, shift) is read from the configuration of the scheduler the
pipeline came with, by `samplers.network`. The pipeline itself is left as it is, on its device, in
its dtype, with its offloading.

    pipe = DiffusionPipeline.from_pretrained("my_pipeline")
    denoiser = PipelineDenoiser(pipe, ["a cat", "a dog"], {"guidance_scale": 5.0})
    x = sample(schedule, denoiser, start(schedule, torch.randn(2, *denoiser.shape)),
               cond={"prompt": torch.tensor([0, 1])})
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.denoiser import Cond, require_no_cache
from fewstep.samplers.inner import Asked, Caught, given_state, inner_scheduler
from fewstep.samplers.network import NETWORKS, network_facts
from fewstep.samplers.pipeline_call import PipelineCall
from fewstep.samplers.problems import Problem
from fewstep.samplers.saved_pipeline import load_pipeline, read_prompts, with_images
from fewstep.samplers.stock import stock_schedule
from fewstep.space.errors import ModelError, ScheduleError, one_line
from fewstep.space.noise import RectifiedFlow
from fewstep.space.program import ProgramSchedule

__all__ = ["PipelineDenoiser", "pipeline_problem"]

_PICTURE = 192
_DECODED = 4

log = logging.getLogger(__name__)


class PipelineDenoiser:
    """A diffusers pipeline behind the Denoiser contract.

    Args:
        pipeline: a loaded diffusers pipeline. Its scheduler says what its network was trained
            with, and stays in place.
        prompts: the prompts to sample from; none for a pipeline without text, or where `call`
            brings embeddings.
        call: further arguments of the pipeline's call, such as guidance_scale, height or
            negative_prompt. Values of arguments named "*prompt*", and "class_labels", may hold one
            row per prompt.

    `noise` is the model's noise schedule; `shape` that of one state as the pipeline's scheduler
    sees it (packed where the pipeline packs); `device` the pipeline's; `guidance` the scale of
    `call`, or else the pipeline's default, or None; `rows` the number of prompts; `calls` how
    often the pipeline was called.

    Called with `cond={"prompt": (B,) indices of prompts}`; without it all samples have prompt 0.
    `guidance` replaces the pipeline's scale, embedded or classifier-free; 1 switches
    classifier-free guidance off, and the network is asked once; None leaves what `call` says.

    Raises:
        ModelError: the pipeline cannot be asked one step at a time, or its scheduler is not
            understood; one line with the reason.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str] = (),
        call: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self._name = type(pipeline).__name__
        self._networks = _networks(pipeline)
        embedded = bool(getattr(self._networks[0], "config", {}).get("guidance_embeds"))
        self._call = PipelineCall(pipeline, prompts, call or {}, embedded=embedded)
        self.rows, self.guidance = self._call.rows, self._call.guidance
        self.device = torch.device(pipeline._execution_device)
        self._dtype = self._networks[0].dtype
        self._stock = pipeline.scheduler
        self._inner = inner_scheduler(pipeline.scheduler)
        self.calls = 0
        self._alone, self._hooked = False, not self._call.takes_state
        self._look()

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        *,
        cond: Cond | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """See `Denoiser`; images asked at different times or scales are in separate calls."""
        which = (cond or {}).get("prompt")
        chosen = torch.zeros(len(x), dtype=torch.long) if which is None else which.cpu().long()
        scale = torch.full((len(x),), -1.0, dtype=torch.float64)
        if guidance is not None:
            scale[:] = guidance.cpu() if isinstance(guidance, Tensor) else guidance
        asked = torch.stack([t.to("cpu", torch.float64), scale])
        kinds, group = asked.unique(dim=1, return_inverse=True)
        made = torch.empty_like(x)
        for k, (time, w) in enumerate(kinds.T.tolist()):
            for rows in (group == k).nonzero().flatten().split(1 if self._alone else len(x)):
                at, scale_ = rows.to(x.device), w if w >= 0 else None
                made[at] = self._denoised(x[at], time, chosen[rows].tolist(), scale_)
        return made

    def _denoised(self, x: Tensor, time: float, which: list[int], scale: float | None) -> Tensor:
        t = torch.full((len(x),), time, dtype=torch.float64)
        noise, sigma = self.noise, float(self.noise.sigma(t[0]))
        flow = isinstance(noise, RectifiedFlow)
        level = sigma if flow else sigma / float(noise.alpha(t[0]))
        state = self.facts.network_input(x, t).to(self.device, self._dtype)
        self._inner.ask(state, float(noise.label(t[0])), level)
        out, _, _ = self._answer(which, scale)
        return self.facts.data(x, out[: len(x)].to(x), t)

    def _answer(
        self, which: list[int], scale: float | None = None, **more: Any
    ) -> tuple[Tensor, Tensor, bool]:
        """One call of the pipeline.

        Returns:
            The output and the sample that it hands its scheduler, and whether our state went in by
            the network's own input.
        """
        self.calls += 1
        if not self._hooked:
            more["latents"] = self._inner.state
        hooked = self._networks if self._hooked else ()
        try:
            with given_state(hooked, self._inner.state) as told:
                self._call.run(self._inner, which, scale, **more)
        except Caught as caught:
            return caught.output, caught.sample, bool(told)
        raise ModelError(f"{self._name} ended without asking its scheduler for a step")

    def _look(self) -> None:
        """Find the state's shape and the shift by a dry run, and see that a state arrives."""
        self._read_facts(None)
        _, seen, _ = self._answer([0])
        self.shape = tuple(seen.shape[1:])
        self._read_facts(self._inner.shift_mu)
        self.noise = self.facts.noise
        self._find_way()
        self._see_between()
        self.calls = 0

    def _read_facts(self, mu: float | None) -> None:
        config = {**self._stock.config, "_class_name": type(self._stock).__name__}
        try:
            self.facts = network_facts(config, mu=mu)
        except ScheduleError as error:
            raise ModelError(f"{self._name}: {error}") from None

    def _find_way(self) -> None:
        """Whether states go in as latents or by the network's input, two together or one.

        Raises:
            ModelError: they cannot; what was tried first says why.
        """
        errors: list[Exception] = []
        for hooked, count in ((False, 2), (False, 1), (True, 2), (True, 1)):
            if not hooked and not self._call.takes_state:
                continue
            self._hooked, self._alone = hooked, count == 1
            try:
                self._require_state(count)
            except (ModelError, torch.OutOfMemoryError) as error:
                errors.append(error)
                continue
            if self._alone:
                line = "%s is asked for one image at a time: two together: %s"
                log.warning(line, self._name, one_line(errors[-1], 200))
            return
        raise errors[0]

    def _drawn(self, count: int, seed: int) -> Tensor:
        state = torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed))
        return state.to(self.device, self._dtype)

    def _require_state(self, count: int) -> None:
        """See that `count` states arrive at the scheduler or the network."""
        state = self._drawn(count, 11)  # not what the pipeline draws with the call's generator
        self._inner.ask(state, self._inner.label, self._inner.sigma)
        _, seen, replaced = self._answer([0] * count)
        arrived = seen.shape == state.shape and torch.equal(seen.to(state), state)
        if not (arrived or replaced):
            raise ModelError(
                f"{self._name} does not hand its scheduler the state it was given, so that it "
                "cannot be asked one step at a time"
            )

    def _see_between(self) -> None:
        """Say so if two steps of the pipeline are not two single calls of it.

        Raises:
            ModelError: it computes with what only its own scheduler knows.
        """
        state, between = self._drawn(1, 12), self._drawn(1, 13)
        label, sigma = self._inner.label, self._inner.sigma
        self._inner.ask_twice(state, between)
        try:
            _, seen, _ = self._answer([0], num_inference_steps=2)
        except ModelError:
            return  # no plain loop: a search of it is refused or says what it leaves out elsewhere
        first, what = self._inner.earlier, _guider(self.pipeline)
        if not _alike(seen[:1].to(between), between):
            what = "changes states between its steps, as inpainting does outside the mask"
        elif not self._hooked and first is not None:
            self._inner.ask(state, label, sigma / 2)
            if not _alike(self._answer([0])[0], first):
                self._inner.ask(state, label, sigma)
                if _alike(self._answer([0])[0], first):
                    raise ModelError(
                        f"{self._name} computes with its scheduler's sigmas itself: they are "
                        "those of its own scheduler's states, so that no other can stand in"
                    )
                what = "gives its network more than state and time, such as the next time"
        if what:
            line = "%s %s: a search asks for single calls, without this"
            log.warning(line, self._name, what)

    @property
    def scales_input(self) -> bool:
        """Whether the pipeline lets its scheduler scale the network's input."""
        return bool(self._inner.scaled)

    def stock(self, calls: int) -> ProgramSchedule:
        """What the scheduler the pipeline came with does in `calls` network calls, or fewer.

        It is set up as this pipeline sets it up: with the same list of sigmas and shift. If no
        number of steps makes exactly `calls` (two calls a step), the next lower number is taken.

        Raises:
            ScheduleError: it has no program (`samplers.stock`).
        """

        def settings(steps: int) -> dict[str, Any]:
            self._inner.listen()
            try:
                self._call.run(self._inner, [0], None, num_inference_steps=steps)
            except Asked as asked:
                return asked.settings
            raise ModelError(f"{self._name} does not call set_timesteps")

        return stock_schedule(self._stock, self.facts, calls, settings)

    def decode(self, x: Tensor) -> Tensor:
        """Samples as the pipeline shows them.

        Args:
            x: samples (B, *shape).

        Returns:
            Images (B, 3, H, W), or videos (B, F, 3, H, W), in 0..1, on the CPU; gray ones have
            three equal channels.

        Raises:
            ModelError: the pipeline cannot decode, or makes no images.
        """
        parts = [self._decoded(part) for part in x.split(1 if self._alone else _DECODED)]
        return torch.cat(parts)

    def _decoded(self, x: Tensor) -> Tensor:
        self._inner.finish(x.to(self.device, self._dtype))
        more = {"output_type": "np", "return_dict": False}
        more |= {} if self._hooked else {"latents": self._inner.state}
        scale = None if self.guidance is None else 1.0
        made = self._call.run(self._inner, [0] * len(x), scale, **more)
        images = torch.as_tensor(made[0] if isinstance(made, tuple) else made)
        if images.ndim not in (4, 5) or images.shape[-1] not in (1, 3) or len(images) != len(x):
            raise ModelError(f"{self._name} decodes to {tuple(images.shape)}: no images")
        images = images.expand(*images.shape[:-1], 3)
        return images.movedim(-1, -3).float().clamp(0, 1)

    def picture(self, x: Tensor) -> Tensor:
        """Small pictures of samples, (B, H, W, 3) in 0..1; of a video its middle frame."""
        images = self.decode(x)
        images = images if images.ndim == 4 else images[:, images.shape[1] // 2]
        high = max(images.shape[-2:])
        if high > _PICTURE:
            size = [max(1, round(side * _PICTURE / high)) for side in images.shape[-2:]]
            images = torch.nn.functional.interpolate(images, size=size, mode="area")
        return images.movedim(-3, -1)


def pipeline_problem(
    pipeline: Any,
    prompts: Sequence[str] | str | Path = (),
    call: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> Problem:
    """A pipeline as the problem of a search.

    Args:
        pipeline: a diffusers pipeline, or the folder of a saved one (`load_pipeline`).
        prompts: the prompts, or the path of a text file with one a line; sample i has prompt
            i modulo their number.
        call: further arguments of the pipeline's call; images may be paths of files.
        device: device of a pipeline loaded from a folder.
        dtype: dtype of a pipeline loaded from a folder.

    Returns:
        A `Problem` whose samples are the pipeline's latents; its pictures, and the images a
        feature function gets, are decoded. Among its baselines is the pipeline's own scheduler.

    Raises:
        ModelError: the folder, prompts or call cannot be used; one line with the reason.
    """
    if isinstance(pipeline, str | Path):
        pipeline = load_pipeline(pipeline, device=device, dtype=dtype)
    elif device is not None or dtype is not None:
        raise ModelError("device and dtype are those of the pipeline given: leave them out")
    texts = read_prompts(prompts) if isinstance(prompts, str | Path) else list(prompts)
    denoiser = PipelineDenoiser(pipeline, texts, with_images(call or {}))
    rows = denoiser.rows
    name = f"stock:{type(denoiser._stock).__name__}"
    decodes = _can_decode(denoiser)

    def baselines(calls: int) -> dict[str, ProgramSchedule]:
        try:
            return {name: denoiser.stock(calls)}
        except ScheduleError as error:
            log.warning("%s is not among the baselines at %d calls: %s", name, calls, error)
            return {}

    return Problem(
        denoiser,
        denoiser.shape,
        cond=lambda indices: {"prompt": indices % rows},
        guidance=denoiser.guidance,
        fingerprint=_fingerprint(denoiser),
        picture=denoiser.picture if decodes else None,
        decode=denoiser.decode if decodes else None,
        plain_start=not denoiser.scales_input,
        baselines=baselines,
    )


def _guider(pipeline: Any) -> str:
    """What to say of a pipeline with a guider of diffusers' that follows the steps; or ""."""
    for part in vars(pipeline).values():
        if "BaseGuidance" in {base.__name__ for base in type(part).__mro__}:
            whole = (part.config.get("start", 0.0), part.config.get("stop", 1.0)) == (0.0, 1.0)
            if type(part).__name__ != "ClassifierFreeGuidance" or not whole:
                return f"has a guider ({type(part).__name__}) that follows the steps"
    return ""


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for what a processor may make of the same question twice, in bfloat16."""
    return a.shape == b.shape and float((a - b).abs().max()) <= 0.02 * float(b.abs().max())


def _networks(pipeline: Any) -> list[Any]:
    found = [getattr(pipeline, name, None) for name in NETWORKS]
    networks = [network for network in found if isinstance(network, torch.nn.Module)]
    name = type(pipeline).__name__
    if not networks or getattr(pipeline, "scheduler", None) is None:
        raise ModelError(f"{name} has no scheduler and network that take turns: not a pipeline")
    for network in networks:
        require_no_cache(network, name)
    return networks


def _can_decode(denoiser: PipelineDenoiser) -> bool:
    """Whether a pipeline shows its samples as images; says so where it does not."""
    try:
        denoiser.decode(torch.zeros(1, *denoiser.shape))
    except ModelError as error:
        log.warning("no pictures of the samples: %s", error)
        return False
    return True


def _fingerprint(denoiser: PipelineDenoiser) -> str:
    """The pipeline's class, and a hash of its networks' configurations."""
    configs = [dict(getattr(network, "config", {})) for network in denoiser._networks]
    text = json.dumps(configs, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{type(denoiser.pipeline).__name__}:{digest}"
