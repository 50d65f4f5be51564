"""The decoder of Wan's VAE as a stream, with diffusers' layers and weights.

Each convolution writes its input into a padded buffer that is allocated once, and its cache is the
last two frames of that buffer. diffusers joins cache and input, pads the result and clones the next
cache: three copies of every activation, the largest of which have the size of the video.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, silu


class StreamingDecoder:
    """Decodes one video, latent frame by latent frame.

    decoder: diffusers' WanDecoder3d of a VAE of Wan2.1, in eval mode. Bit-equal to diffusers' own
    decode with feature caches: each convolution gets the same numbers in the same layout.
    """

    def __init__(
        self, decoder: Any, memory_format: torch.memory_format = torch.contiguous_format
    ) -> None:
        self.decoder = decoder
        self.memory_format = memory_format
        self.caches: dict[nn.Module, Tensor] = {}
        self.started = False
        # by size; convolutions with inputs of one size share a buffer
        self._buffers: dict[torch.Size, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the caches: constant from the second latent frame on."""
        return sum(cache.nbytes for cache in self.caches.values())

    def clone(self) -> StreamingDecoder:
        """An independent decoder that continues from here."""
        copy = StreamingDecoder(self.decoder, self.memory_format)
        copy.caches = {conv: cache.clone() for conv, cache in self.caches.items()}
        copy.started = self.started
        return copy

    def __call__(self, x: Tensor) -> Tensor:
        """[B, z, 1, h, w] -> [B, 3, T, 8 h, 8 w]; T is 1 for the first latent frame, then 4."""
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
        self.started = True
        return self.convolve(decoder.conv_out, x, decoder.norm_out)

    def residual(self, block: Any, x: Tensor) -> Tensor:
        """Two convolutions, each after norm and SiLU, and the shortcut."""
        within = self.convolve(block.conv2, self.convolve(block.conv1, x, block.norm1), block.norm2)
        return within + block.conv_shortcut(x)

    def upsample(self, layer: Any, x: Tensor) -> Tensor:
        """Doubles rows and columns, and the frames too except a video's first one."""
        if layer.mode == "upsample3d":
            x = self.double_frames(layer.time_conv, x)
        batch, _, frames = x.shape[:3]
        pictures = layer.resample(x.transpose(1, 2).flatten(0, 1))
        return pictures.unflatten(0, (batch, frames)).transpose(1, 2)

    def double_frames(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        """[B, C, T, h, w] -> [B, C, 2 T, h, w].

        A video's first frame is not doubled, and does not enter the cache.
        """
        if not self.started:
            return x
        both = self.convolve(conv, x).unflatten(1, (2, -1))
        return both.movedim(1, 3).flatten(2, 3)

    def convolve(self, conv: nn.Conv3d, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """A causal convolution of x, after norm and SiLU if there is a norm.

        Zeros come before a video.
        """
        past = conv.kernel_size[0] - 1
        rows = conv.kernel_size[1] // 2
        columns = conv.kernel_size[2] // 2
        buffer = self.buffer(x, past, rows, columns)
        present = buffer[:, :, past:, rows : rows + x.shape[3], columns : columns + x.shape[4]]
        if conv not in self.caches:
            self.caches[conv] = torch.zeros_like(buffer[:, :, :past])
        buffer[:, :, :past] = self.caches[conv]
        # SiLU in place: written into the buffer directly, it rounds differently on a CPU
        present.copy_(x if norm is None else silu(norm(x), inplace=True))
        self.caches[conv].copy_(buffer[:, :, -past:])
        return conv3d(buffer, conv.weight, conv.bias)

    def buffer(self, x: Tensor, past: int, rows: int, columns: int) -> Tensor:
        """Memory for x, `past` frames before it and a border of zeros; the rest is undefined."""
        batch, channels, frames, height, width = x.shape
        size = torch.Size((batch, channels, past + frames, height + 2 * rows, width + 2 * columns))
        if size not in self._buffers:
            buffer = torch.empty(
                size, dtype=x.dtype, device=x.device, memory_format=self.memory_format
            )
            self._buffers[size] = buffer.zero_()
        return self._buffers[size]
