"""The status line: rates worked out by hand, and what a terminal of a given width gets to see."""

from __future__ import annotations

import io
import mmap
import os
import re
import termios
import time

import pytest

from selfforcing_dfd.common import resident_bytes
from selfforcing_dfd.live.status import RECENT_CHUNKS, StatusLine, fit, text_columns

LIVE_END = "\x1b[K"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A status line in a real terminal; `shown` is what it wrote since the last call."""

    def __init__(self, columns: int) -> None:
        self._master, slave = os.openpty()
        termios.tcsetwinsize(slave, (24, columns))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")

    def shown(self) -> str:
        # the kernel passes a write on piece by piece; this is the last one
        os.write(self.stream.fileno(), b"\0")
        data = b""
        while not data.endswith(b"\0"):
            data += os.read(self._master, 2**16)
        return data[:-1].decode().replace("\r\n", "\n")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def a_terminal_that_can(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")


def play(status: StatusLine, clock: Clock, *chunks: tuple[int, float]) -> None:
    """Chunks of so many video frames, each ready so many seconds after the one before."""
    for i, (num_frames, seconds) in enumerate(chunks):
        clock.now += seconds
        status.update(i, num_frames, 1000 * seconds, "a disc")


def last_line(stream: io.StringIO) -> str:
    return stream.getvalue().splitlines()[-1]


def test_fps_is_frames_over_the_time_between_chunks(clock):
    """Catches a mean of rates, the first chunk's frames without its time, and latency as time.

    After the first chunk 12 frames took 1 s and 12 took 3 s: 24 in 4 s.
    """
    stream = io.StringIO()
    status = StatusLine(stream, fps=16, every_s=0, clock=clock)
    play(status, clock, (9, 5.0))
    assert "| - FPS |" in last_line(stream)
    play(status, clock, (12, 1.0), (12, 3.0))
    assert "| 6.0 FPS | 3000 ms |" in last_line(stream)


def test_fps_forgets_old_chunks(clock):
    """Catches a rate since the start, which hides that the stream has become slow."""
    stream = io.StringIO()
    status = StatusLine(stream, fps=16, every_s=0, clock=clock)
    play(status, clock, *[(12, 0.1)] * 100, *[(12, 2.0)] * RECENT_CHUNKS)
    assert "| 6.0 FPS |" in last_line(stream)


def test_video_so_far_is_in_seconds_of_video(clock):
    """Catches wall time shown as the video's length.

    9 + 12 + 12 frames at 16 a second are 2.1 s.
    """
    stream = io.StringIO()
    play(StatusLine(stream, fps=16, every_s=0, clock=clock), clock, (9, 7.0), (12, 7.0), (12, 7.0))
    assert last_line(stream).startswith("chunk 2 | 33 video frames (2.1 s) |")


def test_a_pause_counts_in_no_rate(clock):
    """Catches ten minutes of pause that make the stream look slow, in line or summary."""
    stream = io.StringIO()
    with StatusLine(stream, fps=16, every_s=0, clock=clock) as status:
        play(status, clock, (12, 1.0), (12, 1.0))
        status.pause()
        assert last_line(stream) == "paused"
        clock.now += 600
        status.resume()
        play(status, clock, (12, 1.0), (12, 1.0))
        assert "| 12.0 FPS |" in last_line(stream)
    assert "48 video frames (3.0 s) in 4.0 s, 12.0 FPS" in last_line(stream)


def test_the_summary_counts_all_chunks(clock):
    """Catches a summary of recent chunks only, and one without the first chunk's time."""
    stream = io.StringIO()
    with StatusLine(stream, fps=16, clock=clock) as status:
        play(status, clock, (9, 3.0), *[(12, 1.0)] * 99)
    wanted = (
        "100 chunks, 1197 video frames (74.8 s) in 102.0 s, 11.7 FPS, "
        "latency 1020 ms on average, 3000 ms at most"
    )
    assert last_line(stream).startswith(wanted)


def test_a_stream_without_chunks_ends_without_figures(clock):
    """Catches a division by zero that hides the real error."""
    stream = io.StringIO()
    StatusLine(stream, fps=16, clock=clock).close()
    assert stream.getvalue() == "no chunk was made\n"


