"""Which clips curation looks at, and the frames of each: files, or windows of long files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.data.sources.cuts import cut_clips
from selfforcing_dfd.data.sources.listing import Clip, list_clips
from selfforcing_dfd.data.sources.video import decoded_frames, picture
from selfforcing_dfd.data.sources.windows import Counted, WindowReader
from selfforcing_dfd.metrics.scenes import scene_finder


@dataclass(frozen=True, slots=True)
class Looks:
    """Which frames of a clip are shown: of its first `num_frames` at a rate, as `pack` takes them.

    longest: side in pixels; larger pictures are scaled down. 0: none is.
    """

    num_frames: int
    fps: Fraction | None
    longest: int = 512


@dataclass(frozen=True, slots=True)
class Intake:
    """The clips of a source, cut as `pack` cuts them. Captions do not matter here.

    source: a folder or a list. cut: empty, "windows" or "scenes".
    """

    source: Path
    num_frames: int
    fps: Fraction | None
    recursive: bool = False
    cut: str = ""

    def clips(self, num_workers: int = 0) -> list[Clip]:
        """All of them in order. Those that cannot be read have a `problem`. PackError: no clips."""
        listed = list(map(without_captions, list_clips(self.source, recursive=self.recursive)))
        find = scene_finder(self.cut, self.fps)
        if find is None:
            return listed
        return cut_clips(listed, self.num_frames, find, num_workers)[0]

    def to_fields(self) -> dict[str, Any]:
        """All but the source, for JSON."""
        return {
            "num_frames": self.num_frames,
            "fps": None if self.fps is None else str(self.fps),
            "recursive": self.recursive,
            "cut": self.cut,
        }


def without_captions(clip: Clip) -> Clip:
    """A clip as curation sees it: a missing caption is no problem, a missing file is one."""
    problem = "" if clip.path.is_file() else "no such file"
    return replace(clip, caption="", captions={}, windows={}, problem=problem)


def by_file(clips: Sequence[Clip]) -> list[list[Clip]]:
    """Neighbouring clips of one file together, so that the file is decoded once."""
    return [list(group) for _, group in groupby(clips, key=lambda clip: clip.path)]


class FrameReader:
    """The frames of clips at a few places. Safe to share between threads."""

    def __init__(self, looks: Looks, places: Sequence[int]) -> None:
        """places: of frames in a clip, in order."""
        self.looks = looks
        self.places = frozenset(places)
        self._windows = WindowReader(self._frames_of, self._gather, looks.num_frames)

    def read(self, clip: Clip) -> Tensor:
        """uint8 [places, H, W, 3]. Raises ClipError."""
        if clip.problem:
            raise ClipError(clip.name, clip.problem)
        if clip.first is not None:
            return self._windows.read(clip.path, clip.first)
        wanted = self.looks.num_frames
        frames = decoded_frames(clip.path, self.looks.fps)
        counted = Counted(islice(frames, wanted))
        found = self._gather(clip.path, counted)
        frames.close()
        if counted.number < wanted:
            problem = f"has {counted.number} video frames, want {wanted}"
            raise ClipError(clip.name, f"{problem}; ask for fewer or leave it out")
        return found

    def _frames_of(self, path: Path) -> Iterator[av.VideoFrame]:
        return decoded_frames(path, self.looks.fps)

    def _gather(self, path: Path, frames: Iterator[av.VideoFrame]) -> Tensor:
        """The frames that are wanted. Every one is decoded, so that damage is found."""
        to_rgb = VideoReformatter()
        wanted = (frame for place, frame in enumerate(frames) if place in self.places)
        pictures = [picture(frame, to_rgb, self._size(frame), "stretch") for frame in wanted]
        if len({one.shape for one in pictures}) > 1:
            problem = "the frame size changes within the clip; encode it again at one size"
            raise ClipError(path.name, problem)
        return torch.from_numpy(np.stack(pictures)) if pictures else torch.empty(0)

    def _size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Height and width, so that the longer one is not too long."""
        shrink = max(frame.height, frame.width) / (self.looks.longest or math.inf)
        if shrink <= 1:
            return frame.height, frame.width
        return max(round(frame.height / shrink), 1), max(round(frame.width / shrink), 1)
