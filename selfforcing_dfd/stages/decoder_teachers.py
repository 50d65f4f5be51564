"""What a small decoder learns from: a codec's own decoder, and what its encoder sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from selfforcing_dfd.tiny.codec import TinyCodec

if TYPE_CHECKING:
    from selfforcing_dfd.codecs.wan_vae import WanCodec

NUM_LEVELS = 2
"""Levels of Wan's encoder that are compared. Later ones have fewer frames than video."""


class DecoderTeacher(Protocol):
    """fingerprint: of the codec, as it stands in shards."""

    @property
    def fingerprint(self) -> str: ...

    def decode(self, latents: Tensor) -> Tensor:
        """[B, F, C, h, w] -> [B, T, 8 h, 8 w, 3] in [0, 1], without gradient."""
        ...

    def features(self, videos: Tensor) -> list[Tensor]:
        """What the encoder sees in videos [B, T, H, W, 3]; with gradient to the videos."""
        ...


class TinyTeacher:
    """The tiny world's linear codec; its encoder sees latents at once."""

    def __init__(self, codec: TinyCodec) -> None:
        self.codec = codec
        self.fingerprint = codec.fingerprint

    def decode(self, latents: Tensor) -> Tensor:
        self.codec = self.codec.to(latents.device)
        return self.codec.decode(latents.float()).clamp(0, 1)

    def features(self, videos: Tensor) -> list[Tensor]:
        self.codec = self.codec.to(videos.device)
        return [self.codec.encode(videos)]


class WanTeacher:
    """Wan's VAE. Its encoder is looked into before its first and its second halving of rows.

    There every video frame still has features of its own.
    """

    def __init__(self, codec: WanCodec, fingerprint: str = "") -> None:
        """fingerprint: of the codec in float32; empty where nobody asks for it."""
        self.codec = codec
        self.fingerprint = fingerprint

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)

    def features(self, videos: Tensor) -> list[Tensor]:
        encoder: Any = self.codec.vae.encoder
        pixels = (2 * videos - 1).permute(0, 4, 1, 2, 3).to(self.codec.dtype)
        x = encoder.conv_in(pixels.contiguous(memory_format=self.codec.memory_format))
        seen: list[Tensor] = []
        for layer in encoder.down_blocks:
            if type(layer).__name__ == "WanResample":
                seen.append(x.float())
            if len(seen) == NUM_LEVELS:
                break
            x = layer(x)
        return seen


def load_wan_teacher(folder: Path, device: torch.device, dtype: torch.dtype) -> WanTeacher:
    """The VAE of a diffusers folder. CodecError where there is none.

    Its fingerprint is that in float32, as shards have it.
    """
    from torch import nn

    from selfforcing_dfd.codecs.wan_vae import WanCodec

    exact = WanCodec.from_pretrained(folder)
    fingerprint = exact.fingerprint
    nn.Module.to(exact.vae, device, dtype)
    return WanTeacher(WanCodec(exact.vae, channels_last=device.type == "cuda"), fingerprint)


def meta_wan_teacher() -> WanTeacher:
    """Wan2.1's VAE without memory, to count what it costs."""
    from diffusers import AutoencoderKLWan

    from selfforcing_dfd.codecs.wan_vae import WanCodec

    with torch.device("meta"):
        return WanTeacher(WanCodec(AutoencoderKLWan()))
