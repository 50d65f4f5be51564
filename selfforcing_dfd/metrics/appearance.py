"""What one frame looks like. Frames are RGB, [H, W, 3], float32 in 0 to 255."""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # BT.601, as the readers of VBench and of the DFD page use it
BRIGHT = 250.0
DARK = 5.0


def luma(pictures: Tensor) -> Tensor:
    """[..., 3] -> [...], in the same range."""
    return pictures @ torch.tensor(LUMA, dtype=pictures.dtype, device=pictures.device)


def appearance(frame: Tensor) -> dict[str, float]:
    """Numbers of one frame.

    saturation: of HSV, 0 where a pixel is black. chroma: max - min over colours, as a share of 255;
    stable in the dark. colorful: see `colourfulness`. contrast: standard deviation of luma, as a
    share of 255. luma: its mean. clipped: share of pixels that are blown out or black. gradient:
    mean absolute difference of neighbours in luma. laplacian: variance of the four-neighbour
    Laplacian of luma; blur lowers it, sharpening raises it.
    """
    grey = luma(frame)
    most = frame.amax(-1)
    range_of_colours = most - frame.amin(-1)
    saturation = torch.where(most > 0, range_of_colours / most.clamp_min(1), 0)
    steps = [grey.diff(dim=0).abs().flatten(), grey.diff(dim=1).abs().flatten()]
    values = {
        "saturation": saturation.mean(),
        "chroma": range_of_colours.mean() / 255,
        "colorful": colourfulness(frame),
        "contrast": grey.std(correction=0) / 255,
        "luma": grey.mean() / 255,
        "clipped": ((most >= BRIGHT) | (most <= DARK)).float().mean(),
        "gradient": torch.cat(steps).mean(),
        "laplacian": laplacian(grey).var(correction=0),
    }
    return {name: float(value) for name, value in values.items()}


def colourfulness(frame: Tensor) -> Tensor:
    """Hasler and Suesstrunk (2003) on signed opponent colours: 15 slight, 45 average, 82 high.

    A much copied version takes absolute values first and gives other numbers.
    """
    red, green, blue = frame.unbind(-1)
    red_green = red - green
    yellow_blue = (red + green) / 2 - blue
    spread = torch.hypot(red_green.std(correction=0), yellow_blue.std(correction=0))
    return spread + 0.3 * torch.hypot(red_green.mean(), yellow_blue.mean())


def laplacian(grey: Tensor) -> Tensor:
    """Sum of the four neighbours less four times the pixel, inside of the border."""
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return around - 4 * grey[1:-1, 1:-1]


def thumbnail(frame: Tensor, rows: int = 9, columns: int = 16) -> Tensor:
    """[rows, columns, 3]: means of areas."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(frame.permute(2, 0, 1), (rows, columns))
    return pooled.permute(1, 2, 0)
