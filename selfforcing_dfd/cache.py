"""What the network exchanges with the outside: conditioning in, flow and K/V out, and the past as immutable context.

Attention only ever sees values; the one mutable object of a rollout is `KVCache`. Keys and values are detached when they
enter a `ChunkKV`, so no gradient can reach an earlier chunk (the public code leaks here: its cache is written in place).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""attend(q, k, v) on [B, tokens, heads, head_dim]."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the student is asked for. `text`: [B, L, D_text] text-encoder states, zero past each prompt's end."""

    text: Tensor


@dataclass(frozen=True, slots=True)
class ChunkKV:
    """What one finished chunk leaves behind: per layer (k, v), each [B, frames * tokens, heads, head_dim], k rotated."""

    frames: int
    layers: tuple[tuple[Tensor, Tensor], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple((k.detach(), v.detach()) for k, v in self.layers))


@dataclass(frozen=True, slots=True)
class Context:
    """Immutable view of the past of one chunk, whose first latent frame has the absolute index `next_frame`."""

    chunks: tuple[ChunkKV, ...] = ()
    next_frame: int = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Past and present along tokens."""
        keys, values = zip(*(chunk.layers[layer] for chunk in self.chunks), (k, v), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of all tokens at hand over the past and over each other."""
        return attention(q, *self.extend(layer, k, v)) if self.chunks else attention(q, k, v)


@dataclass(frozen=True, slots=True)
class PackedContext:
    """The pasts of consecutive chunks that go through the network together; each attends to its own past and to itself."""

    contexts: tuple[Context, ...]
    frames: tuple[int, ...]

    @property
    def next_frame(self) -> int:
        return self.contexts[0].next_frame

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[1] // sum(self.frames)
        parts = [part.split([frames * tokens for frames in self.frames], dim=1) for part in (q, k, v)]
        return torch.cat(
            [c.attend(attention, layer, *qkv) for c, *qkv in zip(self.contexts, *parts, strict=True)], dim=1
        )


Past = Context | PackedContext


@dataclass(frozen=True, slots=True)
class NetworkOutput:
    """flow: [B, F, C, H, W]; kv: the keys and values of exactly these frames."""

    flow: Tensor
    kv: ChunkKV


class Network(Protocol):
    """Student, teacher and fake score alike. Without context it is bidirectional over the frames it gets."""

    def __call__(
        self, x_t: Tensor, sigma: Tensor | float, conditioning: Conditioning, context: Past | None = None
    ) -> NetworkOutput: ...


@dataclass(slots=True)
class KVCache:
    """Sink + window, by whole chunks.

    sink: latent frames at the beginning that stay for ever. window: latent frames that a chunk may attend to, itself and
    the sink included (history + current); None keeps everything.
    """

    sink: int = 0
    window: int | None = None
    _kept: list[ChunkKV] = field(default_factory=list)
    _recent: list[ChunkKV] = field(default_factory=list)
    _next_frame: int = 0

    def read(self, next_frames: int = 0) -> Context:
        """The past that a chunk of `next_frames` latent frames may see."""
        if self.window is not None:
            while self._recent and _frames(self._kept + self._recent) + next_frames > self.window:
                self._recent.pop(0)
        return Context((*self._kept, *self._recent), self._next_frame)

    def append(self, kv: ChunkKV) -> None:
        """Remember a finished chunk."""
        (self._kept if _frames(self._kept) + kv.frames <= self.sink else self._recent).append(kv)
        self._next_frame += kv.frames


def _frames(chunks: list[ChunkKV]) -> int:
    return sum(chunk.frames for chunk in chunks)
