"""The one attention function. Every model goes through it; torch SDPA picks the kernel."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention without a mask. q: [B, Lq, heads, head_dim]; k, v: [B, Lk, heads, head_dim] -> like q."""
    out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)
