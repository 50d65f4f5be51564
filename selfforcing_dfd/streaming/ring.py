"""The past of a stream in one allocation: [sink slots | ring of slots], a slot for each chunk.

Unmasked attention does not ask in which order keys lie, so forgetting the oldest chunk is nothing
but writing the newest one over it. Nothing is copied, concatenated or moved once the ring is full,
and no number is read back from the device: what is where is a few Python integers. (Design: keys
stay rotated at the position they were written for, and only slots whose position changes, the
sink's as a rule, are turned again, once a chunk, always from the keys as committed.)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from selfforcing_dfd.context import Attention, ChunkKV
from selfforcing_dfd.models.rope import axis_dims, axis_frequencies, rotary_tables, rotate

Positions = Literal["absolute", "sink_relative", "window_relative"]
"""absolute: every latent frame keeps its index, so the sink recedes for ever (what Self-Forcing
does). sink_relative: the sink is moved along, to stand just before the window. window_relative:
sink and window count from 0 at each chunk; the same distances as sink_relative, with everything
turned anew each time: the slow reference.
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
        return (
            self.num_layers,
            self.batch,
            frames * self.tokens,
            self.heads,
            head_dim or self.head_dim,
        )


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
    """What one chunk sees of the ring, its own slot included. Attention writes the chunk's keys and
    values there.
    """

    keys: Tensor  # [layers, B, K * tokens, heads, head_dim]
    values: Tensor
    own: slice  # tokens of this chunk
    visible: slice  # tokens of the past and of this chunk
    next_frame: int
    wants_kv = False

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
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
    """`cache.KVCache` for an endless stream: the same answers from memory that is allocated once.

    sink_frames: the first latent frames, kept for ever. window_frames: history and the current
    chunk, the sink not counted; K, what a chunk sees, is their sum. Both must be multiples of
    chunk_frames (latent frames); only the first chunk of a stream may be shorter. Raises ValueError
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
    # time part of the keys as they were committed, of slots that may be turned
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
        whole, part = self.shape.tensor(self.num_frames), self.shape.tensor(movable, self.time_dim)
        self.keys, self.values, self.home_keys = (
            torch.zeros(size, dtype=self.dtype, device=self.device) for size in (whole, whole, part)
        )

    def _check(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(
                f"positions is {self.positions!r}; use one of {', '.join(get_args(Positions))}"
            )
        for name, frames in (
            ("sink_frames", self.sink_frames),
            ("window_frames", self.window_frames),
        ):
            if frames < 0 or frames % self.chunk_frames:
                below = max(frames, 0) // self.chunk_frames * self.chunk_frames
                raise ValueError(
                    f"{name} is {frames}; slots hold whole chunks of {self.chunk_frames} latent frames: "
                    f"use {below} or {below + self.chunk_frames}"
                )
        if not self.window_frames:
            raise ValueError(
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
        """How many values of a head turn with time."""
        return axis_dims(self.shape.head_dim)[0]

    @property
    def visible_starts(self) -> tuple[int, ...]:
        """First latent frames of the chunks that the next chunk will see, the oldest first."""
        return tuple(slot.start for slot in self._past())

    def read(self, next_frames: int = 0) -> RingContext:
        """What a chunk of `next_frames` latent frames sees: its slot chosen, the sink brought to
        its position.

        The same until `append`. Raises ValueError for a chunk that does not fit a slot.
        """
        frames, past = next_frames or self.chunk_frames, self._past()
        if frames > self.chunk_frames or (frames < self.chunk_frames and past):
            raise ValueError(
                f"a chunk has {frames} latent frames; slots hold {self.chunk_frames}, and only the first may have fewer"
            )
        *positions, own_position = self._positions(past)
        for slot, position in zip(past, positions, strict=True):
            self._turn(slot, position)
        self._current = own = Slot(
            self._free_index(), self.next_frame, frames, own_position, own_position
        )
        spans = [self._tokens(slot) for slot in (*past, own)]
        visible = slice(min(span.start for span in spans), max(span.stop for span in spans))
        return RingContext(self.keys, self.values, self._tokens(own), visible, own_position)

    def append(self, kv: ChunkKV) -> None:
        """Keep what the last forward pass wrote. Raises ValueError where nothing was read for such
        a chunk.
        """
        slot = self._current
        if slot is None or slot.frames != kv.frames:
            raise ValueError(
                f"append of {kv.frames} latent frames; read({kv.frames}) and a forward pass come first"
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
        self._kept, self._recent, self._current = [], [], None
        self._num_written = self.next_frame = 0

    def flush(self) -> None:
        """Forget all but the sink and the newest chunk (KV flush, arXiv 2511.20649)."""
        if not self._recent:
            return
        newest, self._recent, self._num_written = self._recent[-1], [], 0
        moved = replace(newest, index=self._free_index())
        old, new = self._tokens(newest), self._tokens(moved)
        for buffer in (self.keys, self.values, self.home_keys):
            if new.stop <= buffer.shape[2] and old != new:
                buffer[:, :, new] = buffer[:, :, old]
        self._recent, self._num_written, self._current = [moved], 1, None

    def snapshot(self) -> RingState:
        """A copy of everything, for `restore`."""
        buffers = (self.keys.clone(), self.values.clone(), self.home_keys.clone())
        kept, recent = (
            tuple(replace(slot) for slot in slots) for slots in (self._kept, self._recent)
        )
        return RingState(buffers, kept, recent, self._num_written, self.next_frame)

    def restore(self, state: RingState) -> None:
        """Back to a snapshot of a ring of the same sizes, in the memory that is there."""
        for buffer, saved in zip(
            (self.keys, self.values, self.home_keys), state.buffers, strict=True
        ):
            buffer.copy_(saved)
        self._kept, self._recent = (
            [replace(slot) for slot in slots] for slots in (state.kept, state.recent)
        )
        self._num_written, self.next_frame, self._current = (
            state.num_written,
            state.next_frame,
            None,
        )

    @property
    def _num_slots(self) -> int:
        return self.window_frames // self.chunk_frames

    @property
    def _sink_has_room(self) -> bool:
        return len(self._kept) < self.sink_frames // self.chunk_frames

    def _past(self) -> list[Slot]:
        """What the next chunk sees: all but the slot that it will take."""
        return [
            *self._kept,
            *self._recent[len(self._recent) - min(len(self._recent), self._num_slots - 1) :],
        ]

    def _free_index(self) -> int:
        if self._sink_has_room:
            return len(self._kept)
        return len(self._kept) + self._num_written % self._num_slots

    def _tokens(self, slot: Slot) -> slice:
        """A slot's part of the buffers; a chunk that is shorter stands at its end, next to the
        following slot.
        """
        stop = (slot.index + 1) * self.chunk_frames
        return slice((stop - slot.frames) * self.shape.tokens, stop * self.shape.tokens)

    def _positions(self, past: list[Slot]) -> list[int]:
        """Where each visible chunk and then the current one stand for the rotary embedding."""
        starts = [*(slot.start for slot in past), self.next_frame]
        if self.positions == "window_relative":
            return [sum(slot.frames for slot in past[:i]) for i in range(len(starts))]
        if self.positions == "absolute" or not self._kept:
            return starts
        num_kept, sink_end = len(self._kept), self._kept[-1].start + self._kept[-1].frames
        moved = starts[num_kept] - sink_end  # by how much the window has left the sink behind
        return [*(start + moved for start in starts[:num_kept]), *starts[num_kept:]]

    def _turn(self, slot: Slot, position: int) -> None:
        """Rotate a slot's keys to another position, from the keys as they were committed: no
        rounding adds up.
        """
        if slot.position == position:
            return
        slot.position = position
        angles = (position - slot.home) * axis_frequencies(self.time_dim, self.keys.device)
        precise = torch.float64 if self.dtype == torch.float64 else torch.float32
        (cos, sin), tokens = rotary_tables(angles, precise), self._tokens(slot)
        for keys, home in zip(self.keys, self.home_keys, strict=True):
            keys[:, tokens, :, : self.time_dim] = rotate(home[:, tokens], cos, sin)

    def _save_home(self, slot: Slot) -> None:
        tokens = self._tokens(slot)
        if tokens.stop <= self.home_keys.shape[2]:
            self.home_keys[:, :, tokens] = self.keys[:, :, tokens, :, : self.time_dim]
