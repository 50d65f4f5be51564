"""Frames of video files, through PyAV."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from selfforcing_dfd.data.source import ClipError, DamagedClipError

Resize = Literal["none", "cover", "stretch"]
STRICT = {"err_detect": "explode"}
"""FFmpeg's decoders stop at an error. By default they make up pictures in place of damaged ones."""

VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".m2v", ".ts"),
    *(".m2ts", ".mts", ".flv", ".wmv", ".asf", ".3gp", ".3g2", ".ogv", ".vob", ".mxf", ".y4m"),
)
"""Endings of videos. What a file holds is decided by FFmpeg."""
NO_VIDEO = "no video stream; want a file with pictures in it"


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
    they come, whatever their rate.

    Raises DamagedClipError if the file cannot be decoded without an error; ClipError if it is too
    short, has another size, changes it on the way, or is turned by its metadata; with fps, if its
    own rate is lower or unknown.
    """
    path = Path(path)
    frames = decoded_frames(path, fps)
    video = gathered(path.name, islice(frames, num_frames), size, resize)
    frames.close()
    if len(video) < num_frames:
        rate = "" if fps is None else f" at {float(fps):g} fps"
        problem = f"has {len(video)} video frames{rate}, want {num_frames}"
        raise ClipError(path.name, f"{problem}; ask for fewer or leave it out")
    return video


def gathered(
    name: str,
    frames: Iterable[av.VideoFrame],
    size: tuple[int, int] | None = None,
    resize: Resize = "none",
) -> Tensor:
    """Frames as uint8 [T, H, W, 3]. Raises ClipError for those of another size, or of several."""
    # one for all frames: `frame.to_ndarray` makes one for each, 5 times slower
    to_rgb = VideoReformatter()
    pictures: list[np.ndarray] = []
    sizes: set[tuple[int, int]] = set()
    for frame in frames:
        sizes.add((frame.height, frame.width))
        pictures.append(picture(frame, to_rgb, size, resize))
    if not pictures:
        return torch.empty(0, *(size or (0, 0)), 3, dtype=torch.uint8)
    if len(sizes) > 1:
        problem = "the frame size changes within the clip; encode it again at one size"
        raise ClipError(name, problem)
    if size and resize == "none":
        _check_size(name, sizes.pop(), size)
    return torch.from_numpy(np.stack(pictures))


def decoded_frames(path: Path, fps: Fraction | None = None) -> Generator[av.VideoFrame, None, None]:
    """The frames of the first video stream, one by one, at a rate if there is one.

    Raises ClipError as `read_video` does.
    """
    try:
        with opened(path) as container:
            yield from _frames(container, fps, path.name)
    except av.error.FFmpegError as error:
        problem = f"cannot be read as video ({error.strerror}); encode it again or leave it out"
        raise DamagedClipError(path.name, problem) from error


def count_frames(path: Path, fps: Fraction | None = None) -> int:
    """How many frames a file states to have, at a rate if there is one; nothing is decoded.

    Files whose packets have no time stamps are decoded after all. Raises ClipError.
    """
    try:
        with opened(path) as container:
            if not container.streams.video:
                raise ClipError(path.name, NO_VIDEO)
            packets = (packet for packet in container.demux(video=0) if packet.size)
            stamps = [Stamp(packet.pts, packet.time_base) for packet in packets]
    except av.error.FFmpegError as error:
        problem = f"cannot be read as video ({error.strerror}); encode it again or leave it out"
        raise DamagedClipError(path.name, problem) from error
    if any(stamp.pts is None for stamp in stamps):
        return sum(1 for _ in decoded_frames(path, fps))
    stamps.sort(key=lambda stamp: stamp.pts or 0)
    return len(stamps) if fps is None else sum(1 for _ in at_rate(stamps, fps, path.name))


def frames_stated(path: Path, fps: Fraction | None) -> int:
    """What the head of a file says of its number of frames, at a rate; 0 where it says nothing."""
    with opened(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        return round(stream.frames * fps / rate) if fps and rate else stream.frames


def _frames(container: Any, fps: Fraction | None, name: str) -> Iterator[av.VideoFrame]:
    """The frames of the first video stream, at a rate if there is one."""
    if not container.streams.video:
        raise ClipError(name, NO_VIDEO)
    decoded = decoded_strictly(container, name)
    for frame in decoded if fps is None else at_rate(decoded, fps, name):
        if frame.rotation:
            raise ClipError(
                name,
                f"is turned by {frame.rotation} degrees in its metadata, which is not followed "
                f"here; ffmpeg -i {name} NEW.mp4 turns the pictures",
            )
        yield frame


def opened(path: Path | str) -> Any:
    """A file of video. Titles and the like, which nobody reads here, may be in any letters."""
    return av.open(str(path), metadata_errors="replace")


def decoded_strictly(container: Any, name: str) -> Iterator[av.VideoFrame]:
    """The frames of the first video stream.

    ClipError for a frame that the decoder had to make up, and for a coding that FFmpeg has no
    decoder for, as damaged names of codings are.
    """
    decoder = container.streams.video[0].codec_context
    if decoder is None:
        raise ClipError(name, "its video has an unknown coding; encode it again or leave it out")
    decoder.options = STRICT
    for frame in container.decode(video=0):
        if frame.is_corrupt:
            raise DamagedClipError(name, "is damaged; encode it again or leave it out")
        yield frame


def rate_of(path: Path | str) -> Fraction | None:
    """Frames a second that a file states for its video; None for a file that states none."""
    try:
        with opened(path) as container:
            found = container.streams.video[:1]
            return found[0].average_rate if found else None
    except (av.error.FFmpegError, OSError):
        return None


def _check_size(name: str, got: tuple[int, int], wanted: tuple[int, int]) -> None:
    if got == wanted:
        return
    height, width = wanted
    fill = f"scale={width}:{height}:force_original_aspect_ratio=increase,crop={width}:{height}"
    raise ClipError(
        name,
        f"is {got[0]}x{got[1]} (height x width), want {height}x{width}; "
        f'ffmpeg -i {name} -vf "{fill}" NEW.mp4, or pack with --resize cover',
    )


class Stamped(Protocol):
    """A frame, or what stands for it, with its time."""

    @property
    def pts(self) -> int | None: ...

    @property
    def time_base(self) -> Fraction | None: ...


class Stamp(NamedTuple):
    """The time of a frame that is not decoded."""

    pts: int | None
    time_base: Fraction | None


StampedType = TypeVar("StampedType", bound=Stamped)


def at_rate(frames: Iterable[StampedType], fps: Fraction, name: str) -> Iterator[StampedType]:
    """The frame nearest to each of the times start + k / fps; of two as near, the earlier.

    No frame is taken twice. Raises ClipError where the clip's own rate is lower than fps, since
    repeated frames would teach motion that stutters, and for frames without time stamps.
    """
    start = Fraction(0)
    count = 0
    before: tuple[Fraction, StampedType] | None = None
    taken = False
    for frame in frames:
        if frame.pts is None or frame.time_base is None:
            problem = "its frames have no time stamps; use --fps all, or encode it again"
            raise ClipError(name, problem)
        time = frame.pts * frame.time_base
        start = time if before is None else start
        while before is not None and (wanted := start + count / fps) - before[0] <= time - wanted:
            if taken:
                problem = (
                    f"has fewer than {float(fps):g} frames a second at "
                    f"{float(before[0] - start):.2f} s, and frames are not repeated"
                )
                raise ClipError(name, f"{problem}; ask for a lower --fps, or for --fps all")
            yield before[1]
            taken = True
            count += 1
        before = (time, frame)
        taken = False
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
        height = max(size[0], round(scale * frame.height))
        width = max(size[1], round(scale * frame.width))
    else:
        height, width = size
    whole = to_rgb.reformat(
        frame, width=width, height=height, format="rgb24", threads=1
    ).to_ndarray()
    top = (height - size[0]) // 2
    left = (width - size[1]) // 2
    return whole[top : top + size[0], left : left + size[1]]


def read_last_frames(path: Path | str, max_frames: int, size: tuple[int, int]) -> Tensor:
    """The last 1 + 4 n <= max_frames video frames of a clip, or a picture, uint8 [T, H, W, 3].

    Scaled and cropped to fill `size`, height and width. Raises ClipError if the file cannot be
    decoded or holds no picture.
    """
    path = Path(path)
    frames: deque[np.ndarray] = deque(maxlen=max_frames)
    to_rgb = VideoReformatter()
    try:
        with opened(path) as container:
            for frame in decoded_strictly(container, path.name):
                frames.append(picture(frame, to_rgb, size, "cover"))
    except (av.error.FFmpegError, IndexError, FileNotFoundError) as error:
        problem = f"cannot be read as picture or video ({error}); convert it to png or mp4"
        raise ClipError(path.name, problem) from error
    if not frames:
        raise ClipError(path.name, "holds no picture; want at least one video frame")
    kept = list(frames)[(len(frames) - 1) % 4 :]
    return torch.from_numpy(np.stack(kept))
