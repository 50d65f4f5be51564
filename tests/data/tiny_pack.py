"""Packing with the tiny world's encoders, and a codec that fails on the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

from torch import Tensor

from selfforcing_dfd.data.pack import PackOptions, pack
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.data.write import PackSummary
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

OF_SOURCE = {"resize", "fps", "caption_suffix", "captions", "recursive", "levels"}


def pack_tiny(clips: Path, out: Path, codec: Any, **settings: Any) -> PackSummary:
    """`pack` of 9 video frames of 64x64. settings: of FileSource and PackOptions."""
    of_source = {name: settings.pop(name) for name in OF_SOURCE & settings.keys()}
    source = FileSource(clips, 9, (64, 64), **of_source)
    return pack(source, out, codec, TinyText(), PackOptions(**settings))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def other_codec(codec: TinyCodec) -> TinyCodec:
    return TinyCodec(codec.first, codec.rest, 2 * codec.scale)


class FailingCodec:
    """The tiny codec until it has encoded `num_clips` clips; then `fail` is called."""

    def __init__(self, codec: TinyCodec, num_clips: int, fail: Any):
        # one more for the black clip at the start
        self.codec = codec
        self.left = num_clips + 1
        self.fail = fail

    @property
    def fingerprint(self) -> str:
        return self.codec.fingerprint

    def num_latent_frames(self, num_video_frames: int) -> int:
        return self.codec.num_latent_frames(num_video_frames)

    def encode(self, video: Tensor) -> Tensor:
        if not self.left:
            self.fail()
        self.left -= 1
        return self.codec.encode(video)


def stop_with(error: BaseException) -> Any:
    def fail() -> None:
        raise error

    return fail


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pack_and_die(num_clips: int, clips: Path, out: Path, codec: TinyCodec, **settings: Any) -> None:
    """Pack in a process that is killed, with no clean-up, while it encodes clip `num_clips`."""
    process = multiprocessing.get_context("fork").Process(
        target=pack_tiny, args=(clips, out, FailingCodec(codec, num_clips, die)), kwargs=settings
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
