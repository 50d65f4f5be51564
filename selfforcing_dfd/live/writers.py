"""Outputs of a stream: an mp4 that plays while it grows, or raw frames (y4m) for a pipe."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Protocol, Self

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from torch import Tensor

from selfforcing_dfd.common import UserError

Frames = Tensor | np.ndarray

KNOWN_OUTPUTS = "NAME.mp4, NAME.y4m, or - for y4m on stdout"
ENCODER = {
    "preset": "veryfast",
    "tune": "zerolatency",
    "crf": "18",
    "forced-idr": "1",
    "sc_threshold": "0",
}
ENDLESS_GOP = 2**30  # keyframes come where they are asked for, and nowhere else
SMPTE170M = 6  # the matrix of BT.601 in the file's tags (ISO/IEC 23091-2)
FRAGMENT = {
    "movflags": "empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",  # else a fragment on its own is moved to time zero
    "use_editlist": "0",
}


class OutputError(UserError):
    """An output or frames that cannot be written; the message says why and what to do."""


class ReaderGone(Exception):
    """The program at the other end of the pipe has closed it: a normal end of a stream."""


class Writer(Protocol):
    """Takes the chunks of one stream in order; a context manager that closes itself."""

    def write(self, frames: Frames) -> None:
        """Video frames uint8 [T, H, W, 3], the same size in every call; T = 0 writes nothing."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OutputFile:
    """A new file, made at the first write.

    So a stream that never starts leaves no empty file and keeps an old one. Raises OutputError at
    once if the file exists and may not be replaced, or cannot be written.
    """

    def __init__(self, path: Path | str, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        self._file: BinaryIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error
        if self.path.is_dir():
            raise OutputError(f"{self.path} is a folder; give a file: {KNOWN_OUTPUTS}")
        if self.path.exists() and not overwrite:
            raise OutputError(
                f"{self.path} exists; choose another name, or replace it with --overwrite"
            )
        if not os.access(self.path if self.path.exists() else self.path.parent, os.W_OK):
            raise OutputError(
                f"{self.path} cannot be written (no permission); choose another place"
            )

    def write(self, data: bytes) -> None:
        """Append and give the data to the operating system, so that it outlives this process."""
        if self._file is None:
            try:
                self._file = self.path.open("wb" if self._overwrite else "xb")
            except OSError as error:
                raise self._refused(error) from error
        self._file.write(data)
        self._file.flush()

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path} cannot be written ({error.strerror}); choose another place"
        )


class Mp4Writer(Writer):
    """A fragmented mp4 (H.264, 4:2:0, BT.601) that can be played while it is written.

    Each write appends one whole fragment that begins with a keyframe. The file plays at any time
    with every chunk written so far, also after `kill -9`; closing it adds nothing. The encoder
    holds no frames back: it uses no B-frames and no lookahead. Raises OutputError for an existing
    file without `overwrite`, for odd sizes and for frames that are not uint8 [T, H, W, 3] of one
    size.
    """

    def __init__(self, path: Path | str, fps: float, overwrite: bool = False) -> None:
        self._file = OutputFile(path, overwrite)
        self._fps = frame_rate(fps)
        self._fragments: FragmentEncoder | None = None

    def write(self, frames: Frames) -> None:
        pictures = as_pictures(frames)
        if not len(pictures):
            return
        if self._fragments is None:
            self._fragments = FragmentEncoder(pictures.shape[1:3], self._fps)
        self._file.write(self._fragments.encode(pictures))

    def close(self) -> None:
        self._file.close()


class FragmentEncoder:
    """Turns pictures into the bytes of an mp4 stream; the first bytes carry the header.

    FFmpeg's muxer keeps a fragment back until the next one begins. That costs one chunk of latency
    and, at a kill, that chunk. So each chunk has a muxer of its own, which is told its time, and
    one encoder serves all of them. A browser's MSE takes the fragments as well.
    """

    def __init__(self, size: tuple[int, int], fps: Fraction) -> None:
        self.size = size
        self._fps = fps
        require_even(size)
        self._num_frames = 0
        self._num_fragments = 0
        self._to_yuv = yuv_converter()
        # encodes, and writes nothing that is used
        self._parent = av.open(io.BytesIO(), "w", format="mp4")
        self._stream = self._parent.add_stream(
            "libx264", rate=fps, options={**ENCODER, "g": str(ENDLESS_GOP)}
        )
        self._stream.height, self._stream.width, self._stream.pix_fmt = *size, "yuv420p"
        self._stream.time_base = 1 / fps
        context = self._stream.codec_context
        context.color_range = int(ColorRange.MPEG)
        context.colorspace = SMPTE170M
        self._parent.start_encoding()

    def encode(self, pictures: np.ndarray) -> bytes:
        """One fragment of T >= 1 pictures uint8 [T, H, W, 3]."""
        require_size(pictures, self.size)
        self._num_fragments += 1
        buffer = io.BytesIO()
        options = {**FRAGMENT, "fragment_index": str(self._num_fragments)}
        with av.open(buffer, "w", format="mp4", options=options) as container:
            stream = container.add_stream_from_template(self._stream)
            stream.time_base = 1 / self._fps
            packets = [
                packet for frame in self._frames(pictures) for packet in self._stream.encode(frame)
            ]
            assert len(packets) == len(pictures), (
                f"the encoder kept {len(pictures) - len(packets)} video frames back"
            )
            for packet in packets:
                packet.stream = stream
                container.mux(packet)
        data = buffer.getvalue()
        return data if self._num_fragments == 1 else data[offset_of_box(data, b"moof") :]

    def _frames(self, pictures: np.ndarray) -> Iterator[av.VideoFrame]:
        for i, picture in enumerate(pictures):
            frame = self._to_yuv(picture)
            frame.pts = self._num_frames
            frame.time_base = 1 / self._fps
            frame.pict_type = PictureType.NONE if i else PictureType.I
            self._num_frames += 1
            yield frame


