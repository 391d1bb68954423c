"""Diffusers pipelines of every family in public use, tiny, with random weights: no download.

`build(name)` gives a pipeline, with the scheduler its family comes with, and the arguments that a
call of it needs. Text is given as embeddings, except where a pipeline is made with a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

Made = tuple[Any, dict[str, Any]]
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vae(latent: int = 4, levels: int = 1) -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(4,) * levels, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latent, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.0609, scaling_factor=1.5035,
    ).eval()  # fmt: skip


def unet(in_channels: int = 4, *, xl: int = 0) -> Any:
    torch.manual_seed(2)
    extra: dict[str, Any] = {}
    if xl:
        extra = {
            "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 1),
            "projection_class_embeddings_input_dim": xl,
        }  # fmt: skip
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=in_channels,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        cross_attention_dim=16, norm_num_groups=4, **extra,
    ).eval()  # fmt: skip


def _text(rows_: int, width: int, seed: int = 0, *, pooled: int = 0) -> dict[str, Any]:
    call = {
        "prompt_embeds": rows(rows_, 4, width, seed=seed),
        "negative_prompt_embeds": rows(1, 4, width, seed=seed + 1),
    }
    if pooled:
        call["pooled_prompt_embeds"] = rows(rows_, pooled, seed=seed + 2)
        call["negative_pooled_prompt_embeds"] = rows(1, pooled, seed=seed + 3)
    return call


def _sd_parts(net: Any, scheduler: Any) -> dict[str, Any]:
    return {
        "unet": net, "vae": vae(), "text_encoder": None, "tokenizer": None, "scheduler": scheduler,
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


def sd15() -> Made:
    scheduler = diffusers.PNDMScheduler(
        skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False, **SD_BETAS
    )
    pipe = diffusers.StableDiffusionPipeline(**_sd_parts(unet(), scheduler))
    return pipe, {**_text(2, 16), "guidance_scale": 7.5, "height": 8, "width": 8}


def sd_v() -> Made:
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        **SD_BETAS,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(**_sd_parts(unet(), scheduler))
    call = {**_text(2, 16), "guidance_scale": 5.0, "guidance_rescale": 0.7}
    return pipe, {**call, "height": 8, "width": 8}


def sd_img2img() -> Made:
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**_sd_parts(unet(), _euler()))
    image = rows(1, 3, 8, 8, seed=5).sigmoid()
    return pipe, {**_text(1, 16), "guidance_scale": 7.5, "image": image}


def sd_inpaint() -> Made:
    """Nine input channels: mask and masked image go into the network."""
    pipe = diffusers.StableDiffusionInpaintPipeline(**_sd_parts(unet(9), _euler()))
    image, mask = rows(1, 3, 8, 8, seed=5).sigmoid(), (rows(1, 1, 8, 8, seed=6) > 0).float()
    call = {**_text(1, 16), "guidance_scale": 7.5, "image": image, "mask_image": mask}
    return pipe, {**call, "height": 8, "width": 8}


def _euler() -> Any:
    return diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SD_BETAS)


def _xl_parts(net: Any, scheduler: Any) -> dict[str, Any]:
    return {
        "unet": net, "vae": vae(), "text_encoder": None, "tokenizer": None,
        "text_encoder_2": None, "tokenizer_2": None, "scheduler": scheduler,
        "add_watermarker": False,
    }  # fmt: skip


def sdxl() -> Made:
    pipe = diffusers.StableDiffusionXLPipeline(**_xl_parts(unet(xl=80), _euler()))
    call = {**_text(2, 16, pooled=32), "guidance_scale": 5.0, "height": 8, "width": 8}
    return pipe, call


def sdxl_refiner() -> Made:
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **_xl_parts(unet(xl=72), _euler()), requires_aesthetics_score=True
    )
    image = rows(1, 3, 8, 8, seed=5).sigmoid()
    return pipe, {**_text(1, 16, pooled=32), "guidance_scale": 5.0, "image": image}


def sdxl_edm() -> Made:
    """EDM preconditioning inside SDXL, as Playground v2.5 has it."""
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, prediction_type="epsilon"
    )
    pipe = diffusers.StableDiffusionXLPipeline(**_xl_parts(unet(xl=80), scheduler))
    return pipe, {**_text(2, 16, pooled=32), "guidance_scale": 3.0, "height": 8, "width": 8}


def sd3() -> Made:
    torch.manual_seed(3)
    net = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4,
    ).eval()  # fmt: skip
    encoders = dict.fromkeys(
        [f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3")]
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=net, scheduler=scheduler, vae=vae(), **encoders
    )
    return pipe, {**_text(2, 32, pooled=64), "guidance_scale": 4.0, "height": 16, "width": 16}


def flux() -> Made:
    torch.manual_seed(4)
    net = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(
        transformer=net, scheduler=scheduler, vae=vae(1), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    call = {
        "prompt_embeds": rows(2, 4, 32),
        "pooled_prompt_embeds": rows(2, 32, seed=1),
        "guidance_scale": 3.5,
    }
    return pipe, {**call, "height": 8, "width": 8}


def qwen_image() -> Made:
    torch.manual_seed(5)
    net = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=3, joint_attention_dim=16, guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
        shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip
    pipe = diffusers.QwenImagePipeline(
        transformer=net, scheduler=scheduler, vae=decoder, text_encoder=None, tokenizer=None
    )
    mask = torch.ones(2, 4, dtype=torch.long)
    call = {
        "prompt_embeds": rows(2, 4, 16), "prompt_embeds_mask": mask, "true_cfg_scale": 4.0,
        "negative_prompt_embeds": rows(1, 4, 16, seed=1), "negative_prompt_embeds_mask": mask[:1],
    }  # fmt: skip
    return pipe, {**call, "height": 32, "width": 32}


def ltx() -> Made:
    torch.manual_seed(6)
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4,
        attention_head_dim=8, cross_attention_dim=32, num_layers=1, caption_channels=32,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        max_image_seq_len=4096, shift_terminal=0.1,
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    ).eval()  # fmt: skip
    pipe = diffusers.LTXPipeline(
        transformer=net, scheduler=scheduler, vae=decoder, text_encoder=None, tokenizer=None
    )
    call = {
        "prompt_embeds": rows(2, 4, 32), "prompt_attention_mask": torch.ones(2, 4),
        "negative_prompt_embeds": rows(1, 4, 32, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 4), "guidance_scale": 3.0,
    }  # fmt: skip
    return pipe, {**call, "height": 32, "width": 32, "num_frames": 9}


def wan() -> Made:
    """Two experts: one network above a noise level, another below."""

    def expert(seed: int) -> Any:
        torch.manual_seed(seed)
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
            out_channels=4, text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1,
            cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ).eval()  # fmt: skip

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        num_train_timesteps=1000,
    )
    torch.manual_seed(9)
    decoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    pipe = diffusers.WanPipeline(
        transformer=expert(7), transformer_2=expert(8), scheduler=scheduler, vae=decoder,
        text_encoder=None, tokenizer=None, boundary_ratio=0.875,
    )  # fmt: skip
    call = {**_text(2, 16), "guidance_scale": 4.0, "guidance_scale_2": 3.0}
    return pipe, {**call, "height": 16, "width": 16, "num_frames": 5}


def dit() -> Made:
    torch.manual_seed(10)
    net = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(**LINEAR_BETAS, clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer=net, vae=vae(), scheduler=scheduler)
    return pipe, {"class_labels": [1, 207], "guidance_scale": 4.0}


def ddpm() -> Made:
    torch.manual_seed(11)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    scheduler = diffusers.DDPMScheduler(**LINEAR_BETAS, clip_sample=False)
    return diffusers.DDPMPipeline(unet=net, scheduler=scheduler), {}


_MADE = (sd15, sd_v, sd_img2img, sd_inpaint, sdxl, sdxl_refiner, sdxl_edm)
_MADE += (sd3, flux, qwen_image, ltx, wan, dit, ddpm)
BUILDERS: dict[str, Callable[[], Made]] = {f.__name__: f for f in _MADE}


def build(name: str) -> Made:
    """A pipeline and the arguments of a call."""
    pipe, call = BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def with_text(folder: Path) -> Any:
    """Stable Diffusion with a tokenizer of single characters and a text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(12)
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.model_max_length = 16
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    parts = _sd_parts(unet(), _euler())
    parts |= {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config).eval()}
    pipe = diffusers.StableDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
