"""The picture that a video begins with, as Wan2.1's image-to-video models take it.

They see it in two ways. Each latent frame has further channels beside its noisy latents: four of a
mask, which is 1 where the picture is, and the latents of a clip that is the picture followed by
grey. And each block's cross-attention also attends to the states of an image encoder (CLIP).
Module names are those of diffusers' `WanTransformer3DModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.models.layers import WanAttention

MASK_CHANNELS = 4  # the mask's values at the video frames of one latent frame
NUM_TOKENS = 257  # of the image encoder of Wan2.1-I2V; nothing but estimates of cost relies on it

KeysValues = tuple[Tensor, Tensor]


class PictureError(UserError):
    """A picture that is missing or of another size; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The pictures of a batch.

    channels: [B, F, 4 + C, H, W], mask and latents of each latent frame, from the video's first on;
    see `picture_channels`. tokens: [B, T, D_image], the image encoder's states.
    """

    channels: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> Picture:
        return Picture(self.channels.to(device), self.tokens.to(device))

    def rows(self, start: int, stop: int) -> Picture:
        """The pictures of some rows."""
        return Picture(self.channels[start:stop], self.tokens[start:stop])

    def for_rows(self, rows: int) -> Picture:
        """The pictures again and again until there are `rows`, a multiple of their number.

        So guidance, which asks for each clip twice, keeps one copy.
        """
        times = rows // len(self.tokens)
        if times == 1:
            return self
        return Picture(self.channels.repeat(times, 1, 1, 1, 1), self.tokens.repeat(times, 1, 1))

    def channels_of(self, start: int, frames: int) -> Tensor:
        """[B, frames, 4 + C, H, W] of latent frames from `start` on; the last one goes on."""
        if start + frames <= self.channels.shape[1]:
            return self.channels[:, start : start + frames]
        wanted = torch.arange(start, start + frames, device=self.channels.device)
        return self.channels[:, wanted.clamp_max(self.channels.shape[1] - 1)]


@dataclass(frozen=True, slots=True)
class PictureConditioning(Conditioning):
    """A text for each row, and a picture for each row or for every n-th: see `Picture.for_rows`."""

    picture: Picture | None


def conditioning_of(text: Tensor, picture: Picture | None) -> Conditioning:
    """Text, and the picture where there is one."""
    return Conditioning(text) if picture is None else PictureConditioning(text, picture)


def picture_channels(latents: Tensor) -> Tensor:
    """Mask and latents [B, F, 4 + C, H, W], as diffusers' WanImageToVideoPipeline makes them.

    latents: [B, F, C, H, W] of a clip whose first video frame is the picture and whose others are
    grey. The mask is 1 at the first latent frame: its one video frame counts four times.
    """
    batch, frames, _, rows, columns = latents.shape
    mask = latents.new_zeros(batch, frames, MASK_CHANNELS, rows, columns)
    mask[:, 0] = 1
    return torch.cat([mask, latents], dim=2)


def picture_without_content(x_t: Tensor, sizes: Mapping[str, Any]) -> Picture:
    """A picture of the right shapes for x_t [B, F, C, H, W], to count what a call costs."""
    batch, frames, channels, rows, columns = x_t.shape
    shape = (batch, frames, further_channels(channels), rows, columns)
    return Picture(x_t.new_empty(shape), x_t.new_empty(batch, NUM_TOKENS, sizes["image_dim"]))


def further_channels(latent_channels: int) -> int:
    """How many input channels a picture adds to those of the noisy latents."""
    return MASK_CHANNELS + latent_channels


def takes_picture(sizes: Mapping[str, Any]) -> bool:
    """Whether a network of these sizes, WanTransformer's arguments, needs a picture."""
    return sizes["image_dim"] is not None


def picture_arguments(channels: int, image_dim: int | None, width: int) -> dict[str, Any]:
    """WanTransformer's arguments that follow from the width of an image encoder's states.

    channels: of the latents. image_dim: None for text-to-video. width: of the blocks.
    """
    if image_dim is None:
        return {"in_channels": channels, "image_dim": None, "added_kv_proj_dim": None}
    in_channels = channels + further_channels(channels)
    return {"in_channels": in_channels, "image_dim": image_dim, "added_kv_proj_dim": width}


def check_picture_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise PictureError unless input channels and the parts for a picture belong together."""
    out = sizes["out_channels"]
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    wrong = [
        f"{key} {sizes[key]} instead of {wanted}"
        for key, wanted in picture_arguments(out, sizes["image_dim"], width).items()
        if sizes[key] != wanted
    ]
    if wrong:
        raise PictureError(
            f"no Wan2.1 model has image_dim {sizes['image_dim']} and out_channels {out} with "
            f"{', '.join(wrong)}: another architecture, such as Wan2.2's or one for control; use "
            "Wan2.1's text-to-video or image-to-video"
        )


class PictureAttention(WanAttention):
    """Cross-attention with further keys and values, of the picture. The queries are the same."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__(dim, heads, eps)
        self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(2))
        self.norm_added_k = nn.RMSNorm(dim, eps)

    def picture_keys_values(self, tokens: Tensor) -> KeysValues:
        """Of the embedded picture [B, T, D], each [B, T, heads, d]."""
        k = self.norm_added_k(self.add_k_proj(tokens))
        v = self.add_v_proj(tokens)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))


def picture_in(conditioning: Conditioning) -> Picture:
    """The picture of a conditioning. Raises PictureError for one without."""
    picture = conditioning.picture if isinstance(conditioning, PictureConditioning) else None
    if picture is None:
        raise PictureError(
            "this network is an image-to-video one with 36 input channels and is asked without a "
            "picture; in a stream name it with --image FILE, and for training add pictures to the "
            "clips with `selfforcing-dfd images SHARDS --model WAN_I2V_FOLDER`"
        )
    return picture
