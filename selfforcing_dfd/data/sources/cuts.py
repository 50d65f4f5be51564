"""Long videos as several clips each: consecutive windows of the needed length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from selfforcing_dfd.data.ahead import in_order
from selfforcing_dfd.data.source import ClipError, DamagedClipError, keys_of
from selfforcing_dfd.data.sources.listing import Clip, name_for_key, window_of
from selfforcing_dfd.data.sources.windows import even_windows

ScenesOf = Callable[[Path], Sequence[tuple[int, int]]]
"""First frame, and the one after the last, of each part of a video that windows may lie in.

Frames count at the rate at which they are read. Raises ClipError.
"""


def cut_clips(
    clips: Sequence[Clip], num_frames: int, scenes_of: ScenesOf, num_workers: int = 0
) -> tuple[list[Clip], int]:
    """The windows of each video, in order, and how many frames all videos have.

    A video without a window, or that cannot be read, stays one clip with a `problem`.
    """
    search = partial(_windows, num_frames=num_frames, scenes_of=scenes_of)
    found: list[Clip] = []
    total = 0
    with tqdm(total=len(clips), desc="cutting", unit="video", disable=None) as bar:
        for windows, frames in in_order(search, clips, num_workers):
            found += windows
            total += frames
            bar.update()
    keys = keys_of(map(name_for_key, found))
    return [replace(clip, key=key) for clip, key in zip(found, keys, strict=True)], total


def _windows(clip: Clip, num_frames: int, scenes_of: ScenesOf) -> tuple[list[Clip], int]:
    """The windows of one video, and its number of frames."""
    if clip.problem and not clip.windows:
        return [clip], 0
    try:
        scenes = scenes_of(clip.path)
    except ClipError as error:
        damaged = isinstance(error, DamagedClipError)
        return [replace(clip, problem=error.reason, damaged=damaged)], 0
    lengths = [end - first for first, end in scenes]
    starts = even_windows(scenes, num_frames)
    if not starts:
        longest = max(lengths, default=0)
        problem = f"no part of it has {num_frames} video frames, the longest has {longest}"
        return [replace(clip, problem=f"{problem}; ask for fewer or leave it out")], sum(lengths)
    return [window_of(clip, start) for start in starts], sum(lengths)
