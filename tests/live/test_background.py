"""A writer in a thread writes the same frames, and its errors reach the stream."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from selfforcing_dfd import rng
from selfforcing_dfd.data.sources.video import read_last_frames
from selfforcing_dfd.live.background import MAX_WAITING, BackgroundWriter
from selfforcing_dfd.live.writers import Frames, Mp4Writer, OutputError, ReaderGone, Writer


def chunk(number: int) -> torch.Tensor:
    return (rng.uniform((4, 16, 16, 3), 0, "chunk", number) * 255).to(torch.uint8)


class Gate(Writer):
    """Writes when it is let; fails at a given chunk."""

    def __init__(self, fails_at: int = -1) -> None:
        self.open = threading.Event()
        self.written = list[Frames]()
        self.fails_at = fails_at
        self.closed = False

    def write(self, frames: Frames) -> None:
        self.open.wait(5)
        if len(self.written) == self.fails_at:
            raise ReaderGone
        self.written.append(frames)

    def close(self) -> None:
        self.closed = True


def test_the_file_is_the_same(tmp_path: Path):
    """Catches chunks that are lost at the end, doubled or out of order."""
    for name in ("here", "beside"):
        writer: Writer = Mp4Writer(tmp_path / f"{name}.mp4", 16)
        with BackgroundWriter(writer) if name == "beside" else writer as out:
            for number in range(6):
                out.write(chunk(number))
    assert (tmp_path / "here.mp4").read_bytes() == (tmp_path / "beside.mp4").read_bytes()
    assert read_last_frames(tmp_path / "beside.mp4", 21, (16, 16)).shape[0] == 21


def test_a_slow_writer_holds_the_stream_back():
    """Catches a queue without bounds.

    The writer is stuck: it holds one chunk, and the queue is full.
    """
    gate = Gate()
    writer = BackgroundWriter(gate)
    accepted = []

    def feed() -> None:
        for number in range(MAX_WAITING + 3):
            writer.write(chunk(number))
            accepted.append(number)

    feeder = threading.Thread(target=feed)
    feeder.start()
    feeder.join(0.5)
    assert feeder.is_alive()
    assert len(accepted) == MAX_WAITING + 1
    gate.open.set()
    feeder.join(5)
    writer.close()
    assert [int(frames.sum()) for frames in gate.written] == [
        int(chunk(n).sum()) for n in range(MAX_WAITING + 3)
    ]


def test_an_error_comes_back_once_and_the_file_is_closed():
    """Catches an unreported write error, and a close that hangs or raises it again.

    Such errors are a full disk, or a reader that has left.
    """
    gate = Gate(fails_at=1)
    gate.open.set()
    writer = BackgroundWriter(gate)
    with pytest.raises(ReaderGone):
        for number in range(50):
            writer.write(chunk(number))
    writer.close()
    writer.close()
    assert gate.closed
    assert len(gate.written) == 1


def test_an_error_of_the_last_chunk_comes_out_of_close(tmp_path: Path):
    """Catches an error that has no later write to come out of."""
    writer = BackgroundWriter(Mp4Writer(tmp_path / "odd.mp4", 16))
    writer.write(torch.zeros(2, 15, 16, 3, dtype=torch.uint8))
    with pytest.raises(OutputError, match="15"):
        writer.close()
