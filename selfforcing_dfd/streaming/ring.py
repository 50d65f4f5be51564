"""The context of a stream in one allocation: [sink slots | ring of slots], a slot for each chunk.

The order of keys does not matter to attention without a mask, so the newest chunk is written over
the oldest. Nothing is copied, concatenated or moved once the ring is full, and nothing is read back
from the device: Python integers say what is where.

Keys are stored rotated at the position they were written for. Only slots whose position changes,
usually the sink's, are rotated again, once for each chunk and always from the keys as committed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import Attention, ChunkKV
from selfforcing_dfd.models.attention_operator import Slots
from selfforcing_dfd.models.rope import axis_dims, axis_frequencies, rotary_tables, rotate

Positions = Literal["absolute", "sink_relative", "window_relative"]
"""absolute: every latent frame keeps its index, and the distance to the sink grows without end (as
in Self-Forcing). sink_relative: the sink moves along and stands just before the window.
window_relative: sink and window count from 0 at each chunk. The distances are those of
sink_relative, but all keys are rotated again for each chunk: the slow reference.
"""


@dataclass(frozen=True, slots=True)
class KVShape:
    """Sizes of the keys (and values) of one latent frame."""

    num_layers: int
    batch: int
    tokens: int  # of one latent frame
    heads: int
    head_dim: int

    def tensor(self, frames: int, head_dim: int | None = None) -> tuple[int, ...]:
        """[layers, batch, frames * tokens, heads, head_dim]."""
        tokens = frames * self.tokens
        return (self.num_layers, self.batch, tokens, self.heads, head_dim or self.head_dim)


@dataclass(slots=True)
class Slot:
    """A finished chunk in the ring. All in latent frames."""

    index: int  # where in the buffer
    start: int  # which latent frame of the stream it begins with
    frames: int
    home: int  # the position its keys were rotated for when they were written
    position: int  # the position they are rotated for now


@dataclass(frozen=True, slots=True)
class RingContext:
    """What one chunk sees of the ring. Attention writes the chunk's K/V into its own slot."""

    keys: Tensor  # [layers, B, K * tokens, heads, head_dim]
    values: Tensor
    own: slice  # tokens of this chunk
    visible: slice  # tokens of the past and of this chunk
    next_frame: int
    own_tokens: Tensor  # indices of `own`
    visible_span: Tensor  # start and stop of `visible`; on the CPU, where kernels are called
    wants_kv = False

    def slots(self, layer: int) -> Slots:
        """A layer for compiled code, to which `own` and `visible` are tensors."""
        return Slots(self.keys[layer], self.values[layer], self.own_tokens, self.visible_span)

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = self.keys[layer]
        values = self.values[layer]
        keys[:, self.own] = k
        values[:, self.own] = v
        return attention(q, keys[:, self.visible], values[:, self.visible])


@dataclass(frozen=True, slots=True)
class RingState:
    """A copy of a ring, made by `RingCache.snapshot`."""

    buffers: tuple[Tensor, ...]
    kept: tuple[Slot, ...]
    recent: tuple[Slot, ...]
    num_written: int
    next_frame: int


