"""Sizes of the published networks, as WanTransformer's arguments."""

from __future__ import annotations

_SHARED = {"attention_head_dim": 128, "in_channels": 16, "text_dim": 4096, "freq_dim": 256}

PUBLISHED_SIZES: dict[str, dict[str, int]] = {
    "wan1.3b": {**_SHARED, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan14b": {**_SHARED, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
"""Wan2.1-T2V, arXiv 2503.20314, table 2."""
