"""The tiny world's codec as a part of a diffusers pipeline. In an export: `codec/tiny_codec.py`."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from selfforcing_dfd.tiny.codec import CHANNELS, SPACE, TIME, TinyCodec

LONE = 3 * SPACE * SPACE  # values of a block of one video frame


class TinyWorldCodec(ModelMixin, ConfigMixin):
    """Two bases and a scale, see `TinyCodec`."""

    @register_to_config
    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(LONE, channels))
        self.rest = nn.Parameter(torch.zeros(TIME * LONE, channels))
        self.scale = nn.Parameter(torch.ones(()))

    @classmethod
    def of(cls, codec: TinyCodec) -> TinyWorldCodec:
        made = cls(codec.first.shape[1])
        with torch.no_grad():
            made.first.copy_(codec.first)
            made.rest.copy_(codec.rest)
            made.scale.fill_(codec.scale)
        return made

    def decode(self, latents: Tensor) -> Tensor:
        """[B, F, C, h, w] -> video [B, T, H, W, 3] in [0, 1]."""
        codec = TinyCodec(self.first, self.rest, float(self.scale))
        return codec.decode(latents.float()).clamp(0, 1)
