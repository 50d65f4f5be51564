"""Video files in and out, through PyAV."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from selfforcing_dfd.common import UserError

Resize = Literal["none", "cover", "stretch"]


class ClipError(UserError):
    """A clip that cannot be used; the message begins with the file's name."""


def read_video(
    path: Path | str,
    num_frames: int,
    size: tuple[int, int] | None = None,
    resize: Resize = "none",
    fps: Fraction | None = None,
) -> Tensor:
    """The first `num_frames` video frames, uint8 [T, H, W, 3].

    size: height and width, which the clip must have with resize "none"; "cover" scales it to fill
    them and crops what sticks out evenly on both sides, "stretch" changes its proportions. fps:
    take frames at this rate by their time stamps (see `at_rate`); without it, frames are taken as
    they come, whatever their rate. ClipError: the file cannot be decoded, is too short, has another
    size, changes it on the way, or is turned by 90 degrees in its metadata; with fps, its own rate
    is lower or unknown.
    """
    path = Path(path)
    frames: list[np.ndarray] = []
    sizes: set[tuple[int, int]] = set()
    # one for all frames: `frame.to_ndarray` makes one for each, 5 times slower
    to_rgb = VideoReformatter()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ClipError(f"{path.name}: no video stream; want a file with pictures in it")
            decoded = container.decode(video=0)
            for frame in islice(
                decoded if fps is None else at_rate(decoded, fps, path.name), num_frames
            ):
                if frame.rotation:
                    turned = f"is turned by {frame.rotation} degrees in its metadata, which is not followed here"
                    raise ClipError(
                        f"{path.name}: {turned}; ffmpeg -i {path.name} NEW.mp4 turns the pictures"
                    )
                sizes.add((frame.height, frame.width))
                frames.append(picture(frame, to_rgb, size, resize))
    except av.error.FFmpegError as error:
        reason = f"cannot be read as video ({error.strerror})"
        raise ClipError(f"{path.name}: {reason}; encode it again or leave it out") from error
    if len(frames) < num_frames:
        rate = "" if fps is None else f" at {float(fps):g} fps"
        raise ClipError(
            f"{path.name}: has {len(frames)} video frames{rate}, want {num_frames}; ask for fewer or leave it out"
        )
    if len(sizes) > 1:
        raise ClipError(
            f"{path.name}: the frame size changes within the clip; encode it again at one size"
        )
    height, width = next(iter(sizes))
    if size and resize == "none" and size != (height, width):
        scale = f"scale={size[1]}:{size[0]}:force_original_aspect_ratio=increase,crop={size[1]}:{size[0]}"
        wanted = f'want {size[0]}x{size[1]}; ffmpeg -i {path.name} -vf "{scale}" NEW.mp4, or pack with --resize cover'
        raise ClipError(f"{path.name}: is {height}x{width} (height x width), {wanted}")
    return torch.from_numpy(np.stack(frames))


def at_rate(frames: Iterable[av.VideoFrame], fps: Fraction, name: str) -> Iterator[av.VideoFrame]:
    """Of frames with time stamps, the one nearest to each of the times start + k / fps; of two as
    near, the earlier.

    No frame is taken twice: ClipError where the clip's own rate is lower than fps, since repeated
    frames would teach motion that stutters. ClipError also for frames without time stamps.
    """
    start, count = Fraction(0), 0
    before: tuple[Fraction, av.VideoFrame] | None = None
    taken = False
    for frame in frames:
        if frame.pts is None or frame.time_base is None:
            raise ClipError(
                f"{name}: its frames have no time stamps; leave out --fps, or encode it again"
            )
        time = frame.pts * frame.time_base
        start = time if before is None else start
        while before is not None and (wanted := start + count / fps) - before[0] <= time - wanted:
            if taken:
                slow = f"has fewer than {float(fps):g} frames a second at {float(before[0] - start):.2f} s"
                raise ClipError(
                    f"{name}: {slow}, and frames are not repeated; ask for a lower --fps"
                )
            yield before[1]
            taken, count = True, count + 1
        before, taken = (time, frame), False
    if before is not None and start + count / fps - before[0] < 1 / (2 * fps):
        yield before[1]


def picture(
    frame: av.VideoFrame, to_rgb: VideoReformatter, size: tuple[int, int] | None, resize: Resize
) -> np.ndarray:
    """A frame as uint8 [H, W, 3], as it is or at `size`."""
    if size is None or resize == "none":
        return to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
    if resize == "cover":
        scale = max(size[0] / frame.height, size[1] / frame.width)
        height, width = (
            max(size[0], round(scale * frame.height)),
            max(size[1], round(scale * frame.width)),
        )
    else:
        height, width = size
    whole = to_rgb.reformat(
        frame, width=width, height=height, format="rgb24", threads=1
    ).to_ndarray()
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return whole[top : top + size[0], left : left + size[1]]


def read_last_frames(path: Path | str, max_frames: int, size: tuple[int, int]) -> Tensor:
    """The last 1 + 4 n <= max_frames video frames of a clip, or a picture, scaled and cropped to
    fill `size`.

    uint8 [T, H, W, 3]; size: height and width. ClipError: the file cannot be decoded or holds no
    picture.
    """
    path = Path(path)
    frames: deque[np.ndarray] = deque(maxlen=max_frames)
    to_rgb = VideoReformatter()
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                frames.append(picture(frame, to_rgb, size, "cover"))
    except (av.error.FFmpegError, IndexError, FileNotFoundError) as error:
        raise ClipError(
            f"{path.name}: cannot be read as picture or video ({error}); convert it to png or mp4"
        ) from error
    if not frames:
        raise ClipError(f"{path.name}: holds no picture; want at least one video frame")
    kept = list(frames)[(len(frames) - 1) % 4 :]
    return torch.from_numpy(np.stack(kept))


def write_video(path: Path | str, frames: Tensor, fps: float) -> None:
    """Write uint8 [T, H, W, 3] as a high-quality progressive mp4 that starts playing before it is
    fully loaded.

    H and W must be even, as 4:2:0 chroma needs. The file appears complete or not at all. The same
    frames give the same file: x264 with one thread and without macroblock trees, whose AVX-512 code
    gives another file every few runs.
    """
    path = Path(path)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        got = f"{frames.dtype} {tuple(frames.shape)}"
        raise ValueError(
            f"{path.name}: frames are {got}, want torch.uint8 [T, H, W, 3] with T >= 1"
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"{path.name}: frames are {height}x{width}, want even height and width; crop or pad them"
        )
    partial = path.with_name(path.name + ".partial")
    with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        options = {"crf": "10", "preset": "medium", "x264-params": "mbtree=0"}
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options=options
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in frames.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    os.replace(partial, path)
