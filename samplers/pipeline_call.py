"""The call of a diffusers pipeline, with what the user says of it, for chosen prompts.

Which arguments a pipeline takes is read off its signature. Those that decide the sampling itself
are ours and are refused; those whose name holds "prompt", and "class_labels", have a row per
prompt; the others are passed on as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.samplers.inner import Asked, Caught, standing_in
from fewstep.samplers.prompts import PromptCache
from fewstep.space.errors import FewstepError, ModelError

_INDEXED = "it depends on the index of a step, which a single call has not"
_TIMES = "the schedule decides the times"
_DECODED = "samples stay latents, and pictures are decoded"
OURS = {
    "latents": "the schedule's start is the state",
    "generator": "the noise of the samples is the search's",
    "num_inference_steps": "the schedule decides the number of calls",
    "timesteps": _TIMES,
    "sigmas": _TIMES,
    "denoising_start": _TIMES,
    "denoising_end": _TIMES,
    "eta": "the schedule decides whether noise is added",
    "output_type": _DECODED,
    "return_dict": _DECODED,
    "num_images_per_prompt": "each sample has one prompt",
    "num_videos_per_prompt": "each sample has one prompt",
    "batch_size": "the search decides how many samples run at once",
    "skip_guidance_layers": _INDEXED,
    "control_guidance_start": _INDEXED,
    "control_guidance_end": _INDEXED,
    "callback_on_step_end": "it runs between steps, and a single call has none",
    "callback": "it runs between steps, and a single call has none",
}
"""Arguments that the user may not set, and why."""

_COUNTS = ("batch_size", "num_images_per_prompt", "num_videos_per_prompt")


class PipelineCall:
    """A pipeline and the arguments of its calls.

    Args:
        pipeline: a loaded diffusers pipeline.
        prompts: the prompts; none where the pipeline takes no text or `given` brings embeddings.
        given: further arguments.
        embedded: whether the network takes the guidance scale as an input.

    `rows` is the number of prompts, `guidance` the scale of the call or the pipeline's default,
    None without guidance.

    Raises:
        ModelError: an argument that the pipeline does not take or that is ours.
    """

    def __init__(
        self, pipeline: Any, prompts: Sequence[str], given: Mapping[str, Any], *, embedded: bool
    ) -> None:
        self.pipeline, self.name = pipeline, type(pipeline).__name__
        self._accepts = inspect.signature(pipeline.__call__).parameters
        self._per_prompt, self._fixed = self._sorted(prompts, dict(given))
        self.rows = max((len(v) for v in self._per_prompt.values()), default=1)
        self._scale, self._unguided = self._scale_argument(embedded)
        value = None
        if self._scale is not None and not self._unguided:
            value = self._fixed.get(self._scale, self._accepts[self._scale].default)
        self.guidance = float(value) if isinstance(value, int | float) else None
        encode = getattr(pipeline, "encode_prompt", None)
        self._others = {} if encode is None else {"encode_prompt": PromptCache(encode)}

    @property
    def takes_state(self) -> bool:
        """Whether the pipeline can be given the state by an argument."""
        return "latents" in self._accepts

    def run(self, inner: Any, which: Sequence[int], scale: float | None, **more: Any) -> Any:
        """One call of the pipeline with the scheduler `inner`, for the prompts `which`.

        Args:
            inner: stands in for the pipeline's scheduler.
            which: index of the prompt of each sample.
            scale: guidance scale; None leaves the call's own.
            more: arguments for this call, where the pipeline takes them.

        Raises:
            ModelError: whatever the pipeline raises, in one line.
            Asked, Caught: the inner scheduler left the pipeline.
        """
        given: dict[str, Any] = self._fixed | self._chosen(which) | self._scaled(scale)
        given |= {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(0), **more}
        given = {name: value for name, value in given.items() if name in self._accepts}
        with standing_in(self.pipeline, inner, **self._others):
            try:
                return self.pipeline(**given)
            except (Asked, Caught, FewstepError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                line = " ".join(str(error).split())[:300]
                raise ModelError(
                    f"{self.name} could not be called with {', '.join(sorted(given))}: "
                    f"{type(error).__name__}: {line}"
                ) from error

    def _chosen(self, which: Sequence[int]) -> dict[str, Any]:
        """The arguments with a row per prompt, for samples of the prompts `which`."""
        if not self._per_prompt:
            return dict.fromkeys(_COUNTS, len(which))
        rows: dict[str, Any] = {}
        for name, values in self._per_prompt.items():
            at = [i % len(values) for i in which]
            rows[name] = values[at] if isinstance(values, Tensor) else [values[i] for i in at]
            if len(at) == 1 and isinstance(rows[name][0], str):
                rows[name] = rows[name][0]  # some pipelines take no list of prompts
        return rows

    def _scaled(self, scale: float | None) -> dict[str, float]:
        if scale is None or (scale == 1.0 and (self._scale is None or self._unguided)):
            return {}
        if self._scale is None or self._unguided:
            why = self._unguided or "its call takes no scale"
            raise ModelError(f"guidance {scale:g} is asked of {self.name}: {why}")
        return {self._scale: scale}

    def _sorted(
        self, prompts: Sequence[str], given: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments with a row per prompt, and the others."""
        if isinstance(prompts, str):
            raise ModelError("prompts is one string: give a list of prompts")
        if prompts and "prompt" in given:
            raise ModelError("the prompts are given twice: leave prompt out of call")
        if prompts:
            given["prompt"] = list(prompts)
        rows: dict[str, Any] = {}
        for name, value in list(given.items()):
            if name in OURS:
                raise ModelError(f"call.{name} cannot be set: {OURS[name]}; leave it out")
            if name not in self._accepts:
                known = ", ".join(k for k in self._accepts if k not in OURS)
                raise ModelError(f"call.{name} is no argument of {self.name}: it takes {known}")
            per_prompt = "prompt" in name or name == "class_labels"
            if per_prompt and isinstance(value, str | list | tuple | Tensor):
                rows[name] = [value] if isinstance(value, str) else value
                if len(rows[name]) == 0:
                    raise ModelError(f"call.{name} is empty: give at least one")
                del given[name]
        if "strength" in self._accepts and float(given.setdefault("strength", 1.0)) != 1.0:
            raise ModelError(
                f"call.strength is {given['strength']:g}: a search goes the whole way from noise; "
                "leave it out, an image-to-image call starts within the schedule found"
            )
        return rows, given

    def _scale_argument(self, embedded: bool) -> tuple[str | None, str]:
        """The argument that is the guidance scale, and why it has no effect, if it has none."""
        if "true_cfg_scale" in self._accepts and not embedded:
            negative = any(name.startswith("negative") for name in self._per_prompt)
            return "true_cfg_scale", "" if negative else "give a negative_prompt in call"
        return ("guidance_scale" if "guidance_scale" in self._accepts else None), ""
