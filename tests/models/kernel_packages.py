"""FlashAttention's packages as stand-ins: their true signatures, SDPA's answers, on a CPU.

Each breaks a graph, as CUDA kernels do.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from selfforcing_dfd.models.attention import attend
from selfforcing_dfd.models.attention_operator import loaded

MODULES = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}


def fa2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    torch._dynamo.graph_break()
    return attend(q, k, v)


def fa3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor:
    torch._dynamo.graph_break()
    if q.dtype != torch.float8_e4m3fn:
        return attend(q, k, v)
    assert q_descale is not None
    assert k_descale is not None
    assert v_descale is not None
    return emulated_fp8(scaled(q, q_descale), scaled(k, k_descale), scaled(v, v_descale))


def fa4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    mask_mod: Any = None,
) -> tuple[Tensor, Tensor | None]:
    torch._dynamo.graph_break()
    return attend(q, k, v), None


def scaled(x: Tensor, descale: Tensor) -> Tensor:
    """What 8-bit values [B, tokens, heads, head_dim] stand for; descale: [B, heads]."""
    assert descale.shape == (x.shape[0], x.shape[2])
    assert descale.dtype == torch.float32
    return x.float() * descale[:, None, :, None]


def emulated_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in bfloat16 as FlashAttention 3 computes it in e4m3, but not by its blocks.

    Products and sums are exact; the weights, the largest of a row being 256, are rounded to e4m3.
    """
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = 256 * (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = weights.to(torch.float8_e4m3fn).float()
    attended = torch.einsum("bhqk,bkhd->bhqd", rounded, v) / weights.sum(-1, keepdim=True)
    return attended.transpose(1, 2).bfloat16()


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """From now on, and until the test ends, these kernels can be imported."""
    functions = {"fa2": fa2, "fa3": fa3, "fa4": fa4}
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    for name in names:
        module = ModuleType(MODULES[name])
        vars(module)["flash_attn_func"] = functions[name]
        monkeypatch.setitem(sys.modules, MODULES[name], module)
    loaded.cache_clear()
