"""Wan2.1's image-to-video network at tiny size, and pictures for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from tiny_models import SHAPE, TEXT_LENGTH, TINY, fill_weights, tiny_network
from tiny_wan import SIZES, save_wan_folder
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from selfforcing_dfd import rng
from selfforcing_dfd.models.picture import Picture, PictureConditioning, picture_channels
from selfforcing_dfd.models.wan import WanTransformer

WIDTH = TINY["num_attention_heads"] * TINY["attention_head_dim"]
IMAGE_DIM = 20
NUM_TOKENS = 3


def picture_sizes(channels: int = TINY["out_channels"]) -> dict[str, Any]:
    """What an image-to-video network has beside the sizes of a text-to-video one."""
    further = {"in_channels": 2 * channels + 4, "out_channels": channels}
    return {**further, "image_dim": IMAGE_DIM, "added_kv_proj_dim": WIDTH}


def picture_network(
    seed: int = 0, dtype: torch.dtype = torch.float64, channels: int = 4, **sizes: Any
) -> WanTransformer:
    return tiny_network(seed, dtype, **{**picture_sizes(channels), **sizes})


def picture(
    frames: int,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    shape: tuple[int, ...] = SHAPE,
) -> Picture:
    """Another picture for each row; its latents differ at every frame."""
    latents = rng.normal((batch, frames, *shape), seed, "picture latents").to(dtype)
    tokens = rng.normal((batch, NUM_TOKENS, IMAGE_DIM), seed, "picture tokens").to(dtype)
    return Picture(picture_channels(latents), tokens)


def asked(
    frames: int, batch: int = 2, dtype: torch.dtype = torch.float64, length: int = TEXT_LENGTH
) -> PictureConditioning:
    """Text and a picture."""
    text = rng.normal((batch, length, TINY["text_dim"]), 0, "text").to(dtype)
    return PictureConditioning(text, picture(frames, batch, dtype))


def save_image_encoder(folder: Path, image_dim: int = IMAGE_DIM) -> Path:
    """CLIP's real class at tiny size, in the folders of `Wan-AI/Wan2.1-I2V-14B-480P-Diffusers`."""
    config = CLIPVisionConfig(
        hidden_size=image_dim,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    encoder = CLIPVisionModel(config)
    fill_weights(encoder, 5)
    encoder.save_pretrained(folder / "image_encoder")
    size = {"height": config.image_size, "width": config.image_size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": config.image_size}, crop_size=size)
    processor.save_pretrained(folder / "image_processor")
    return folder


def save_picture_folder(folder: Path) -> Path:
    """A Wan2.1-I2V folder: the parts of text-to-video, an image encoder, another transformer."""
    save_wan_folder(folder)
    save_image_encoder(folder)
    width = SIZES["num_attention_heads"] * SIZES["attention_head_dim"]
    further = {**picture_sizes(16), "added_kv_proj_dim": width}
    teacher = WanTransformer3DModel(**{**SIZES, **further})
    fill_weights(teacher, 7)
    teacher.save_pretrained(folder / "transformer")
    return folder