@dataclass(slots=True)
class RingCache:
    """`context.KVCache` for an endless stream: same answers from memory that is allocated once.

    sink_frames: the first latent frames, kept for ever. window_frames: history and the current
    chunk; the sink comes on top, and K, what a chunk sees, is their sum. Both must be multiples of
    chunk_frames (latent frames); only the first chunk of a stream may be shorter. Raises UserError
    for other sizes.
    """

    shape: KVShape
    chunk_frames: int
    sink_frames: int
    window_frames: int
    positions: Positions = "sink_relative"
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    # time part of the keys as they were committed, of slots that may be rotated again
    home_keys: Tensor = field(init=False)
    next_frame: int = field(init=False, default=0)
    _kept: list[Slot] = field(init=False, default_factory=list)
    _recent: list[Slot] = field(init=False, default_factory=list)
    _num_written: int = field(init=False, default=0)  # chunks that went into the ring
    _current: Slot | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._check()
        movable = {
            "absolute": 0,
            "sink_relative": self.sink_frames,
            "window_relative": self.num_frames,
        }[self.positions]
        whole = self.shape.tensor(self.num_frames)
        time_part = self.shape.tensor(movable, self.time_dim)
        self.keys = torch.zeros(whole, dtype=self.dtype, device=self.device)
        self.values = torch.zeros(whole, dtype=self.dtype, device=self.device)
        self.home_keys = torch.zeros(time_part, dtype=self.dtype, device=self.device)

    def _check(self) -> None:
        if self.positions not in get_args(Positions):
            raise UserError(
                f"positions is {self.positions!r}; use one of {', '.join(get_args(Positions))}"
            )
        sizes = {"sink_frames": self.sink_frames, "window_frames": self.window_frames}
        for name, frames in sizes.items():
            if frames < 0 or frames % self.chunk_frames:
                below = max(frames, 0) // self.chunk_frames * self.chunk_frames
                raise UserError(
                    f"{name} is {frames}; slots hold whole chunks of {self.chunk_frames} latent "
                    f"frames: use {below} or {below + self.chunk_frames}"
                )
        if not self.window_frames:
            raise UserError(
                f"window_frames is 0; it counts the current chunk, so at least {self.chunk_frames}"
            )

    @property
    def num_frames(self) -> int:
        """K: latent frames that a chunk sees at most, itself and the sink included."""
        return self.sink_frames + self.window_frames

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.keys, self.values, self.home_keys))

    @property
    def time_dim(self) -> int:
        """How many values of a head are rotated by the latent frame's index."""
        return axis_dims(self.shape.head_dim)[0]

    @property
    def visible_starts(self) -> tuple[int, ...]:
        """First latent frames of the chunks that the next chunk will see, the oldest first."""
        return tuple(slot.start for slot in self._past())

    def read(self, next_frames: int = 0) -> RingContext:
        """What a chunk of `next_frames` latent frames sees; the same until `append`.

        Chooses the chunk's slot and rotates the sink to its position. Raises ValueError for a chunk
        that does not fit a slot.
        """
        frames = next_frames or self.chunk_frames
        past = self._past()
        if frames > self.chunk_frames or (frames < self.chunk_frames and past):
            raise ValueError(
                f"a chunk has {frames} latent frames; slots hold {self.chunk_frames}, "
                "and only the first may have fewer"
            )
        *positions, own_position = self._positions(past)
        for slot, position in zip(past, positions, strict=True):
            self._turn(slot, position)
        self._current = own = Slot(
            self._free_index(), self.next_frame, frames, own_position, own_position
        )
        spans = [self._tokens(slot) for slot in (*past, own)]
        visible = slice(min(span.start for span in spans), max(span.stop for span in spans))
        own_span = self._tokens(own)
        own_tokens = torch.arange(own_span.start, own_span.stop, device=self.keys.device)
        visible_span = torch.tensor((visible.start, visible.stop))
        return RingContext(
            self.keys, self.values, own_span, visible, own_position, own_tokens, visible_span
        )

    def append(self, kv: ChunkKV) -> None:
        """Keep what the last forward pass wrote. Raises ValueError without a `read` before it."""
        slot = self._current
        if slot is None or slot.frames != kv.frames:
            raise ValueError(
                f"append of {kv.frames} latent frames; "
                f"read({kv.frames}) and a forward pass come first"
            )
        if self._sink_has_room:
            self._kept.append(slot)
        else:
            self._recent = [*self._recent, slot][-self._num_slots :]
            self._num_written += 1
        self._save_home(slot)
        self.next_frame += slot.frames
        self._current = None

    def clear(self) -> None:
        """Forget all chunks; the next one is the first of a stream. Memory stays where it is."""
        self._kept = []
        self._recent = []
        self._current = None
        self._num_written = 0
        self.next_frame = 0

    def flush(self) -> None:
        """Forget all but the sink and the newest chunk (KV flush, arXiv 2511.20649)."""
        if not self._recent:
            return
        newest = self._recent[-1]
        self._num_written = 0
        moved = replace(newest, index=self._free_index())
        old = self._tokens(newest)
        new = self._tokens(moved)
        for buffer in (self.keys, self.values, self.home_keys):
            if new.stop <= buffer.shape[2] and old != new:
                buffer[:, :, new] = buffer[:, :, old]
        self._recent = [moved]
        self._num_written = 1
        self._current = None

    def snapshot(self) -> RingState:
        """A copy of everything, for `restore`."""
        buffers = (self.keys.clone(), self.values.clone(), self.home_keys.clone())
        kept = tuple(replace(slot) for slot in self._kept)
        recent = tuple(replace(slot) for slot in self._recent)
        return RingState(buffers, kept, recent, self._num_written, self.next_frame)

    def restore(self, state: RingState) -> None:
        """Go back to a snapshot of a ring of the same sizes, in the same memory."""
        buffers = (self.keys, self.values, self.home_keys)
        for buffer, saved in zip(buffers, state.buffers, strict=True):
            buffer.copy_(saved)
        self._kept = [replace(slot) for slot in state.kept]
        self._recent = [replace(slot) for slot in state.recent]
        self._num_written = state.num_written
        self.next_frame = state.next_frame
        self._current = None

    @property
    def _num_slots(self) -> int:
        return self.window_frames // self.chunk_frames

    @property
    def _sink_has_room(self) -> bool:
        return len(self._kept) < self.sink_frames // self.chunk_frames

    def _past(self) -> list[Slot]:
        """What the next chunk sees: all slots but the one that it will take."""
        num_seen = min(len(self._recent), self._num_slots - 1)
        return self._kept + self._recent[len(self._recent) - num_seen :]

    def _free_index(self) -> int:
        if self._sink_has_room:
            return len(self._kept)
        return len(self._kept) + self._num_written % self._num_slots

    def _tokens(self, slot: Slot) -> slice:
        """A slot's part of the buffers. A shorter chunk lies at the end, next to the next slot."""
        stop = (slot.index + 1) * self.chunk_frames
        return slice((stop - slot.frames) * self.shape.tokens, stop * self.shape.tokens)

    def _positions(self, past: list[Slot]) -> list[int]:
        """Rotary position of each visible chunk, then of the current one."""
        starts = [*(slot.start for slot in past), self.next_frame]
        if self.positions == "window_relative":
            return [sum(slot.frames for slot in past[:i]) for i in range(len(starts))]
        if self.positions == "absolute" or not self._kept:
            return starts
        num_kept = len(self._kept)
        sink_end = self._kept[-1].start + self._kept[-1].frames
        gap = starts[num_kept] - sink_end  # latent frames between sink and window
        return [start + gap for start in starts[:num_kept]] + starts[num_kept:]

    def _turn(self, slot: Slot, position: int) -> None:
        """Rotate a slot's keys to another position.

        Always from the keys as they were committed, so rounding does not add up.
        """
        if slot.position == position:
            return
        slot.position = position
        angles = (position - slot.home) * axis_frequencies(self.time_dim, self.keys.device)
        precise = torch.float64 if self.dtype == torch.float64 else torch.float32
        cos, sin = rotary_tables(angles, precise)
        tokens = self._tokens(slot)
        for keys, home in zip(self.keys, self.home_keys, strict=True):
            keys[:, tokens, :, : self.time_dim] = rotate(home[:, tokens], cos, sin)

    def _save_home(self, slot: Slot) -> None:
        tokens = self._tokens(slot)
        if tokens.stop <= self.home_keys.shape[2]:
            self.home_keys[:, :, tokens] = self.keys[:, :, tokens, :, : self.time_dim]
