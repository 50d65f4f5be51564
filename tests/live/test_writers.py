"""Files that play while they grow, and pipes whose reader leaves."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from selfforcing_dfd.live.writers import Mp4Writer, OutputError, ReaderGone, Y4mWriter, open_writer

ROOT = Path(__file__).parents[2]
FPS = 16
LENGTHS = (9, 12, 12, 12)  # video frames of the first chunks
LEVELS_APART = 40
# levels of 255: rounding to limited-range YUV and back, and x264 at crf 18 on a flat picture
CLOSE = 4


def flat_chunk(index: int, num_frames: int, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    """A chunk of one grey level, which tells its index."""
    return torch.full((num_frames, *size, 3), LEVELS_APART * (index + 1), dtype=torch.uint8)


def decode(source: Path | bytes) -> tuple[np.ndarray, list[Fraction], list[bool]]:
    """Pictures [T, H, W, 3], times in seconds and whether each is a keyframe."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        frames = list(container.decode(video=0))
    times = [frame.pts * frame.time_base for frame in frames]
    return (
        np.stack([f.to_ndarray(format="rgb24") for f in frames]),
        times,
        [bool(f.key_frame) for f in frames],
    )


def assert_shows(pictures: np.ndarray, lengths: tuple[int, ...]) -> None:
    """The pictures are the flat chunks of these lengths, in order."""
    wanted = np.repeat([LEVELS_APART * (i + 1) for i in range(len(lengths))], lengths)
    assert len(pictures) == sum(lengths)
    assert np.abs(pictures.astype(int) - wanted[:, None, None, None]).max() <= CLOSE


def test_mp4_plays_with_all_chunks_after_each_write(tmp_path):
    """Catches the default GOP of 250, frames held back by encoder or muxer, and a late header."""
    with Mp4Writer(tmp_path / "v.mp4", FPS) as writer:
        for i, length in enumerate(LENGTHS):
            writer.write(flat_chunk(i, length))
            assert_shows(decode(tmp_path / "v.mp4")[0], LENGTHS[: i + 1])


def test_mp4_has_even_times_and_one_keyframe_a_chunk(tmp_path):
    """Catches fragments that each start at time zero, gaps between them, and extra keyframes."""
    generator = torch.Generator().manual_seed(0)
    with Mp4Writer(tmp_path / "v.mp4", FPS) as writer:
        for length in LENGTHS:  # noise: each frame a new scene
            writer.write(
                torch.randint(0, 256, (length, 32, 48, 3), generator=generator).to(torch.uint8)
            )
    _, times, keys = decode(tmp_path / "v.mp4")
    assert times == [Fraction(i, FPS) for i in range(sum(LENGTHS))]
    assert [i for i, is_key in enumerate(keys) if is_key] == [0, *np.cumsum(LENGTHS)[:-1]]


def test_mp4_fragments_are_numbered(tmp_path):
    """Catches fragments that all have number one.

    ISO/IEC 14496-12 forbids that, and strict players refuse it.
    """
    with Mp4Writer(tmp_path / "v.mp4", FPS) as writer:
        for i, length in enumerate(LENGTHS):
            writer.write(flat_chunk(i, length))
    # then flags, then the number, four bytes each
    headers = (tmp_path / "v.mp4").read_bytes().split(b"mfhd")[1:]
    assert [int.from_bytes(header[4:8], "big") for header in headers] == [1, 2, 3, 4]


def test_mp4_keeps_the_rate_of_film(tmp_path):
    """Catches 23.976 video frames a second written as 24: a second of drift in 17 minutes."""
    with Mp4Writer(tmp_path / "v.mp4", 24000 / 1001) as writer:
        writer.write(flat_chunk(0, 12))
    times = decode(tmp_path / "v.mp4")[1]
    assert times == [Fraction(1001 * i, 24000) for i in range(12)]


def test_closing_adds_nothing(tmp_path):
    """Catches a file that is whole only after a clean end."""
    path = tmp_path / "v.mp4"
    with Mp4Writer(path, FPS) as writer:
        writer.write(flat_chunk(0, 9))
        growing = path.read_bytes()
    assert path.read_bytes() == growing


