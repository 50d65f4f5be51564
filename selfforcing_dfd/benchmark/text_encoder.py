"""A text encoder of UMT5's shape with random weights: its time is real, its embeddings are not."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from selfforcing_dfd.codecs.prompts import MAX_LENGTH
from selfforcing_dfd.common import UserError

NUM_TOKENS = 64
"""Tokens of every prompt. Wan's example prompts have 40 to 60 words."""
END = 1  # the token that ends a prompt

SIZES: dict[str, dict[str, int]] = {
    # google/umt5-xxl: 5.7 billion parameters, 11.4 GB in bfloat16
    "umt5": {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    },
    # as wide as the student's text, whatever that is; for tests
    "umt5-small": {"vocab_size": 1000, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}


@dataclass(frozen=True, slots=True)
class RandomText:
    """encoder: transformers' UMT5EncoderModel. A prompt has as many tokens as a long one."""

    encoder: Any

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """[B, MAX_LENGTH, D_text] float32, zeros past NUM_TOKENS."""
        size = self.encoder.config.vocab_size
        ids = torch.tensor([token_ids(caption, size) for caption in captions])
        ids = ids.to(self.encoder.device)
        states = self.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        padded: Tensor = pad(states.float(), (0, 0, 0, MAX_LENGTH - NUM_TOKENS))
        return padded


def token_ids(caption: str, vocab_size: int) -> list[int]:
    """NUM_TOKENS tokens that the caption decides, the last of which ends it."""
    numbers = (hashlib.blake2b(f"{caption}:{i}".encode()).digest() for i in range(NUM_TOKENS - 1))
    drawn = [2 + int.from_bytes(number[:8], "little") % (vocab_size - 2) for number in numbers]
    return [*drawn, END]


def random_text(name: str, text_dim: int, device: torch.device, dtype: torch.dtype) -> RandomText:
    """An encoder of SIZES whose states are as wide as the student's text.

    Raises UserError for a student that takes text of another width than UMT5's.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    sizes: dict[str, Any] = {"d_model": text_dim, **SIZES[name]}
    if sizes["d_model"] != text_dim:
        raise UserError(
            f"--text-encoder {name} makes text of width {sizes['d_model']}, and this student takes "
            f"{text_dim}; use it with --random-weights wan1.3b or wan14b, or use umt5-small"
        )
    with torch.device("meta"):
        encoder: Any = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu"))
    encoder = encoder.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    encoder.tie_weights()  # `to_empty` makes two of the table of words, 2 GB of UMT5's
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return RandomText(encoder)
