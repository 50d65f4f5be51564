"""Prompts whose embeddings are made before they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Encodes(Protocol):
    """A text encoder without a fingerprint."""

    def encode(self, captions: list[str]) -> Tensor: ...


@runtime_checkable
class LoadsLater(Protocol):
    """A text encoder whose weights are read when they are first needed."""

    def load(self) -> None:
        """Read them now."""
        ...


@dataclass(frozen=True, slots=True)
class TextAhead:
    """A text encoder that remembers the prompts it was told of in advance.

    A stream asks for them without waiting for the encoder. known: [L, D_text] by prompt.
    """

    encoder: Encodes
    known: dict[str, Tensor] = field(default_factory=dict)

    def encode(self, captions: list[str]) -> Tensor:
        """[B, L, D_text], zeros past each prompt's end."""
        if any(caption not in self.known for caption in captions):
            return self.encoder.encode(captions)
        return torch.stack([self.known[caption] for caption in captions])

    def prefetch(self, captions: Iterable[str]) -> None:
        """Encode prompts, each by itself. Raises what the encoder raises, and remembers the others.

        An error in a schedule then comes before the stream, and not hours later.
        """
        for caption in captions:
            if caption not in self.known:
                self.known[caption] = self.encoder.encode([caption])[0]

    def load(self) -> None:
        """Read the encoder's weights, for prompts that nobody knows yet."""
        if isinstance(self.encoder, LoadsLater):
            self.encoder.load()