ENDLESS = """
import sys, torch
from selfforcing_dfd.live.writers import Mp4Writer
writer = Mp4Writer(sys.argv[1], 16)
for i in range(1000):
    writer.write(torch.full((12, 32, 48, 3), 40 * (i % 5 + 1), dtype=torch.uint8))
    print(i + 1, flush=True)
"""


def test_mp4_survives_a_kill(tmp_path):
    """Catches bytes that are still in the process when SIGKILL ends it."""
    path = tmp_path / "v.mp4"
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, path], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        for _ in range(4):
            num_written = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    pictures = decode(path)[0]
    assert len(pictures) >= 12 * num_written
    assert_shows(pictures[: 12 * num_written], (12,) * num_written)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
def test_mp4_cut_within_the_newest_fragment_shows_the_others(tmp_path, part):
    """Catches an index at the end, or a header that is useless after a kill during a write."""
    path = tmp_path / "v.mp4"
    sizes = []
    generator = torch.Generator().manual_seed(1)
    with Mp4Writer(path, FPS) as writer:
        for i, length in enumerate(LENGTHS[:2]):
            writer.write(flat_chunk(i, length))
        sizes.append(path.stat().st_size)
        writer.write(torch.randint(0, 256, (12, 32, 48, 3), generator=generator).to(torch.uint8))
        sizes.append(path.stat().st_size)
    data = path.read_bytes()[: int(sizes[0] + part * (sizes[1] - sizes[0]))]
    pictures = []
    # at the torn frame, no earlier
    with av.open(io.BytesIO(data)) as container, suppress(av.error.InvalidDataError):
        pictures.extend(frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
    assert_shows(np.stack(pictures[:21]), LENGTHS[:2])


def test_mp4_shows_the_colours_it_was_given(tmp_path):
    """Catches red for blue, a matrix other than the file's tags say, and a wrong range."""
    colours = torch.tensor(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]]
    )
    with Mp4Writer(tmp_path / "v.mp4", FPS) as writer:
        writer.write(colours.to(torch.uint8)[:, None, None].expand(-1, 32, 48, -1))
    pictures = decode(tmp_path / "v.mp4")[0].astype(int)
    assert np.abs(pictures - colours.numpy()[:, None, None]).max() <= CLOSE
    with av.open(str(tmp_path / "v.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (6, 1)  # SMPTE 170M, limited


def test_an_existing_file_is_replaced_only_by_intent(tmp_path):
    """Catches yesterday's video lost to a default name, or touched by the refused run."""
    path = tmp_path / "v.mp4"
    path.write_bytes(b"yesterday")
    with pytest.raises(OutputError, match="--overwrite"):
        Mp4Writer(path, FPS)
    assert path.read_bytes() == b"yesterday"
    with Mp4Writer(path, FPS, overwrite=True) as writer:
        assert path.read_bytes() == b"yesterday"  # a stream that never starts replaces nothing
        writer.write(flat_chunk(0, 9))
    assert_shows(decode(path)[0], (9,))


def test_a_file_that_appears_after_the_check_is_not_replaced(tmp_path):
    """Catches two streams with one name, of which the later writes over the earlier."""
    with Mp4Writer(tmp_path / "v.mp4", FPS) as one, Mp4Writer(tmp_path / "v.mp4", FPS) as two:
        one.write(flat_chunk(0, 9))
        with pytest.raises(OutputError, match="cannot be written"):
            two.write(flat_chunk(1, 9))
    assert_shows(decode(tmp_path / "v.mp4")[0], (9,))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(9, 33, 48, 3, dtype=torch.uint8), "33x48.*even"),
        (torch.zeros(9, 32, 47, 3, dtype=torch.uint8), "32x47.*even"),
        (torch.zeros(9, 32, 48, 3), "float32.*uint8"),
        (torch.zeros(9, 3, 32, 48, dtype=torch.uint8), r"\(9, 3, 32, 48\).*\[T, H, W, 3\]"),
    ],
)
def test_frames_that_do_not_fit_are_refused(tmp_path, frames, message):
    """Catches an error of the encoder's that names no size, and an empty file left behind."""
    with Mp4Writer(tmp_path / "v.mp4", FPS) as writer, pytest.raises(OutputError, match=message):
        writer.write(frames)
    assert not (tmp_path / "v.mp4").exists()


