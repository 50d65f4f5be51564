"""Three-axis rotary positions of Wan2.1 as a function of position: no table, no buffer, no length limit."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's values encode (latent frame, row, column): 128 -> 44, 42, 42."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def axis_frequencies(dim: int, device: torch.device | None = None) -> Tensor:
    """[dim / 2] in float64: pair j of an axis of d values turns by position * 10000^(-2j / d) (arXiv 2104.09864)."""
    return THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def rotary_angles(
    start_frame: int, frames: int, rows: int, columns: int, head_dim: int, device: torch.device | None = None
) -> Tensor:
    """Angles [frames * rows * columns, head_dim / 2] in float64; tokens frame-major, then row, then column.

    Made on the device from integers, so that nothing is copied and no one waits.
    """
    counts = ((start_frame, frames), (0, rows), (0, columns))
    axes = [torch.arange(start, start + n, dtype=torch.float64, device=device) for start, n in counts]
    grids = torch.meshgrid(*axes, indexing="ij")
    parts = [
        position.flatten()[:, None] * axis_frequencies(dim, device)
        for position, dim in zip(grids, axis_dims(head_dim), strict=True)
    ]
    return torch.cat(parts, dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved pairs (x[2j], x[2j + 1]) of x [B, tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
