"""What 8-bit floats do to a picture, computed on any device: for measurements, not for speed.

Values are rounded as `fp8` (torchao) and `attention_fp8` (FlashAttention 3) round them; products
and sums of the rounded values are float32. What the tensor cores' fast accumulation loses on top
is not in it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selfforcing_dfd.models.attention import attend
from selfforcing_dfd.models.attention_fp8 import in_eight_bits
from selfforcing_dfd.models.attention_operator import KernelAttention
from selfforcing_dfd.models.fp8 import E4M3, SMALLEST, places_in
from selfforcing_dfd.models.network import WanNetwork

LARGEST = torch.finfo(E4M3).max
LARGEST_WEIGHT = 256.0  # to which FlashAttention 3 scales a row's largest softmax weight


def emulate_fp8(network: WanNetwork, linears: bool, attention: bool, text_tokens: int) -> None:
    """Round what the blocks' linear layers or self-attention multiply to e4m3, from now on.

    text_tokens: attention to so many keys or fewer stays as it is, as that to a prompt does in
    `attention_fp8`.
    """
    for block in network.wan_blocks():
        if attention:
            rounding = in_eight_bits(emulated_attention, few_keys=text_tokens)
            block.attend = KernelAttention("emulated", rounding)
        for module, name in places_in(block) if linears else ():
            layer = module.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            setattr(module, name, EmulatedLinear(layer))


class EmulatedLinear(nn.Module):
    """A linear layer over e4m3 values: a scale for each row of the weights and for each token."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = rounded_rows(layer.weight.detach())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows, scale = rounded_rows(x)
        sums = (rows @ self.weight.t()) * scale * self.scale.squeeze(-1)
        out = sums if self.bias is None else sums + self.bias.float()
        return out.type_as(x)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] as e4m3 values, in float32, and the scales [..., 1] that undo the scaling.

    A scale is rounded to x's dtype, as torchao's is; the row's largest value is cut off where that
    makes it larger than e4m3's largest.
    """
    scale = (x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / LARGEST).float()
    values = (x.float() / scale).clamp(-LARGEST, LARGEST)
    return values.to(E4M3).float(), scale


def emulated_attention(q: Tensor, k: Tensor, v: Tensor, **scales: Tensor) -> Tensor:
    """Attention as FlashAttention 3 computes it in e4m3, but not by its blocks; in bfloat16.

    q, k, v: [B, tokens, heads, head_dim]. scales: q_descale, k_descale, v_descale [B, heads].
    Without scales: plain attention. Softmax weights are rounded to e4m3 as well.
    """
    if not scales:
        return attend(q, k, v)
    q, k, v = (
        x.float() * scales[f"{name}_descale"][:, None, :, None]
        for name, x in (("q", q), ("k", k), ("v", v))
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = LARGEST_WEIGHT * (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = weights.to(E4M3).float()
    attended = torch.einsum("bhqk,bkhd->bhqd", rounded, v) / weights.sum(-1, keepdim=True)
    return attended.transpose(1, 2).bfloat16()
