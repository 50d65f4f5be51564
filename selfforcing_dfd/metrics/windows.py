"""How the numbers of a long video change over time: one set of numbers for each stretch of it.

Only the stretch that is being read has a meter, so memory does not grow with the video's length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from selfforcing_dfd.metrics.video import VideoMeter


@dataclass(frozen=True, slots=True)
class Window:
    """One stretch. start_s: where it begins. numbers: as of a video of its own."""

    start_s: float
    frames: int
    numbers: dict[str, float]


@dataclass(slots=True)
class WindowMeter:
    """Takes frames [H, W, 3] uint8 in order and measures each `length` of them on their own.

    chunk, first_chunk: see `VideoMeter`. The difference between the last frame of a stretch and the
    first of the next belongs to neither.
    """

    fps: float
    length: int
    chunk: int = 0
    first_chunk: int = 0
    frames: int = 0
    meter: VideoMeter | None = None
    done: list[Window] = field(default_factory=list)

    def add(self, frame: Tensor) -> None:
        """One more frame."""
        if self.meter is None:
            self.meter = VideoMeter(self.fps, self.chunk, self._until_chunk())
        self.meter.add(frame)
        self.frames += 1
        if self.meter.frames == self.length:
            self._close()

    def windows(self) -> list[Window]:
        """All stretches. The last one counts if it has at least half the length."""
        if self.meter is not None and 2 * self.meter.frames >= self.length:
            self._close()
        return self.done

    def _close(self) -> None:
        assert self.meter is not None
        start = self.frames - self.meter.frames
        self.done.append(Window(start / self.fps, self.meter.frames, self.meter.numbers()))
        self.meter = None

    def _until_chunk(self) -> int:
        """Frames from here to where the next chunk begins."""
        if not self.chunk:
            return 0
        first = self.first_chunk or self.chunk
        if self.frames < first:
            return first - self.frames
        return self.chunk - (self.frames - first) % self.chunk
