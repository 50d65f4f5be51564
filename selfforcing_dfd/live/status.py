"""One live line about a running stream, for stderr."""

from __future__ import annotations

import os
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable
from itertools import accumulate
from typing import Self, TextIO

from selfforcing_dfd.common import resident_bytes

RECENT_CHUNKS = 20
PROMPT_COLUMNS = 80
GIB = 2**30


class StatusLine:
    """Chunk, video so far, FPS over the last chunks, latency, memory and prompt.

    On a terminal the line overwrites itself; elsewhere one is written every `every_s` seconds. The
    summary at the end counts time from when this object is made. Safe to use from several threads,
    in bounded memory.

    fps: of the video as it is shown. clock: seconds, monotonic.
    """

    def __init__(
        self,
        stream: TextIO,
        fps: float,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stream = stream
        self._fps = fps
        self._every_s = every_s
        self._clock = clock
        self._is_live = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
        self._lock = threading.Lock()
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_CHUNKS + 1)
        self._num_chunks = 0
        self._num_frames = 0
        self._started = clock()
        self._paused_s = 0.0
        self._paused_at: float | None = None
        self._worst_ms = 0.0
        self._total_ms = 0.0
        self._line = ""
        self._next_line = self._started

    def update(
        self,
        chunk_index: int,
        num_frames: int,
        latency_ms: float,
        prompt: str,
        cuda_bytes: int | None = None,
    ) -> None:
        """After each chunk: its video frames, latency and prompt, and a GPU's memory if any."""
        with self._lock:
            now = self._clock()
            self._recent.append((now, num_frames))
            self._num_chunks += 1
            self._num_frames += num_frames
            self._worst_ms = max(self._worst_ms, latency_ms)
            self._total_ms += latency_ms
            fields = [
                f"chunk {chunk_index}",
                self._length(),
                f"{self._recent_fps()} FPS",
                f"{latency_ms:.0f} ms",
                f"{resident_bytes() / GIB:.2f} GiB",
            ]
            if cuda_bytes is not None:
                fields.append(f"GPU {cuda_bytes / GIB:.2f} GiB")
            fields.append(fit(printable(prompt), PROMPT_COLUMNS))
            self._show(" | ".join(fields), now)

    def pause(self) -> None:
        """The stream stands still until `resume`; that time counts in no rate."""
        with self._lock:
            if self._paused_at is None:
                self._paused_at = self._clock()
                self._show("paused", self._paused_at, is_urgent=True)

    def resume(self) -> None:
        with self._lock:
            if self._paused_at is not None:
                self._paused_s += self._clock() - self._paused_at
                self._paused_at = None
                self._recent.clear()

    def say(self, message: str) -> None:
        """A message on its own line, such as the reply to a command."""
        with self._lock:
            line = f"{printable(message)}\n"
            self._stream.write(f"\r\x1b[K{line}{self._line}" if self._is_live else line)
            self._stream.flush()

    def close(self) -> None:
        """End the line and write a summary, without the time of pauses."""
        self.resume()
        wall_s = self._clock() - self._started - self._paused_s
        self._line = ""
        self.say(self._summary(wall_s) if self._num_chunks else "no chunk was made")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _length(self) -> str:
        return f"{self._num_frames} video frames ({self._num_frames / self._fps:.1f} s)"

    def _summary(self, wall_s: float) -> str:
        rate = f", {self._num_frames / wall_s:.1f} FPS" if wall_s > 0 else ""
        return (
            f"{self._num_chunks} chunks, {self._length()} in {wall_s:.1f} s{rate}, "
            f"latency {self._total_ms / self._num_chunks:.0f} ms on average, "
            f"{self._worst_ms:.0f} ms at most, {resident_bytes() / GIB:.2f} GiB"
        )

    def _recent_fps(self) -> str:
        """Frames over wall time since the oldest recent chunk; a dash until there are two."""
        wall_s = self._recent[-1][0] - self._recent[0][0]
        num_frames = sum(count for _, count in self._recent) - self._recent[0][1]
        return f"{num_frames / wall_s:.1f}" if wall_s > 0 else "-"

    def _show(self, line: str, now: float, is_urgent: bool = False) -> None:
        if self._is_live:
            # in the last column a terminal may wrap
            self._line = fit(line, terminal_columns(self._stream) - 1)
            self._stream.write(f"\r{self._line}\x1b[K")
        elif is_urgent or now >= self._next_line:
            self._next_line = now + self._every_s
            self._stream.write(f"{line}\n")
        self._stream.flush()


def printable(text: str) -> str:
    """Text without control characters, which could move the cursor or more."""
    return "".join(c if c.isprintable() else " " for c in text)


def fit(text: str, columns: int) -> str:
    """Text cut to a number of terminal columns; ... stands for what is left out."""
    if text_columns(text) <= columns:
        return text
    dots = "..."[: max(columns, 0)]
    num_kept = sum(width <= columns - len(dots) for width in accumulate(map(text_columns, text)))
    return text[:num_kept] + dots


def text_columns(text: str) -> int:
    """Columns that text takes in a terminal."""
    return sum(map(character_columns, text))


def character_columns(character: str) -> int:
    """Two for wide characters of East Asia, none for combining ones."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def terminal_columns(stream: TextIO) -> int:
    """80 if the terminal does not know."""
    return os.get_terminal_size(stream.fileno()).columns or 80
