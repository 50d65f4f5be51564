"""Models with random weights, for benchmarks: real speed, no picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from selfforcing_dfd.codecs.prompts import MAX_LENGTH
from selfforcing_dfd.common import find_device
from selfforcing_dfd.models.identity import SELF_FORCING, make_recipe
from selfforcing_dfd.models.network import PlainWan, WanNetwork
from selfforcing_dfd.models.sizes import PUBLISHED_SIZES
from selfforcing_dfd.streaming.load import TINY_STUDENT, default_dtype, latent_size, tiny_codec_file
from selfforcing_dfd.streaming.model import running_as
from selfforcing_dfd.streaming.parts import LoadError
from selfforcing_dfd.streaming.session import StreamModel
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE
from selfforcing_dfd.weights.read import describe

SIZES = ("tiny", "wan-tiny", "wan1.3b", "wan14b")
WAN_TINY: dict[str, Any] = {
    **PUBLISHED_SIZES["wan1.3b"],
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 2,
}
"""Wan's classes, so small that a CPU can rehearse what a GPU is to do."""
TINY_VAE: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1}
TINY_VIDEO_SIZE = (32, 48)


def random_stream_model(
    size: str,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    recipe: Mapping[str, Any] | None = None,
) -> StreamModel:
    """A model with random weights.

    size: tiny, as the shipped student; wan1.3b or wan14b, as published; wan-tiny, Wan's classes at
    a size for a CPU. dtype: bfloat16 on a GPU and float32 elsewhere unless given. Raises LoadError
    for an unknown size.
    """
    if size not in SIZES:
        raise LoadError(f"size is {size!r}; use one of {', '.join(SIZES)}")
    run_on = find_device(device)
    dtype = dtype or default_dtype(run_on)
    torch.manual_seed(seed)
    with torch.device(run_on):
        student = randomise(PlainWan(**network_sizes(size)))
        nn.Module.to(student.requires_grad_(False), dtype)
        codec, video_size = _codec(size, run_on, dtype)
    text_dim = student.config["text_dim"]
    return StreamModel(
        student=student,
        codec=codec,
        text=TinyText(text_dim) if size == "tiny" else TinyText(text_dim, MAX_LENGTH),
        latent_size=latent_size(video_size, codec.strides, student.patch),
        **running_as(make_recipe(asdict(SELF_FORCING) | dict(recipe or {}))),
    )


def network_sizes(size: str) -> dict[str, Any]:
    """WanTransformer's arguments for one of SIZES; the tiny ones come from the shipped student."""
    if size == "tiny":
        return dict(describe(TINY_STUDENT).sizes)
    if size == "wan-tiny":
        return dict(WAN_TINY)
    return dict(PUBLISHED_SIZES[size])


def _codec(size: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, tuple[int, int]]:
    """The codec that belongs to a size, and the height and width of its usual video."""
    if size == "tiny":
        return TinyCodec.load(tiny_codec_file(TINY_STUDENT)).to(device), (SIDE, SIDE)
    from diffusers import AutoencoderKLWan

    from selfforcing_dfd.codecs.wan_vae import VIDEO_SIZE, WanCodec

    is_tiny = size == "wan-tiny"
    vae: Any = AutoencoderKLWan(**(TINY_VAE if is_tiny else {}))
    nn.Module.to(vae, dtype)  # diffusers' own warns, of no module at all
    codec = WanCodec(vae, channels_last=device.type == "cuda")
    return codec, TINY_VIDEO_SIZE if is_tiny else VIDEO_SIZE


@torch.no_grad()
def randomise(network: WanNetwork) -> WanNetwork:
    """Random weights under which values stay finite however long a stream runs."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    network.proj_out.weight.mul_(0.1)
    return network
