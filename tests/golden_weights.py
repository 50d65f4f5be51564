"""Tensors and weights computed with the public reference code.

Their origin is in golden/README.md and golden/manifest.json.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from selfforcing_dfd.models.wan import WanTransformer

FOLDER = Path(__file__).parent / "golden"

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}

RENAMES = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm3", "norm2"),  # the affine norm before cross-attention
    ("self_attn", "attn1"),
    ("cross_attn", "attn2"),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
)
"""Original Wan name part -> diffusers name part, in this order."""


def diffusers_name(wan_name: str) -> str:
    """The diffusers name of a parameter of the original Wan checkpoints."""
    for old, new in RENAMES:
        wan_name = wan_name.replace(old, new)
    return wan_name


@cache
def golden(name: str) -> dict[str, Tensor]:
    """All tensors of one golden file."""
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def manifest() -> dict[str, Any]:
    return json.loads((FOLDER / "manifest.json").read_text())


def golden_state(name: str) -> dict[str, Tensor]:
    """Weights under diffusers names; stored as float16, exact in float32."""
    return {diffusers_name(key): value.float() for key, value in golden(name).items()}


def golden_network(name: str = "weights", dtype: torch.dtype = torch.float32) -> WanTransformer:
    """The reference's `weights` (student), `weights_teacher` or `weights_fake`, all keys used."""
    network = WanTransformer(**SIZES)
    network.load_state_dict(golden_state(name), strict=True)
    return network.to(dtype)


FORWARD = {"atol": 2e-5, "rtol": 0}
"""Network outputs up to 3.4: float32 leaves 2e-6, the reference's own distance to float64 too;
planted bugs move 5e-5.
"""
ROLLOUT = {"atol": 1e-4, "rtol": 1e-4}
"""Rollouts: up to 10 network calls one after the other; the smallest effect to be seen, context
noise, moves 1.6e-3.
"""
MATCHING = {"atol": 2e-4, "rtol": 1e-4}
"""d / n: at sigma .02 the normaliser of .04 amplifies float32 rounding about 25 times."""
