"""What a stream has shown, kept as H.264 so that a viewer can save it, in bounded memory."""

from __future__ import annotations

import io
import threading
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from selfforcing_dfd.common import UserError
from selfforcing_dfd.live.writers import FragmentEncoder, frame_rate, offset_of_box

KEEP_S = 600.0
KEEP_BYTES = 128 * 2**20


class Fragment(NamedTuple):
    """One chunk as a piece of an mp4 that begins with a keyframe."""

    chunk: int
    num_frames: int
    data: bytes


@dataclass(slots=True)
class Recording:
    """The newest chunks that were shown; older ones are forgotten. For use by several threads.

    fps: video frames a second. keep_s, keep_bytes: how much is kept at most. Frames of another size
    begin a new recording, as one file has one size.
    """

    fps: float
    keep_s: float = KEEP_S
    keep_bytes: int = KEEP_BYTES
    _encoder: FragmentEncoder | None = field(init=False, default=None)
    _header: bytes = field(init=False, default=b"")
    _fragments: deque[Fragment] = field(init=False, default_factory=deque)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    @property
    def num_bytes(self) -> int:
        return sum(len(fragment.data) for fragment in self._fragments)

    def add(self, chunk: int, pictures: np.ndarray) -> None:
        """A chunk has been shown. pictures: uint8 [T, H, W, 3]."""
        with self._lock:
            size = pictures.shape[1:3]
            if self._encoder is None or self._encoder.size != size:
                self._encoder = FragmentEncoder(size, frame_rate(self.fps))
                self._fragments.clear()
                self._header = b""
            data = self._encoder.encode(pictures)
            if not self._header:
                start = offset_of_box(data, b"moof")
                self._header = data[:start]
                data = data[start:]
            self._fragments.append(Fragment(chunk, len(pictures), data))
            self._forget()

    def mp4(self, first_chunk: int = 0) -> bytes:
        """An mp4 of the chunks from `first_chunk` on, as far as they are kept.

        Raises UserError where there are none.
        """
        with self._lock:
            kept = [fragment for fragment in self._fragments if fragment.chunk >= first_chunk]
            header = self._header
        if not kept:
            raise UserError("nothing has been shown that could be saved; wait for a chunk")
        fragments = b"".join(fragment.data for fragment in kept)
        return joined(header + fragments, frame_rate(self.fps))

    def _forget(self) -> None:
        """Drop the oldest chunks until the rest fits; the newest one stays."""
        num_frames = sum(fragment.num_frames for fragment in self._fragments)
        num_bytes = self.num_bytes
        while len(self._fragments) > 1 and (
            num_frames > self.keep_s * self.fps or num_bytes > self.keep_bytes
        ):
            oldest = self._fragments.popleft()
            num_frames -= oldest.num_frames
            num_bytes -= len(oldest.data)


def joined(fragments: bytes, fps: Fraction) -> bytes:
    """A plain mp4 of some fragments, with times from 0 and no gaps; nothing is encoded again."""
    buffer = io.BytesIO()
    source = av.open(io.BytesIO(fragments), mode="r", format="mp4")
    with source, av.open(buffer, "w", format="mp4") as target:
        video = source.streams.video[0]
        stream = target.add_stream_from_template(video)
        stream.time_base = 1 / fps
        count = 0
        for packet in source.demux(video):
            if not packet.size:  # the end
                continue
            packet.stream = stream
            packet.time_base = 1 / fps
            packet.pts = packet.dts = count
            packet.duration = 1
            count += 1
            target.mux(packet)
    return buffer.getvalue()
