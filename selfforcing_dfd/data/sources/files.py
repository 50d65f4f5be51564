"""Clips with captions, from a folder or a list file, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from selfforcing_dfd.data.levels import Level, levels_of
from selfforcing_dfd.data.source import ClipError, Item, Source, Video
from selfforcing_dfd.data.sources.listing import CLIP, TEXTS, files_in, list_clips, list_hash
from selfforcing_dfd.data.sources.video import Resize, rate_of, read_video


class FileSource(Source):
    """Video files, of each its first frames. See `list_clips` for where clips and captions lie."""

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
    ) -> None:
        """video_size: height and width. resize, fps: see `read_video`. PackError: no clips.

        caption_suffix, captions, recursive, levels: see `list_clips`.
        """
        self.path = Path(path)
        self.num_video_frames = num_video_frames
        self.video_size = video_size
        self.resize = resize
        self.fps = fps
        self.recursive = recursive
        self.clips = list_clips(path, caption_suffix, captions, recursive, levels)

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
        return {"num_clips": len(self.clips), "sha256": list_hash(self.clips)}

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        return levels_of(level for clip in self.clips for level in clip.captions)

    @property
    def settings(self) -> dict[str, Any]:
        height, width = self.video_size
        return {
            "num_video_frames": self.num_video_frames,
            "height": height,
            "width": width,
            "fps": None if self.fps is None else str(self.fps),
            "resize": self.resize,
        }

    @property
    def holds(self) -> Video:
        return Video((self.num_video_frames, *self.video_size))

    @cached_property
    def skipped(self) -> list[str]:
        """Files of a folder that are neither clips nor text, such as videos in other formats."""
        if not self.path.is_dir():
            return []
        return sorted(
            path.relative_to(self.path).as_posix()
            for path in files_in(self.path, self.recursive)
            if path.suffix.lower() not in (CLIP, *TEXTS)
        )

    def other_rate(self, fps: int) -> str:
        """A warning if frames are taken as they come, and the first clip's rate is not `fps`."""
        rate = None if self.fps is not None else rate_of(self.clips[0].path)
        if rate is None or abs(rate - fps) < 1:
            return ""
        return (
            f"{self.clips[0].name} has {float(rate):g} frames a second, and models {fps}: motion "
            f"would be {float(rate / fps):.2g} times as fast. --fps {fps} takes frames by their "
            "time stamps"
        )

    def read(self, number: int) -> Item:
        clip = self.clips[number]
        if clip.problem:
            raise ClipError(clip.name, clip.problem)
        return Item(clip.caption, self.read_video(number), captions=clip.captions)

    def read_video(self, number: int) -> Tensor:
        """uint8 [T, H, W, 3], whether the clip has a caption or not. Raises ClipError."""
        path = self.clips[number].path
        return read_video(path, self.num_video_frames, self.video_size, self.resize, self.fps)
