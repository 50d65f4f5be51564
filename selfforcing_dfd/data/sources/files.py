"""Clips with captions, from a folder or a list file, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import av
from torch import Tensor

from selfforcing_dfd.data.levels import Level, levels_of
from selfforcing_dfd.data.source import ClipError, DamagedClipError, Item, Source, Video
from selfforcing_dfd.data.sources.cuts import ScenesOf, cut_clips
from selfforcing_dfd.data.sources.listing import (
    TEXTS,
    chosen_clips,
    files_in,
    list_clips,
    list_hash,
)
from selfforcing_dfd.data.sources.video import (
    VIDEOS,
    Resize,
    decoded_frames,
    frames_stated,
    gathered,
    read_video,
)
from selfforcing_dfd.data.sources.windows import WindowReader


class FileSource(Source):
    """Video files. See `list_clips` for where clips and captions lie.

    Of each file its first frames are taken, or with `cut` all windows of that length.
    """

    def __init__(
        self,
        path: Path | str,
        num_video_frames: int,
        video_size: tuple[int, int],
        *,
        resize: Resize = "none",
        fps: Fraction | None = None,
        caption_suffix: str = ".txt",
        captions: Path | None = None,
        recursive: bool = False,
        levels: Sequence[Level] = (),
        cut: ScenesOf | None = None,
        cut_name: str = "",
        num_workers: int = 0,
        chosen: Sequence[str] | None = None,
    ) -> None:
        """video_size: height and width. resize, fps: see `read_video`. PackError: no clips.

        caption_suffix, captions, recursive, levels: see `list_clips`. cut: see `cut_clips`, with
        num_workers; cut_name: how the index calls it. chosen: names of the only clips that are
        taken, see `chosen_clips`; without `cut`.
        """
        self.path = Path(path)
        self.num_video_frames = num_video_frames
        self.video_size = video_size
        self.resize = resize
        self.fps = fps
        self.recursive = recursive
        self.cut_name = cut_name
        self.clips = list_clips(path, caption_suffix, captions, recursive, levels)
        self.num_files = len(self.clips)
        self.num_frames = 0
        if chosen is not None:
            self.clips = chosen_clips(self.clips, chosen)
        elif cut is not None:
            cut_up = cut_clips(self.clips, num_video_frames, cut, num_workers)
            self.clips, self.num_frames = cut_up
        self._windows = WindowReader(self._frames_of, self._gather, num_video_frames)

    @property
    def title(self) -> str:
        return str(self.path)

    @cached_property
    def names(self) -> list[str]:
        return [clip.name for clip in self.clips]

    @property
    def keys(self) -> list[str]:
        return [clip.key for clip in self.clips]

    @cached_property
    def about(self) -> dict[str, Any]:
        about = {"num_clips": len(self.clips), "sha256": list_hash(self.clips)}
        if not self.cut_name:
            return about
        windows = sum(clip.first is not None for clip in self.clips)
        used = windows * self.num_video_frames
        frames = {"offered": self.num_frames, "in_windows": used}
        return {**about, "num_files": self.num_files, "frames": frames}

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        return levels_of(level for clip in self.clips for level in clip.captions)

    @property
    def settings(self) -> dict[str, Any]:
        height, width = self.video_size
        cut = {"cut": self.cut_name} if self.cut_name else {}
        return {
            "num_video_frames": self.num_video_frames,
            "height": height,
            "width": width,
            "fps": None if self.fps is None else str(self.fps),
            "resize": self.resize,
            **cut,
        }

    @property
    def holds(self) -> Video:
        return Video((self.num_video_frames, *self.video_size))

    @cached_property
    def skipped(self) -> list[str]:
        """Files of a folder that are neither videos nor text, by their endings."""
        if not self.path.is_dir():
            return []
        known = (*VIDEOS, *TEXTS)
        found = files_in(self.path, self.recursive)
        others = [path for path in found if path.suffix.lower() not in known]
        return sorted(path.relative_to(self.path).as_posix() for path in others)

    def read(self, number: int) -> Item:
        clip = self.clips[number]
        if clip.problem:
            kind = DamagedClipError if clip.damaged else ClipError
            raise kind(clip.name, clip.problem)
        video = self.read_video(number)
        left = 0
        if clip.first is None:
            left = max(frames_stated(clip.path, self.fps) - len(video), 0)
        return Item(clip.caption, video, captions=clip.captions, frames_left=left)

    def read_video(self, number: int) -> Tensor:
        """uint8 [T, H, W, 3], whether the clip has a caption or not. Raises ClipError."""
        clip = self.clips[number]
        if clip.first is not None:
            return self._windows.read(clip.path, clip.first)
        size = self.video_size
        return read_video(clip.path, self.num_video_frames, size, self.resize, self.fps)

    def _frames_of(self, path: Path) -> Iterator[av.VideoFrame]:
        return decoded_frames(path, self.fps)

    def _gather(self, path: Path, frames: Iterator[av.VideoFrame]) -> Tensor:
        return gathered(path.name, frames, self.video_size, self.resize)
