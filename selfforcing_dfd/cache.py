"""The past of a chunk: keys and values of the chunks before it, as immutable context.

Attention sees values only; the one mutable object of a rollout is `KVCache`. Keys and values are
detached as they enter a `ChunkKV`, so no gradient reaches an earlier chunk; in the public code,
whose cache is written in place, it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""attend(q, k, v) on [B, tokens, heads, head_dim]."""


@dataclass(frozen=True, slots=True)
class ChunkKV:
    """What a finished chunk leaves behind: per layer (k, v), each [B, frames * tokens, heads,
    head_dim], k rotated.
    """

    frames: int
    layers: tuple[tuple[Tensor, Tensor], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple((k.detach(), v.detach()) for k, v in self.layers))


@dataclass(frozen=True, slots=True)
class Context:
    """Immutable view of the past of one chunk, whose first latent frame has the absolute index
    `next_frame`.
    """

    chunks: tuple[ChunkKV, ...] = ()
    next_frame: int = 0
    stores = False  # K/V that attention sees are the caller's to keep

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Past and present along tokens."""
        keys, values = zip(*(chunk.layers[layer] for chunk in self.chunks), (k, v), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of all tokens at hand over the past and over each other."""
        return attention(q, *self.extend(layer, k, v)) if self.chunks else attention(q, k, v)


@dataclass(frozen=True, slots=True)
class PackedContext:
    """The pasts of consecutive chunks that go through the network together; each sees its own past
    and itself.
    """

    contexts: tuple[Context, ...]
    frames: tuple[int, ...]
    stores = True  # nobody asks what a packed pass leaves behind: 6 GB at 1.3B and 21 latent frames

    @property
    def next_frame(self) -> int:
        return self.contexts[0].next_frame

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[1] // sum(self.frames)
        parts = [
            part.split([frames * tokens for frames in self.frames], dim=1) for part in (q, k, v)
        ]
        seen = zip(self.contexts, *parts, strict=True)
        return torch.cat([context.attend(attention, layer, *qkv) for context, *qkv in seen], dim=1)


@dataclass(slots=True)
class KVCache:
    """Sink + window, by whole chunks.

    sink: first latent frames, kept for ever. window: latent frames a chunk may see, itself and sink
    included, or None.
    """

    sink: int = 0
    window: int | None = None
    _kept: list[ChunkKV] = field(default_factory=list)
    _recent: list[ChunkKV] = field(default_factory=list)
    _next_frame: int = 0

    def read(self, next_frames: int = 0) -> Context:
        """What a chunk of `next_frames` latent frames may see."""
        return Context((*self._kept, *self._visible(next_frames)), self._next_frame)

    def append(self, kv: ChunkKV) -> None:
        """Remember a finished chunk and forget what no later chunk can see."""
        (self._kept if _frames(self._kept) + kv.frames <= self.sink else self._recent).append(kv)
        self._recent = self._visible(0)
        self._next_frame += kv.frames

    def _visible(self, next_frames: int) -> list[ChunkKV]:
        """The newest chunks that fit the window beside the sink and `next_frames`."""
        if self.window is None:
            return self._recent
        room = self.window - next_frames - _frames(self._kept)
        return [chunk for i, chunk in enumerate(self._recent) if _frames(self._recent[i:]) <= room]


def _frames(chunks: list[ChunkKV]) -> int:
    return sum(chunk.frames for chunk in chunks)
