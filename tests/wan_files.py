"""Tiny weights in the formats of others, and the names and shapes of the released ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import TINY, tiny_network
from torch import Tensor

from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.weights.names import to_wan

HEAD_DIM = 16
WAN_CONFIG = {
    "_class_name": "WanModel",
    "dim": 32,
    "num_heads": 2,
    "num_layers": 2,
    "ffn_dim": 48,
    "eps": 1e-6,
}
WAN_CONFIG |= {"freq_dim": 32, "in_dim": 4, "out_dim": 4, "model_type": "t2v", "text_len": 512}

OUTER = """
    patch_embedding.weight patch_embedding.bias
    text_embedding.0.weight text_embedding.0.bias text_embedding.2.weight text_embedding.2.bias
    time_embedding.0.weight time_embedding.0.bias time_embedding.2.weight time_embedding.2.bias
    time_projection.1.weight time_projection.1.bias head.head.weight head.head.bias head.modulation
"""
BLOCK = """
    modulation norm3.weight norm3.bias ffn.0.weight ffn.0.bias ffn.2.weight ffn.2.bias
    self_attn.q.weight self_attn.q.bias self_attn.k.weight self_attn.k.bias
    self_attn.v.weight self_attn.v.bias
    self_attn.o.weight self_attn.o.bias self_attn.norm_q.weight self_attn.norm_k.weight
    cross_attn.q.weight cross_attn.q.bias cross_attn.k.weight cross_attn.k.bias
    cross_attn.v.weight cross_attn.v.bias
    cross_attn.o.weight cross_attn.o.bias cross_attn.norm_q.weight cross_attn.norm_k.weight
"""


def wan_shapes(width: int, ffn: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original checkpoints, written from their description.

    They are not taken from the code.
    """

    def shape(name: str) -> tuple[int, ...]:
        special: dict[str, tuple[int, ...]] = {
            "patch_embedding.weight": (width, 16, 1, 2, 2),
            "text_embedding.0.weight": (width, 4096),
            "time_embedding.0.weight": (width, 256),
            "time_projection.1.weight": (6 * width, width),
            "time_projection.1.bias": (6 * width,),
            "head.head.weight": (64, width),
            "head.head.bias": (64,),
            "head.modulation": (1, 2, width),
            "modulation": (1, 6, width),
            "ffn.0.weight": (ffn, width),
            "ffn.0.bias": (ffn,),
            "ffn.2.weight": (width, ffn),
        }
        vector = name.endswith("bias") or "norm" in name
        return special.get(name, (width,) if vector else (width, width))

    blocks = {f"blocks.{i}.{name}": shape(name) for i in range(layers) for name in BLOCK.split()}
    return {name: shape(name) for name in OUTER.split()} | blocks


def wan_state(seed: int = 0, **sizes: Any) -> dict[str, Tensor]:
    """A tiny network's tensors under original names."""
    return {
        str(to_wan(name)): t.contiguous()
        for name, t in tiny_network(seed, torch.float32, **sizes).state_dict().items()
    }


def same(network: WanTransformer, expected: dict[str, Tensor] | None = None) -> None:
    """Bit for bit the tiny network of seed 0, or other tensors by original name."""
    expected = expected or wan_state()
    own = network.state_dict()
    assert {to_wan(name) for name in own} == set(expected)
    for name, tensor in own.items():
        assert torch.equal(tensor, expected[str(to_wan(name))]), name


def wan_folder(folder: Path, state: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({**WAN_CONFIG, "text_dim": TINY["text_dim"], **config})
    )
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def sharded_folder(folder: Path) -> Path:
    """A diffusers folder of three shards and an index, written by diffusers."""
    tiny_network(dtype=torch.float32).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder
