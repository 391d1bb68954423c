"""Class-conditional Fashion-MNIST: a rectified flow in a diffusers pipeline, and its judge.

Images are x0 = pixel/127.5 - 1 in [-1, 1], shape (1, 28, 28); labels are 0..9 (`LABELS`), and 10
is the null label of classifier-free guidance. The process is the rectified flow

    x_t = (1 - t) x0 + t eps,    dx/dt = v = eps - x0,    t from 1 (noise) to 0 (data)

and the network a `UNet2DModel` that is given 1000 t and the label and returns v. It sees an image
packed by squares of 2x2 pixels, (4, 14, 14), which costs a fourth of the time; noise stays noise.
The model is used the way people use theirs: as a diffusers pipeline in a folder, with a scheduler.

    pipe = FashionPipeline.from_pretrained(FOLDER)
    images = pipe([7, 9], guidance_scale=4.0, num_inference_steps=20).images

`python -m fewstep.experiments.models.train_fashion` made the weights; README.md has their card.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fewstep.samplers import Problem
from fewstep.samplers.pipelines import pipeline_problem
from fewstep.samplers.saved_pipeline import loaded_quietly
from fewstep.space.errors import ModelError

LABELS = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
NULL_LABEL = 10
FOLDER = Path(__file__).with_name("fashion_pipeline")
CLASSIFIER = FOLDER / "classifier.safetensors"


def new_unet() -> UNet2DModel:
    """The network, without weights."""
    return UNet2DModel(
        sample_size=14,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=NULL_LABEL + 1,
    )


class FashionPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """Images of clothes by class, from a rectified flow with classifier-free guidance.

    Args:
        unet: a `UNet2DModel` that predicts v = eps - x0 at 1000 t, with `NULL_LABEL` for no class.
        scheduler: a flow-matching scheduler of diffusers.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 1.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw images.

        Args:
            class_labels: a label, 0 to 9, for each image.
            guidance_scale: of classifier-free guidance; 1 is none, and asks the network once.
            num_inference_steps: steps of the scheduler.
            generator: for the start noise.
            latents: the start noise (B, 4, 14, 14), instead of drawing it.
            output_type: "pil", "np" (B, 28, 28, 1) in 0..1, or "latent" (B, 4, 14, 14), packed.
            return_dict: whether to return an `ImagePipelineOutput` or a tuple.
        """
        device, dtype = self._execution_device, self.unet.dtype
        label = torch.as_tensor(class_labels, dtype=torch.int64, device=device)
        side = self.unet.config.sample_size
        shape = (len(label), self.unet.config.in_channels, side, side)
        if latents is None:
            latents = torch.randn(shape, generator=generator, dtype=dtype)
        x = latents.to(device, dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        guided = guidance_scale != 1.0
        asked = torch.cat([torch.full_like(label, NULL_LABEL), label]) if guided else label
        for t in self.progress_bar(self.scheduler.timesteps):
            v = self.unet(torch.cat([x, x]) if guided else x, t, class_labels=asked).sample
            if guided:
                null, v = v.chunk(2)
                v = null + guidance_scale * (v - null)
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
        if output_type != "latent":
            image = functional.pixel_shuffle(x.float(), 2)
            pixels = (image / 2 + 0.5).clamp(0, 1).movedim(1, -1).cpu().numpy()
            images = self.numpy_to_pil(pixels) if output_type == "pil" else pixels
            return ImagePipelineOutput(images=images) if return_dict else (images,)
        return ImagePipelineOutput(images=x) if return_dict else (x,)


class FashionClassifier(nn.Module):
    """A small convolutional classifier; its 64 penultimate features serve a Frechet distance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1, stride=2)
        self.hidden = nn.Linear(64 * 49, 64)
        self.out = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, 1, 28, 28) in about [-1, 1] -> features (B, 64)."""
        h = functional.silu(self.conv1(x))
        h = functional.silu(self.conv2(h))
        h = functional.silu(self.conv3(h))
        out: Tensor = functional.silu(self.hidden(h.flatten(1)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1, 28, 28) -> logits (B, 10)."""
        out: Tensor = self.out(self.features(x))
        return out


@functools.cache
def load_classifier() -> FashionClassifier:
    """The classifier with trained weights, in evaluation mode."""
    net = FashionClassifier()
    net.load_state_dict(load_file(_there(CLASSIFIER)))
    return net.eval().requires_grad_(False)


def features(x: Tensor) -> Tensor:
    """Features (B, 64) of packed samples (B, 4, 14, 14), clamped as a picture is."""
    return load_classifier().features(functional.pixel_shuffle(x.float(), 2).clamp(-1, 1))


def problem(guidance: float = 4.0, *, device: str | None = None) -> Problem:
    """The study factory: the pipeline as it lies in `FOLDER`, sample i of class i mod 10.

    Args:
        guidance: classifier-free guidance scale; 1 is the conditional model, at half the cost.
        device: where the network runs; None is the CPU.

    Raises:
        ModelError: the weights are not there.
    """
    _there(FOLDER / "model_index.json")
    pipe = loaded_quietly(FashionPipeline, FOLDER).to(device or "cpu")
    call = {"class_labels": list(range(NULL_LABEL)), "guidance_scale": float(guidance)}
    return replace(pipeline_problem(pipe, call=call), features=features)


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist: python -m fewstep.experiments.models.train_fashion makes it"
        )
    return path
