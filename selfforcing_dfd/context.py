"""What a chunk sees: text, and the keys and values (K/V) of the chunks before it.

A network gets noisy latents, a noise level, conditioning and a context; it returns the flow and its
own K/V. Context is immutable, and K/V are detached when they enter a `ChunkKV`: no gradient reaches
earlier chunks. (In the public Self-Forcing code, which writes its cache in place, it does.)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v: [B, tokens, heads, head_dim]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What is asked for. text: [B, L, D_text] text-encoder states, zero past each prompt's end."""

    text: Tensor


@dataclass(frozen=True, slots=True)
class ChunkKV:
    """The K/V that a finished chunk leaves behind; keys are rotated."""

    frames: int
    layers: tuple[tuple[Tensor, Tensor], ...]  # (k, v), each [B, frames * tokens, heads, head_dim]

    def __post_init__(self) -> None:
        layers = tuple((k.detach(), v.detach()) for k, v in self.layers)
        object.__setattr__(self, "layers", layers)


class Context(Protocol):
    """What the frames of one network call see besides each other."""

    @property
    def next_frame(self) -> int: ...  # index in the video of the call's first latent frame

    @property
    def wants_kv(self) -> bool: ...  # whether the network returns its K/V

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of this call's tokens over the context and over each other."""
        ...


@dataclass(frozen=True, slots=True)
class NetworkOutput:
    """flow: [B, F, C, H, W]. kv: K/V of these frames; without layers if they were not wanted."""

    flow: Tensor
    kv: ChunkKV


class Network(Protocol):
    """Student, teacher and fake score. Without context: WHOLE_CLIP."""

    def __call__(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput: ...


@dataclass(frozen=True, slots=True)
class ChunkContext:
    """The finished chunks that one chunk sees."""

    chunks: tuple[ChunkKV, ...] = ()
    next_frame: int = 0
    wants_kv: bool = True

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.chunks:
            return attention(q, k, v)
        past = [chunk.layers[layer] for chunk in self.chunks]
        keys = torch.cat([*(past_k for past_k, _ in past), k], dim=1)
        values = torch.cat([*(past_v for _, past_v in past), v], dim=1)
        return attention(q, keys, values)


WHOLE_CLIP = ChunkContext(wants_kv=False)
"""No past: the network is bidirectional. Its K/V are not kept (6 GB at 1.3B and 21 frames)."""


@dataclass(frozen=True, slots=True)
class PackedContext:
    """Chunks of these latent frames in one network call; each sees its own context and itself."""

    contexts: tuple[Context, ...]
    frames: tuple[int, ...]
    wants_kv = False

    @property
    def next_frame(self) -> int:
        return self.contexts[0].next_frame

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens_per_frame = q.shape[1] // sum(self.frames)
        lengths = [frames * tokens_per_frame for frames in self.frames]
        own = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
        attended = [
            context.attend(attention, layer, own_q, own_k, own_v)
            for context, (own_q, own_k, own_v) in zip(self.contexts, own, strict=True)
        ]
        return torch.cat(attended, dim=1)


class Cache(Protocol):
    """Remembers finished chunks: `KVCache` in training, a ring of slots in streaming."""

    def read(self, next_frames: int) -> Context: ...

    def append(self, kv: ChunkKV) -> None: ...


@dataclass(slots=True)
class KVCache:
    """The only mutable part of a rollout. Raises ValueError for sizes that cut a chunk in two."""

    sink: int = 0  # the first latent frames, always seen
    window: int | None = None  # of history that a chunk sees, itself included, the sink not; or all
    _sink_chunks: list[ChunkKV] = field(default_factory=list)
    _history: list[ChunkKV] = field(default_factory=list)
    _next_frame: int = 0

    def read(self, next_frames: int) -> ChunkContext:
        """The context of a chunk of `next_frames` latent frames."""
        if self.window is not None:
            check_frames("window", self.window, next_frames)
        return ChunkContext((*self._sink_chunks, *self._newest(next_frames)), self._next_frame)

    def append(self, kv: ChunkKV) -> None:
        """Remember a finished chunk, and forget what no later chunk can see."""
        if self._next_frame + kv.frames <= self.sink:
            self._sink_chunks.append(kv)
        else:
            check_frames("sink", self.sink, kv.frames)
            self._history.append(kv)
            self._history = self._newest(0)
        self._next_frame += kv.frames

    def _newest(self, next_frames: int) -> list[ChunkKV]:
        """The newest chunks that fit into the window beside `next_frames`."""
        if self.window is None:
            return self._history
        room = self.window - next_frames
        sizes = [chunk.frames for chunk in self._history]
        return [chunk for i, chunk in enumerate(self._history) if sum(sizes[i:]) <= room]


def check_frames(name: str, frames: int, chunk_frames: int) -> None:
    """Raise ValueError unless a clip, sink or window of `frames` latent frames is whole chunks."""
    least = 0 if name.endswith("sink") else chunk_frames
    if frames % chunk_frames or frames < least:
        lower = max(frames - frames % chunk_frames, least)
        raise ValueError(
            f"{name} is {frames} latent frames, but a chunk has {chunk_frames} and is made, kept "
            f"and forgotten as a whole; use {lower} or {lower + chunk_frames}"
        )
