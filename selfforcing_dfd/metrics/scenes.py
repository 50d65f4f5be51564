"""Where one scene of a video ends and the next begins, without learned weights.

A cut is a jump of the picture: two neighbouring frames that differ much, and much more than the
frames around them do. Fast motion and a moving camera raise all differences, a cut raises one.
Fades and dissolves are not found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median

import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from selfforcing_dfd.data.sources.cuts import ScenesOf
from selfforcing_dfd.data.sources.video import count_frames, decoded_frames, picture
from selfforcing_dfd.metrics.appearance import thumbnail

LEAST = 6.0  # mean difference of thumbnails, of 255
TIMES = 5.0  # as large as the median difference around it
AROUND = 8  # differences on either side
LOOKED_AT = (72, 128)  # height and width of the pictures that are compared


def scene_finder(cut: str, fps: Fraction | None) -> ScenesOf | None:
    """What finds the parts of a video that windows may lie in; None where files are not cut.

    cut: "windows" for whole files, "scenes", or an empty text.
    """
    ways = {"windows": partial(one_scene, fps=fps), "scenes": partial(scenes_in, fps=fps)}
    return ways.get(cut)


def one_scene(path: Path, fps: Fraction | None) -> list[tuple[int, int]]:
    """A whole file as one scene, by its time stamps. Raises ClipError."""
    return [(0, count_frames(path, fps))]


def scenes_in(path: Path, fps: Fraction | None) -> list[tuple[int, int]]:
    """The scenes of a file, which is decoded for it. fps: see `read_video`. Raises ClipError."""
    to_rgb = VideoReformatter()
    frames = (picture(frame, to_rgb, LOOKED_AT, "stretch") for frame in decoded_frames(path, fps))
    return scenes_of(torch.from_numpy(frame) for frame in frames)


def scenes_of(frames: Iterable[Tensor]) -> list[tuple[int, int]]:
    """First frame, and the one after the last, of each scene. frames: [H, W, 3] in 0 to 255."""
    differences = []
    before: Tensor | None = None
    for frame in frames:
        small = thumbnail(frame.float())
        if before is not None:
            differences.append(float((small - before).abs().mean()))
        before = small
    if before is None:
        return []
    begins = [0, *cuts(differences)]
    return list(zip(begins, [*begins[1:], len(differences) + 1], strict=True))


def cuts(differences: Sequence[float]) -> list[int]:
    """The frames that begin a scene; difference n is that of frames n and n + 1."""
    found = []
    for place, difference in enumerate(differences):
        around = [
            *differences[max(place - AROUND, 0) : place],
            *differences[place + 1 : place + 1 + AROUND],
        ]
        usual = median(around) if around else 0.0
        if difference >= LEAST and difference >= TIMES * usual:
            found.append(place + 1)
    return found