@pytest.mark.parametrize("name", ["v.mp4", "v.y4m"])
def test_another_size_midway_is_refused(tmp_path, name):
    """Catches rows of one picture read as another's, or a silent rescale."""
    with open_writer(str(tmp_path / name), FPS) as writer:
        writer.write(flat_chunk(0, 9))
        with pytest.raises(OutputError, match=r"32x64.*32x48"):
            writer.write(flat_chunk(1, 12, (32, 64)))


def test_y4m_has_one_header_and_all_frames():
    """Catches a header with each chunk, which a player takes for a picture."""
    stream = io.BytesIO()
    writer = Y4mWriter(stream, FPS)
    for i, length in enumerate(LENGTHS):
        writer.write(flat_chunk(i, length))
    data = stream.getvalue()
    header, _, rest = data.partition(b"\n")
    assert header.split()[:4] == [b"YUV4MPEG2", b"W48", b"H32", b"F16:1"]
    assert len(rest) == sum(LENGTHS) * (len(b"FRAME\n") + 32 * 48 * 3 // 2)
    pictures, times, _ = decode(data)
    assert_shows(pictures, LENGTHS)
    assert times == [Fraction(i, FPS) for i in range(sum(LENGTHS))]


@pytest.mark.parametrize("name", ["v.mp4", "v.y4m"])
def test_no_frames_write_nothing(tmp_path, name):
    """Catches an empty fragment, or a header without a size.

    The context of a stream from text is empty.
    """
    with open_writer(str(tmp_path / name), FPS) as writer:
        writer.write(flat_chunk(0, 0))
    assert not (tmp_path / name).exists()


def test_a_closed_pipe_is_a_reader_that_has_gone():
    """Catches BrokenPipeError at the user, from the write or from the close that follows it."""
    read_end, write_end = os.pipe()
    writer = Y4mWriter(os.fdopen(write_end, "wb"), FPS)
    os.close(read_end)
    with writer, pytest.raises(ReaderGone):
        writer.write(flat_chunk(0, 9))


PIPED = """
import torch
from selfforcing_dfd.live.writers import ReaderGone, open_writer
try:
    with open_writer("-", 16) as writer:
        while True:
            writer.write(torch.zeros(12, 32, 48, 3, dtype=torch.uint8))
except ReaderGone:
    raise SystemExit(0)
"""


def test_stdout_of_a_reader_that_leaves_ends_quietly():
    """Catches `Exception ignored ... BrokenPipeError` and exit status 120 at exit.

    Python flushes stdout then.
    """
    with subprocess.Popen(
        [sys.executable, "-c", PIPED], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(9) == b"YUV4MPEG2"
        process.stdout.close()
        complaints = process.stderr.read()
    assert (process.returncode, complaints) == (0, b"")


def test_stdout_stays_open(capfdbinary):
    """Catches a writer that closes the program's own stdout.

    The next print would be an error.
    """
    with open_writer("-", FPS) as writer:
        writer.write(flat_chunk(0, 9))
    sys.stdout.write("done")
    sys.stdout.flush()
    written = capfdbinary.readouterr().out
    assert (written[:9], written[-4:]) == (b"YUV4MPEG2", b"done")


@pytest.mark.parametrize("name", ["v.avi", "v", "mp4", ""])
def test_unknown_outputs_are_refused_with_what_is_known(tmp_path, name):
    """Catches an mp4 under a name that no player opens."""
    with pytest.raises(OutputError, match=r"not known.*\.mp4.*\.y4m.*stdout"):
        open_writer(str(tmp_path / name) if name else "", FPS)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_rates_are_refused(tmp_path, fps):
    """Catches a division by zero after the first chunk has been made."""
    with pytest.raises(OutputError, match="fps is"):
        open_writer(str(tmp_path / "v.mp4"), fps)
