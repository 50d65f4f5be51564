"""What every network answers to: conditioning and context in, flow and K/V out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from selfforcing_dfd.cache import Attention, ChunkKV


class Past(Protocol):
    """What a network asks of a chunk's past: `cache.Context`, `cache.PackedContext`, or a view of a
    ring of slots.
    """

    @property
    def next_frame(self) -> int:
        """Position of the first latent frame at hand."""
        ...

    @property
    def stores(self) -> bool:
        """Whether `attend` itself keeps the keys and values that it gets."""
        ...

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of all tokens at hand over the past and over each other."""
        ...


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the student is asked for. `text`: [B, L, D_text] text-encoder states, zero past each
    prompt's end.

    What a network has worked out once for many calls: text_kv, per layer the (k, v) of
    cross-attention, and levels, by sigma whatever it makes of a noise level.
    """

    text: Tensor
    text_kv: tuple[tuple[Tensor, Tensor], ...] = ()
    levels: Mapping[float, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NetworkOutput:
    """flow: [B, F, C, H, W]; kv: the keys and values of exactly these frames, no layers where the
    past stores them.
    """

    flow: Tensor
    kv: ChunkKV


class Network(Protocol):
    """Student, teacher and fake score alike. Without context it is bidirectional over the frames it
    gets.
    """

    def __call__(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Past | None = None,
    ) -> NetworkOutput: ...


class Cache(Protocol):
    """What remembers finished chunks: `cache.KVCache` for training, a ring of slots for streaming."""

    def read(self, next_frames: int = 0) -> Past:
        """What a chunk of `next_frames` latent frames may see."""
        ...

    def append(self, kv: ChunkKV) -> None:
        """Remember a finished chunk."""
        ...
