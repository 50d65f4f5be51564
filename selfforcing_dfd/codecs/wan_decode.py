"""The decoder of Wan's VAE as a stream: diffusers' layers and weights, with the past of each
convolution kept in place.

diffusers joins past and present, pads the result and clones what comes next: three copies of every
activation, the largest of which are video-sized. Here a convolution's input has a room that is
allocated once, with a border of zeros, and is copied once: next to the two frames of the past, the
convolution's halo, which have memory of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, silu


class StreamingDecoder:
    """Decodes one video latent frame by latent frame. `decoder`: diffusers' WanDecoder3d of a VAE
    of Wan2.1, in eval mode.

    Bit-equal to diffusers' own decode with feature caches: each convolution gets the same numbers
    in the same layout.
    """

    def __init__(
        self, decoder: Any, memory_format: torch.memory_format = torch.contiguous_format
    ) -> None:
        self.decoder, self.memory_format = decoder, memory_format
        self.halos: dict[nn.Module, Tensor] = {}
        self.begun = False
        # by size of the activation; used by one convolution after the other
        self._rooms: dict[torch.Size, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the past: constant from the second latent frame on."""
        return sum(halo.nbytes for halo in self.halos.values())

    def clone(self) -> StreamingDecoder:
        """An independent decoder that goes on from here."""
        copy = StreamingDecoder(self.decoder, self.memory_format)
        copy.halos = {conv: halo.clone() for conv, halo in self.halos.items()}
        copy.begun = self.begun
        return copy

    def __call__(self, x: Tensor) -> Tensor:
        """[B, z, 1, h, w] -> [B, 3, 1 or 4, 8 h, 8 w]: one video frame of the first latent frame,
        four of each later one.
        """
        decoder = self.decoder
        x = self.convolve(decoder.conv_in, x)
        x = self.residual(decoder.mid_block.resnets[0], x)
        for attention, block in zip(
            decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True
        ):
            x = self.residual(block, attention(x))
        for stage in decoder.up_blocks:
            for block in stage.resnets:
                x = self.residual(block, x)
            for layer in stage.upsamplers or ():
                x = self.upsample(layer, x)
        self.begun = True
        return self.convolve(decoder.conv_out, x, decoder.norm_out)

    def residual(self, block: Any, x: Tensor) -> Tensor:
        """Two convolutions, each behind norm and SiLU, added to what came in."""
        within = self.convolve(block.conv2, self.convolve(block.conv1, x, block.norm1), block.norm2)
        return within + block.conv_shortcut(x)

    def upsample(self, layer: Any, x: Tensor) -> Tensor:
        """Twice the rows and columns; and twice the frames, but for a video's first."""
        if layer.mode == "upsample3d":
            x = self.double_frames(layer.time_conv, x)
        batch, _, frames = x.shape[:3]
        pictures = layer.resample(x.transpose(1, 2).flatten(0, 1))
        return pictures.unflatten(0, (batch, frames)).transpose(1, 2)

    def double_frames(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        """[B, C, T, h, w] -> [B, C, 2 T, h, w]. A video's first frame stays alone, and no later one
        sees it.
        """
        if not self.begun:
            return x
        # of each frame the former and the latter
        both = self.convolve(conv, x).unflatten(1, (2, -1))
        return both.movedim(1, 3).flatten(2, 3)

    def convolve(self, conv: nn.Conv3d, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """A causal convolution of x, after norm and SiLU if there is a norm; zeros come before a
        video.
        """
        past, rows, columns = (
            conv.kernel_size[0] - 1,
            conv.kernel_size[1] // 2,
            conv.kernel_size[2] // 2,
        )
        room = self.room(x, past, rows, columns)
        present = room[:, :, past:, rows : rows + x.shape[3], columns : columns + x.shape[4]]
        if conv not in self.halos:
            self.halos[conv] = torch.zeros_like(room[:, :, :past])
        room[:, :, :past] = self.halos[conv]
        present.copy_(
            x if norm is None else silu(norm(x), inplace=True)
        )  # written elsewhere, SiLU rounds otherwise on a CPU
        self.halos[conv].copy_(room[:, :, -past:])
        return conv3d(room, conv.weight, conv.bias)

    def room(self, x: Tensor, past: int, rows: int, columns: int) -> Tensor:
        """x's size with frames before it and zeros around it; what else lies there is what was
        there last.
        """
        batch, channels, frames, height, width = x.shape
        size = torch.Size((batch, channels, past + frames, height + 2 * rows, width + 2 * columns))
        if size not in self._rooms:
            room = torch.empty(
                size, dtype=x.dtype, device=x.device, memory_format=self.memory_format
            )
            self._rooms[size] = room.zero_()
        return self._rooms[size]
