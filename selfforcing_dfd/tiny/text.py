"""Word-level text encoder of the tiny world.

It keeps UMT5's contract: one vector for each token, zeros past the end, padding attended to.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

from selfforcing_dfd import rng


class TinyText:
    """Each word is a fixed random vector of norm sqrt(dim), seeded by the word itself.

    So any vocabulary works. The empty caption is all zeros, on which the teacher's unconditional
    half is trained.
    """

    def __init__(self, dim: int = 32, length: int = 12):
        self.dim = dim
        self.length = length

    @property
    def fingerprint(self) -> str:
        return f"tiny-text-{self.dim}x{self.length}"

    def encode(self, captions: list[str]) -> Tensor:
        """[B, length, dim]. Raises ValueError for a caption of more words than `length`."""
        out = torch.zeros(len(captions), self.length, self.dim)
        for row, caption in zip(out, captions, strict=True):
            words = re.findall(r"[^\W\d_]+", caption.lower())
            if len(words) > self.length:
                raise ValueError(
                    f"caption has {len(words)} words, {self.length} fit: {caption!r}; shorten it"
                )
            for slot, word in zip(row, words, strict=False):
                slot.copy_(self.word(word))
        return out

    def word(self, word: str) -> Tensor:
        """[dim], the same for a word wherever and whenever it occurs."""
        key = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=7).digest(), "little")
        vector = rng.normal((self.dim,), 0, "word", key)
        return vector * self.dim**0.5 / vector.norm()