def test_a_log_gets_a_line_now_and_then(clock):
    """Catches a log with a line for each chunk, and escape sequences in it.

    41 chunks come a second apart; a line is due every ten seconds.
    """
    stream = io.StringIO()
    status = StatusLine(stream, fps=16, every_s=10, clock=clock)
    play(status, clock, *[(12, 1.0)] * 41)
    lines = stream.getvalue().splitlines()
    assert [line.split(" |")[0] for line in lines] == [f"chunk {i}" for i in (0, 10, 20, 30, 40)]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_a_terminal_keeps_one_line(clock):
    """Catches a screen full of status lines, and the end of a longer line behind a shorter one."""
    screen = Screen(columns=120)
    status = StatusLine(screen.stream, fps=16, clock=clock)
    status.update(7, 12, 50.0, "a rather long prompt")
    status.update(8, 12, 50.0, "short")
    shown = screen.shown()
    assert "\n" not in shown
    assert [part.split(" |")[0] for part in shown.split("\r")] == ["", "chunk 7", "chunk 8"]
    assert all(part.endswith(LIVE_END) for part in shown.split("\r")[1:])


@pytest.mark.parametrize("columns", [10, 40, 100, 300])
@pytest.mark.parametrize("prompt", ["x" * 500, "漢字" * 200, "a\nb\r\x1b[2J" * 50])
def test_the_line_fits_and_its_prompt_cannot_move_the_cursor(clock, columns, prompt):
    """Catches lines that wrap, wide characters of one column, and escape sequences in a prompt."""
    screen = Screen(columns)
    StatusLine(screen.stream, fps=16, clock=clock).update(0, 9, 50.0, prompt)
    shown = screen.shown().removeprefix("\r").removesuffix(LIVE_END)
    assert text_columns(shown) < columns
    assert shown.isprintable()
    assert shown.endswith("...") or len(prompt) < columns


def test_a_prompt_is_shortened_in_a_log(clock):
    """Catches 4 KiB of prompt in each line of a log."""
    stream = io.StringIO()
    StatusLine(stream, fps=16, clock=clock).update(0, 9, 50.0, "x" * 4096)
    assert len(stream.getvalue()) < 200


def test_a_message_leaves_the_line_whole(clock):
    """Catches a reply written into the middle of the status line."""
    screen = Screen(columns=120)
    status = StatusLine(screen.stream, fps=16, clock=clock)
    status.update(7, 12, 50.0, "a disc")
    line = screen.shown().removeprefix("\r").removesuffix(LIVE_END)
    status.say("ok pause")
    assert screen.shown() == f"\r{LIVE_END}ok pause\n{line}"


def test_the_summary_takes_the_place_of_the_line(clock):
    """Catches a status line left beside the summary, and a shell prompt on the summary's line."""
    screen = Screen(columns=120)
    with StatusLine(screen.stream, fps=16, clock=clock) as status:
        status.update(0, 12, 50.0, "a disc")
        screen.shown()
    assert re.fullmatch(rf"\r{re.escape(LIVE_END)}1 chunks, .* GiB\n", screen.shown())


@pytest.mark.parametrize(
    ("text", "columns", "shown"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abc..."),
        ("漢字漢字", 8, "漢字漢字"),
        ("漢字漢字", 7, "漢字..."),
        ("漢字漢字", 6, "漢..."),
        ("abcdef", 2, ".."),
        ("abcdef", 0, ""),
        ("abcdef", -1, ""),
    ],
)
def test_text_is_cut_by_columns(text, columns, shown):
    """Catches a cut by characters, and half a wide one."""
    assert fit(text, columns) == shown


def test_cutting_takes_time_in_proportion():
    """Catches a cut that measures the whole text for each character that it drops.

    For this text that would take minutes, in each chunk.
    """
    started = time.perf_counter()
    assert text_columns(fit("漢" * 100_000, 80)) <= 80
    assert time.perf_counter() - started < 5


def test_resident_memory_follows_what_is_held():
    """Catches the peak or the address space reported as resident memory.

    64 MiB come when they are used, and go again. They are mapped: the allocator may hand out memory
    that an earlier test has used and it has kept.
    """
    before = resident_bytes()
    held = mmap.mmap(-1, 2**26)
    assert resident_bytes() - before < 2**23
    for _ in range(64):
        held.write(b"1" * 2**20)
    with_it = resident_bytes()
    assert with_it - before == pytest.approx(2**26, abs=2**23)
    held.close()
    assert with_it - resident_bytes() == pytest.approx(2**26, abs=2**23)


def test_memory_of_a_gpu_is_shown_when_there_is_one(clock):
    """Catches GiB of another base: 3 * 2**29 bytes are 1.50 GiB."""
    stream = io.StringIO()
    status = StatusLine(stream, fps=16, every_s=0, clock=clock)
    status.update(0, 9, 50.0, "a disc")
    assert "GPU" not in last_line(stream)
    status.update(1, 12, 50.0, "a disc", cuda_bytes=3 * 2**29)
    assert "| GPU 1.50 GiB |" in last_line(stream)
