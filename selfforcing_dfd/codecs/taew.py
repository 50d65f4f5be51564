"""A decoder of the layout of TAEHV's `taew2_1` file, for latents of Wan2.1.

The layout is that of the public repository madebyollin/taehv: names, shapes, and what is done with
them. This is our own program for it. The file's encoder is not used.

`decoder.N`: 1 the first convolution; 3 to 5, 9 to 11 and 15 to 17 blocks that see the frame and
the one before (`conv.0`, `conv.2`, `conv.4`); 7, 13 and 19 frames for one (a convolution of size 1,
whose outputs are frame after frame); 8, 14 and 20 convolutions to the next width, without bias; 22
the last one. What has no weights has numbers too. Latents are normalised, as the transformer makes
them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from selfforcing_dfd.codecs.small_decoder import RGB, TIME, Past

WIDTHS = (256, 128, 64, 64)
FRAMES = (1, 2, 2)
"""Frames that each stage makes of one."""
BLOCKS = 3  # of a stage
LIMIT = 3.0  # of a latent
STAGE = 6  # numbers that a stage takes: blocks, what doubles rows, frames for one, next width
FIRST = 3  # number of the first stage
LAST = FIRST + STAGE * len(FRAMES) + 1


class Remembering(nn.Module):
    """Three convolutions of a frame and the one before it, with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(n * width, width, 3, padding=1) for n in (2, 1, 1)]
        # the layout counts the activations between them
        self.conv = nn.ModuleDict(dict(zip(("0", "2", "4"), convolutions, strict=True)))

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """x: [B, T, C, h, w]; before: the input of the frame before. Returns output, last input."""
        first = torch.zeros_like(x[:, 0]) if before is None else before
        earlier = torch.cat([first[:, None], x[:, :-1]], dim=1)
        within = torch.cat([x, earlier], dim=2).flatten(0, 1)
        within = relu(self.conv["0"](within))
        within = relu(self.conv["2"](within))
        within = self.conv["4"](within).unflatten(0, x.shape[:2])
        return relu(within + x), x[:, -1]


class Spreading(nn.Module):
    """Frames for one."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(width, frames * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N frames, C, h, w]."""
        return self.conv(x).unflatten(1, (self.frames, -1)).flatten(0, 1)


class TaewDecoder(nn.Module):
    """Latents to video, with the past as an argument; `state_dict` has the layout's names."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.channels = channels
        layers: dict[str, nn.Module] = {"1": nn.Conv2d(channels, WIDTHS[0], 3, padding=1)}
        for stage, frames in enumerate(FRAMES):
            start = FIRST + STAGE * stage
            width, next_width = WIDTHS[stage : stage + 2]
            for block in range(BLOCKS):
                layers[str(start + block)] = Remembering(width)
            layers[str(start + BLOCKS + 1)] = Spreading(width, frames)
            layers[str(start + BLOCKS + 2)] = nn.Conv2d(width, next_width, 3, padding=1, bias=False)
        layers[str(LAST)] = nn.Conv2d(WIDTHS[-1], RGB, 3, padding=1)
        self.decoder = nn.ModuleDict(layers)

    def forward(self, latents: Tensor, past: Past = ()) -> tuple[Tensor, list[Tensor]]:
        """As `SmallDecoder.forward`. A video's first latent frame gives four, of which one counts.

        The other three do go into the past, as where this layout comes from.
        """
        batch = len(latents)
        begins = not len(past)
        before = iter([None] * (BLOCKS * len(FRAMES)) if begins else past)
        given = latents.to(next(self.parameters()).dtype).flatten(0, 1)
        x = relu(self.decoder["1"](LIMIT * torch.tanh(given / LIMIT)))
        kept = []
        for stage in range(len(FRAMES)):
            start = FIRST + STAGE * stage
            x = x.unflatten(0, (batch, -1))
            for block in range(BLOCKS):
                x, last = self.decoder[str(start + block)](x, next(before))
                kept.append(last)
            # the layout doubles rows first; a convolution of size 1 can as well come before
            x = self.decoder[str(start + BLOCKS + 1)](x.flatten(0, 1))
            x = interpolate(x, scale_factor=2.0, mode="nearest")
            x = self.decoder[str(start + BLOCKS + 2)](x)
        video = self.decoder[str(LAST)](relu(x)).unflatten(0, (batch, -1))
        return video[:, TIME - 1 if begins else 0 :].permute(0, 1, 3, 4, 2), kept
