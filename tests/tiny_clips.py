"""Shared by tests of the tiny world: clips with their reading, and drawing of shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selfforcing_dfd.tiny.readout import Reading
from selfforcing_dfd.tiny.world import Factors, colour, coverage, paint


class Clips(NamedTuple):
    factors: Factors
    videos: Tensor
    reading: Reading


def draw(factors: Factors, centres: Tensor, saturation: Tensor) -> Tensor:
    """Clips with the shape at `centres` [B, T, 2] and a saturation [B, T] for every video frame."""
    alpha = coverage(factors.shape, factors.size, centres)
    colours = [colour(factors.hue, frame) for frame in saturation.unbind(dim=1)]
    return torch.cat([paint(alpha[:, [frame]], rgb) for frame, rgb in enumerate(colours)], dim=1)
