"""A small decoder of video latents: causal, and equal frame by frame.

Strides are Wan's: 8 rows, 8 columns and 4 video frames a latent, and a video's first latent frame
is one video frame. Time and space double twice between three levels of resolution. A level is a row
of blocks, and each frame leaves in each block a message for the next frame. These messages are all
that a stream has to remember, one a block. Half of the video's resolution is enough inside: the
last layer makes four pixels at each place.

Colours have a way of their own, which is linear: the mean colour of eight by eight pixels is
nearly a linear function of the latent there. Small decoders are known to shift saturation and
contrast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, silu

from selfforcing_dfd.common import UserError

TIME = 4  # video frames of a latent frame
SPACE = 8  # pixels of a latent, in height and in width
LEVELS = 3
GROWTH = 2  # frames, rows and columns for one, from level to level
RGB = 3
GREY = 0.5
Past = Sequence[Tensor]
"""What the next frame needs of those before it; empty before a video."""


@dataclass(frozen=True, slots=True)
class DecoderSize:
    """Channels of the latents; of each level its width, and its number of blocks.

    The defaults have 9.6 million parameters. Raises UserError for other than three levels.
    """

    channels: int = 16
    widths: tuple[int, ...] = (320, 192, 64)
    depths: tuple[int, ...] = (2, 3, 4)

    def __post_init__(self) -> None:
        for name, values in (("widths", self.widths), ("depths", self.depths)):
            if len(values) != LEVELS or min(values) < 1:
                raise UserError(
                    f"{name} of a small decoder are {list(values)}; want {LEVELS} numbers above 0"
                )

    def as_dict(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> DecoderSize:
        """From what `as_dict` gave. Raises KeyError for a setting that is missing."""
        return cls(settings["channels"], tuple(settings["widths"]), tuple(settings["depths"]))


class Block(nn.Module):
    """A causal convolution over two frames and another one over one frame, with a shortcut.

    The first convolution gives for each frame what it says of itself and a message to the next one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.say = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.add = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, message: Tensor | None) -> tuple[Tensor, Tensor]:
        """x: [B, T, C, h, w]. message: [B, C, h, w] of the frame before; None before a video.

        Returns x after the block, and the last frame's message.
        """
        said = self.say(silu(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        later = said[:, :, x.shape[2] :]
        now = said[:, :, : x.shape[2]]
        now[:, 1:].add_(later[:, :-1])
        if message is not None:
            now[:, 0].add_(message)
        added = self.add(silu(now).flatten(0, 1)).unflatten(0, x.shape[:2])
        return x + added, later[:, -1]


class Grow(nn.Module):
    """To the next level: frames, rows and columns double."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, GROWTH**3 * wider, 1)

    def forward(self, x: Tensor, begins: bool) -> Tensor:
        """[B, T, C, h, w] -> [B, 2 T, C', 2 h, 2 w]; a video's first frame stays one frame."""
        spread = pixel_shuffle(self.spread(silu(x).flatten(0, 1)), GROWTH)
        grown = spread.unflatten(1, (GROWTH, -1)).unflatten(0, x.shape[:2]).flatten(1, 2)
        return grown[:, GROWTH - 1 :] if begins else grown


class SmallDecoder(nn.Module):
    """Latents to video, with the past as an argument."""

    def __init__(self, size: DecoderSize) -> None:
        super().__init__()
        self.size = size
        self.colours = nn.Conv2d(size.channels, TIME * RGB, 1)
        self.enter = nn.Conv2d(size.channels, size.widths[0], 3, padding=1)
        widths = [
            width
            for width, depth in zip(size.widths, size.depths, strict=True)
            for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(map(Block, widths))
        self.grows = nn.ModuleList(map(Grow, size.widths[:-1], size.widths[1:]))
        self.leave = nn.Conv2d(size.widths[-1], RGB * GROWTH**2, 3, padding=1)

    @property
    def channels(self) -> int:
        return self.size.channels

    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights that depend on the generator alone; a grey video with rough colours."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.zero_()
                else:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(drawn * parameter[0].numel() ** -0.5)
                # blocks begin as identities, and the last layer without details
                if ".add." in name or name.startswith("leave."):
                    parameter.zero_()
            self.colours.weight.mul_(0.1)
            if self.colours.bias is not None:
                self.colours.bias.fill_(GREY)

    def forward(self, latents: Tensor, past: Past = ()) -> tuple[Tensor, list[Tensor]]:
        """The next latent frames [B, f, C, h, w], f one or more, after this past.

        Returns the video [B, T, 8 h, 8 w, 3], about in [0, 1], not clamped, and the new past.
        """
        begins = not len(past)
        messages = iter([None] * len(self.blocks) if begins else past)
        given = latents.to(self.enter.weight.dtype)
        kept = []
        x = self.enter(given.flatten(0, 1)).unflatten(0, given.shape[:2])
        blocks = iter(self.blocks)
        for level, depth in enumerate(self.size.depths):
            if level:
                x = self.grows[level - 1](x, begins)
            for _ in range(depth):
                x, message = next(blocks)(x, next(messages))
                kept.append(message)
        details = pixel_shuffle(self.leave(silu(x).flatten(0, 1)), GROWTH)
        video = details.unflatten(0, x.shape[:2]) + self.rough(given, begins)
        return video.permute(0, 1, 3, 4, 2), kept

    def rough(self, latents: Tensor, begins: bool) -> Tensor:
        """Smooth colours, [B, T, 3, 8 h, 8 w]."""
        colours = self.colours(latents.flatten(0, 1)).unflatten(1, (TIME, RGB))
        colours = colours.unflatten(0, latents.shape[:2]).flatten(1, 2)
        wanted = colours[:, TIME - 1 :] if begins else colours
        large = interpolate(wanted.flatten(0, 1), scale_factor=float(SPACE), mode="bilinear")
        return large.unflatten(0, wanted.shape[:2])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
