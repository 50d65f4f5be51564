"""Sizes of the published networks, as WanTransformer's arguments."""

from __future__ import annotations

from typing import Any

_SHARED: dict[str, Any] = {
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "image_dim": None,
    "added_kv_proj_dim": None,
}
_WAN14B = {**_SHARED, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}

PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    "wan1.3b": {**_SHARED, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan14b": _WAN14B,
    "wan14b_i2v": {**_WAN14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
}
"""Wan2.1, arXiv 2503.20314, table 2; its image-to-video model takes a picture beside the text."""
