"""Several clips of one long video: where they begin, and reading them without decoding it twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import av
from torch import Tensor

from selfforcing_dfd.data.source import ClipError

MOST_OPEN = 4  # videos at once
MOST_WAITING = 4  # windows of a video that were decoded and not asked for yet

Frames = Iterator[av.VideoFrame]


def even_windows(scenes: Sequence[tuple[int, int]], num_frames: int) -> list[int]:
    """First frames of all windows of `num_frames` that fit into scenes, one after the other.

    scenes: first frame and the one after the last, in order.
    """
    starts = [range(first, end - num_frames + 1, num_frames) for first, end in scenes]
    return [start for part in starts for start in part]


class WindowReader:
    """Windows of videos, for threads that ask for them roughly in order.

    Each video is decoded from its beginning and only on, so that frames are those of a reader that
    takes all of them. A window that lies behind is read by starting again.
    """

    def __init__(
        self,
        frames_of: Callable[[Path], Frames],
        gather: Callable[[Path, Frames], Tensor],
        num_frames: int,
    ) -> None:
        """frames_of: all frames of a video. gather: those of a window as uint8 [T, H, W, 3].

        gather may leave some frames of each window out.
        """
        self._frames_of = frames_of
        self._gather = gather
        self._num_frames = num_frames
        self._open: OrderedDict[Path, _OpenVideo] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> tuple[Any, ...]:
        """For another process, which opens videos of its own."""
        return self._frames_of, self._gather, self._num_frames

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._frames_of, self._gather, self._num_frames = state
        self._open = OrderedDict()
        self._lock = Lock()

    def read(self, path: Path, first: int) -> Tensor:
        """uint8 [T, H, W, 3] from frame `first` on. Raises ClipError."""
        with self._lock:
            if path not in self._open:
                self._open[path] = _OpenVideo(
                    path.name,
                    lambda: self._frames_of(path),
                    lambda frames: self._gather(path, frames),
                )
            video = self._open[path]
            self._open.move_to_end(path)
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        return video.window(first, self._num_frames)


class Counted:
    """Frames that are counted as they go by."""

    def __init__(self, frames: Iterator[av.VideoFrame]) -> None:
        self.number = 0
        self._frames = frames

    def __iter__(self) -> Iterator[av.VideoFrame]:
        return self

    def __next__(self) -> av.VideoFrame:
        frame = next(self._frames)
        self.number += 1
        return frame


class _OpenVideo:
    """A video that is being decoded, for one thread at a time."""

    def __init__(
        self, name: str, start: Callable[[], Frames], gather: Callable[[Frames], Tensor]
    ) -> None:
        self._name = name
        self._start = start
        self._gather = gather
        self._lock = Lock()
        self._frames = start()
        self._position = 0
        self._failure: ClipError | None = None
        self._waiting: OrderedDict[int, Tensor] = OrderedDict()

    def window(self, first: int, num_frames: int) -> Tensor:
        """The frames from `first` on. Raises ClipError where the video ends before the last.

        Windows that are passed on the way are kept for a moment: another thread asks for them.
        """
        with self._lock:
            if first in self._waiting:
                return self._waiting.pop(first)
            if first < self._position:
                self._frames = self._start()
                self._position = 0
                self._failure = None
            while self._position + MOST_WAITING * num_frames < first:
                self._skip(num_frames)
            while self._position + num_frames <= first:
                passed = self._position
                self._waiting[passed] = self._take(num_frames)
                if len(self._waiting) > MOST_WAITING:
                    self._waiting.popitem(last=False)
            self._skip(first - self._position)
            return self._take(num_frames)

    def _take(self, number: int) -> Tensor:
        self._check()
        first = self._position
        self._position += number
        counted = Counted(islice(self._frames, number))
        try:
            window = self._gather(counted)
        except ClipError as error:
            self._failure = error
            raise
        if counted.number < number:
            problem = f"has {counted.number} video frames from frame {first} on, want {number}"
            raise ClipError(self._name, f"{problem}; leave it out")
        return window

    def _skip(self, number: int) -> None:
        self._check()
        self._position += number
        try:
            for _ in islice(self._frames, number):
                continue
        except ClipError as error:
            self._failure = error
            raise

    def _check(self) -> None:
        """What stopped the decoder stops all later windows too."""
        if self._failure is not None:
            raise self._failure
