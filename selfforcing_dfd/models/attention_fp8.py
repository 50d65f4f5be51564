"""Attention over queries, keys and values in 8-bit floats (e4m3): FlashAttention 3 on Hopper.

Each head of each of the three is scaled so that its largest value is e4m3's largest.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from selfforcing_dfd.context import Attention

E4M3 = torch.float8_e4m3fn
FEW_KEYS = 1024
"""Up to so many keys, as those of a prompt, rounding costs about as much time as it saves."""


class ScaledAttention(Protocol):
    """A kernel that takes e4m3 and the factors [B, heads] by which q, k and v are multiplied."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **scales: Tensor) -> Tensor: ...


def in_eight_bits(kernel: ScaledAttention, few_keys: int | None = None) -> Attention:
    """The kernel over e4m3; over few keys, None for FEW_KEYS, it runs in the tensors' own dtype."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[1] <= (FEW_KEYS if few_keys is None else few_keys):
            return kernel(q, k, v)
        rounded = {"q": round_to_e4m3(q), "k": round_to_e4m3(k), "v": round_to_e4m3(v)}
        inputs = {name: values for name, (values, _) in rounded.items()}
        scales = {f"{name}_descale": scale for name, (_, scale) in rounded.items()}
        return kernel(**inputs, **scales).type_as(q)

    return run


def round_to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, tokens, heads, head_dim] in e4m3, and the factors [B, heads] that undo the scaling."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=(1, 3))
    smallest_normal = torch.finfo(x.dtype).tiny
    to_limit = torch.finfo(E4M3).max / largest.clamp(min=smallest_normal).float()
    # rounded to x's dtype, so that no product takes four bytes a value
    factor = to_limit.clamp(max=torch.finfo(x.dtype).max).to(x.dtype)
    return (x * factor[:, None, :, None]).to(E4M3), 1 / factor.float()
