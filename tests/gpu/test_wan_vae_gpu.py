"""Wan's VAE on a CUDA device: as near to float32 as diffusers' own bfloat16, in both layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from rehearsal import COMPILER, DEVICE
from torch import Tensor, nn

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.wan_vae import WanCodec

pytestmark = pytest.mark.gpu
TOLERANCE_DB = 0.1
"""Other kernels sum in another order; that moves the PSNR by less."""


def codec_on(device: str, dtype: torch.dtype, channels_last: bool = False) -> WanCodec:
    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan(base_dim=16, num_res_blocks=1)
    return WanCodec(nn.Module.to(vae, dtype).to(device), channels_last)


def by_diffusers(codec: WanCodec, latents: Tensor) -> Tensor:
    z = (latents.transpose(1, 2) * codec.deviation + codec.mean).to(codec.dtype)
    with torch.no_grad():
        video: Tensor = codec.vae.decode(z).sample.float()
    return (video.permute(0, 2, 3, 4, 1) + 1) / 2


def psnr(video: Tensor, wanted: Tensor) -> float:
    return float(-10 * (video.cpu() - wanted).square().mean().log10())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_is_no_worse_than_diffusers(channels_last, compiled):
    """Catches a fused norm, a layout or a program that a GPU runs otherwise than a CPU."""
    latents = rng.normal((1, 6, 16, 8, 12), 0, "latents").float()
    wanted = codec_on("cpu", torch.float32).decode(latents)
    codec = codec_on(str(DEVICE), torch.bfloat16, channels_last)
    other = by_diffusers(codec, latents.to(DEVICE))
    if compiled:
        torch._dynamo.reset()
        codec.compile_decoding(**COMPILER)
    video = codec.decode(latents.to(DEVICE))
    assert psnr(video, wanted) >= psnr(other, wanted) - TOLERANCE_DB
