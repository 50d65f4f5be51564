"""FlashAttention's packages as stand-ins: their true signatures, SDPA's answers, on a CPU.

Those of flash-attn 2.8, of FlashAttention 3's `hopper` folder, and of flash-attn-4 4.0.0b36.

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
from selfforcing_dfd.models.fp8_emulated import emulated_attention

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
    scales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    for x, scale in zip((q, k, v), scales.values(), strict=True):
        assert scale is not None
        assert scale.shape == (x.shape[0], x.shape[2])
        assert scale.dtype == torch.float32
    return emulated_attention(q, k, v, **scales)


def fa4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    torch._dynamo.graph_break()
    return attend(q, k, v), None


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """From now on, and until the test ends, these kernels can be imported."""
    functions = {"fa2": fa2, "fa3": fa3, "fa4": fa4}
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    for name in names:
        module = ModuleType(MODULES[name])
        vars(module)["flash_attn_func"] = functions[name]
        monkeypatch.setitem(sys.modules, MODULES[name], module)
    loaded.cache_clear()