class Y4mWriter(Writer):
    """Raw video frames into a binary stream, for ffmpeg or a player.

    A header, then 4:2:0 frames in BT.601 limited range. Raises ReaderGone when the reader has
    closed the pipe, OutputError for odd sizes and for frames as in `Mp4Writer`.
    """

    def __init__(self, stream: BinaryIO | OutputFile, fps: float) -> None:
        self._stream = stream
        self._fps = frame_rate(fps)
        self._size: tuple[int, int] | None = None
        self._to_yuv = yuv_converter()
        self._is_gone = False

    def write(self, frames: Frames) -> None:
        pictures = as_pictures(frames)
        if not len(pictures):
            return
        try:
            size = self._size or self._begin(pictures.shape[1:3])
            require_size(pictures, size)
            for picture in pictures:
                self._stream.write(b"FRAME\n" + self._to_yuv(picture).to_ndarray().tobytes())
            self._stream.flush()
        except BrokenPipeError as error:
            self._is_gone = True
            raise ReaderGone("the reader has closed the pipe") from error

    def close(self) -> None:
        if self._is_gone:
            # frames that it still holds have nowhere to go; `write` has said so
            with suppress(BrokenPipeError):
                self._stream.close()
        else:
            self._stream.close()

    def _begin(self, size: tuple[int, int]) -> tuple[int, int]:
        """Write the header; the size is that of all pictures."""
        require_even(size)
        self._size = size
        height, width = size
        rate = f"{self._fps.numerator}:{self._fps.denominator}"
        header = f"YUV4MPEG2 W{width} H{height} F{rate} Ip A1:1 C420jpeg XCOLORRANGE=LIMITED\n"
        self._stream.write(header.encode())
        return size


def open_writer(out: str, fps: float, overwrite: bool = False) -> Writer:
    """The writer for a name of KNOWN_OUTPUTS. Raises OutputError for others and for a terminal."""
    if out == "-":
        return Y4mWriter(own_stdout(), fps)
    match Path(out).suffix.lower():
        case ".mp4":
            return Mp4Writer(out, fps, overwrite)
        case ".y4m":
            return Y4mWriter(OutputFile(out, overwrite), fps)
    raise OutputError(f"output {out!r} is not known; use {KNOWN_OUTPUTS}")


def own_stdout() -> BinaryIO:
    """A second handle of stdout: at its end Python complains about a broken pipe in the first."""
    if sys.stdout is None:
        raise OutputError(
            "stdout is closed; connect it to a pipe or a file, or name a file instead of -"
        )
    if sys.stdout.isatty():
        raise OutputError(
            "stdout is a terminal, which shows raw frames as noise; "
            "pipe them: ... --out - | ffplay -"
        )
    return os.fdopen(os.dup(sys.stdout.fileno()), "wb")


def as_pictures(frames: Frames) -> np.ndarray:
    """The frames on the host. Raises OutputError if they are not uint8 [T, H, W, 3]."""
    pictures = frames.cpu().numpy() if isinstance(frames, Tensor) else frames
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise OutputError(f"frames are {pictures.dtype} {pictures.shape}; want uint8 [T, H, W, 3]")
    return pictures


def require_even(size: tuple[int, int]) -> None:
    height, width = size
    if height % 2 or width % 2:
        raise OutputError(
            f"video frames are {height}x{width} (height x width); 4:2:0 needs even "
            "sizes: crop or pad them"
        )


def require_size(pictures: np.ndarray, size: tuple[int, int]) -> None:
    if pictures.shape[1:3] != size:
        height, width = pictures.shape[1:3]
        raise OutputError(
            f"video frames are {height}x{width}, the first were {size[0]}x{size[1]} "
            "(height x width); open another file"
        )


def frame_rate(fps: float) -> Fraction:
    """Video frames per second as a ratio that a file can hold."""
    if not 0 < fps < 1000:
        raise OutputError(f"fps is {fps}; want a number between 0 and 1000, such as 16")
    return max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))


def yuv_converter() -> Callable[[np.ndarray], av.VideoFrame]:
    """A function from uint8 [H, W, 3] to 4:2:0 in BT.601 limited range, for all frames."""
    reformatter = VideoReformatter()

    def convert(picture: np.ndarray) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        colours = {"dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
        return reformatter.reformat(frame, format="yuv420p", **colours)

    return convert


def offset_of_box(data: bytes, kind: bytes) -> int:
    """Where the first top-level mp4 box of a kind begins."""
    offset = 0
    while data[offset + 4 : offset + 8] != kind:
        assert offset < len(data), f"no {kind!r} box"
        offset += int.from_bytes(data[offset : offset + 4], "big")
    return offset
