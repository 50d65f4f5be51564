"""Three-axis rotary positions of Wan2.1 as a function of position: no table, no buffer, no length limit."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's values encode (latent frame, row, column): 128 -> 44, 42, 42."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rotary_angles(start_frame: int, frames: int, rows: int, columns: int, head_dim: int) -> Tensor:
    """Angles [frames * rows * columns, head_dim / 2] in float64; tokens frame-major, then row, then column.

    Pair j of an axis of d values turns by position * 10000^(-2j / d) (Su et al., arXiv 2104.09864).
    """
    grids = torch.meshgrid(
        torch.arange(start_frame, start_frame + frames, dtype=torch.float64),
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    parts = []
    for position, dim in zip(grids, axis_dims(head_dim), strict=True):
        frequency = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        parts.append(position.flatten()[:, None] * frequency)
    return torch.cat(parts, dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved pairs (x[2j], x[2j + 1]) of x [B, tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
