"""Three-axis rotary positions of Wan2.1, computed from positions: no table and no length limit."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

THETA = 10000.0


@runtime_checkable
class Placed(Protocol):
    """A context that brings the rotary tables of its call, in memory that stays in place."""

    @property
    def rotary(self) -> tuple[Tensor, Tensor]: ...


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's values encode (latent frame, row, column): 128 -> 44, 42, 42."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def axis_frequencies(dim: int, device: torch.device | None = None) -> Tensor:
    """[dim / 2] in float64: pair j of an axis turns by position * 10000^(-2j / dim).

    Source: arXiv 2104.09864.
    """
    return THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def rotary_angles(
    start_frame: int,
    frames: int,
    rows: int,
    columns: int,
    head_dim: int,
    device: torch.device | None = None,
) -> Tensor:
    """Angles [frames * rows * columns, head_dim / 2] in float64.

    Tokens are ordered by frame, then row, then column. The angles are made on the device from
    integers, so nothing is copied and nothing waits.
    """
    counts = ((start_frame, frames), (0, rows), (0, columns))
    axes = [
        torch.arange(start, start + n, dtype=torch.float64, device=device) for start, n in counts
    ]
    grids = torch.meshgrid(*axes, indexing="ij")
    parts = [
        position.flatten()[:, None] * axis_frequencies(dim, device)
        for position, dim in zip(grids, axis_dims(head_dim), strict=True)
    ]
    return torch.cat(parts, dim=1)


def rotary_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 2 n] of angles [..., n], one for each value, signed as `rotate` needs."""
    cos = angles.cos().repeat_interleave(2, dim=-1)
    sin = angles.sin()
    signed_sin = torch.stack([-sin, sin], dim=-1).flatten(-2)
    return cos.to(dtype), signed_sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2j], x[2j + 1]) of x [B, tokens, heads, d].

    cos, sin: `rotary_tables` [tokens, 1, d].
    """
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).type_as(x)


# the steps of one chunk share it, and so do the passes of one training update
@lru_cache(maxsize=2)
def positions_rotary(
    start_frame: int,
    frames: int,
    rows: int,
    columns: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`rotary_tables` [tokens, 1, head_dim] of `rotary_angles`; cached, do not modify."""
    with torch.inference_mode(False):
        angles = rotary_angles(start_frame, frames, rows, columns, head_dim, device)
        return rotary_tables(angles[:, None], dtype)
