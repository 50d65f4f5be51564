"""Lines of text to a running stream: what they mean, floods, and ends of the input."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from selfforcing_dfd.live.control import (
    HELP,
    MAX_LINE_BYTES,
    MAX_PENDING,
    Control,
    LineReader,
    LineSplitter,
    Mode,
    NewPrompt,
    Pause,
    Quit,
    Reset,
    Resume,
    Seed,
)

ROOT = Path(__file__).parents[2]
NAMES = {
    Pause: "ok pause",
    Resume: "ok resume",
    Reset: "ok reset",
    Seed: "ok seed",
    Mode: "ok mode",
    Quit: "ok quit",
}
PATIENCE_S = 30.0  # until a thread must have done what takes it a millisecond


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("a disc moves\n", NewPrompt("a disc moves")),
        ("  ein größerer Kreis ", NewPrompt("ein größerer Kreis")),
        ("/pause", Pause()),
        ("/resume", Resume()),
        ("/reset", Reset()),
        ("/seed 7", Seed(7)),
        ("/seed 9223372036854775807", Seed(2**63 - 1)),
        ("/mode flush", Mode("flush")),
        ("/quit\r\n", Quit()),
    ],
)
def test_lines_become_commands(line, command):
    """Catches a command taken for a prompt, and ends of lines inside one."""
    control = Control()
    assert control.submit(line) == ("" if isinstance(command, NewPrompt) else NAMES[type(command)])
    assert control.poll() == [command]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sed 7", "/seed N"),
        ("/", "/pause"),
        ("/pause now", "/pause"),
        ("/seed", "whole number"),
        ("/seed -1", "whole number"),
        ("/seed 1.5", "whole number"),
        ("/seed 9223372036854775808", "whole number"),
        ("/seed " + "9" * 4000, "whole number"),
        ("/mode", "recache, flush, keep"),
        ("/mode melt", "recache, flush, keep"),
    ],
)
def test_wrong_commands_are_answered_and_do_nothing(line, message):
    """Catches a mistyped command used as a prompt, an impossible seed, and a long reply."""
    control = Control()
    reply = control.submit(line)
    assert (
        reply.startswith("error ") and message in reply and "\n" not in reply and len(reply) < 300
    )
    assert control.poll() == []


@pytest.mark.parametrize(("line", "reply"), [("", ""), ("  \n", ""), ("/help", f"ok {HELP}")])
def test_blank_lines_and_help_change_nothing(line, reply):
    """Catches the Enter key emptying the prompt."""
    control = Control()
    assert control.submit(line) == reply
    assert control.poll() == []


def test_commands_keep_their_order_and_are_taken_once():
    """Catches a reset that overtakes the seed it was meant for, and commands carried out twice."""
    control = Control()
    for line in ("/seed 3", "a disc", "/reset", "a cross", "/pause"):
        control.submit(line)
    assert control.poll() == [Seed(3), Reset(), NewPrompt("a cross"), Pause()]
    assert control.poll() == []


def test_quit_drops_what_waits():
    """Catches a stream that works through a backlog before it ends."""
    control = Control()
    for line in ("a disc", "/pause", "/quit"):
        control.submit(line)
    assert control.poll() == [Quit()]


def test_a_flood_is_refused_and_prompts_still_pass():
    """Catches memory that grows with a flood of lines, and a flood that locks out commands."""
    control = Control()
    replies = [control.submit(f"/seed {i}") for i in range(MAX_PENDING + 10)]
    assert [reply.startswith("ok") for reply in replies] == [True] * MAX_PENDING + [False] * 10
    for i in range(1000):
        assert control.submit(f"prompt {i}") == ""
    assert control.poll() == [*(Seed(i) for i in range(MAX_PENDING)), NewPrompt("prompt 999")]
    control.submit("/quit")
    assert control.poll() == [Quit()]


@pytest.mark.parametrize("piece", [1, 2, 7, 10_000])
def test_lines_do_not_depend_on_how_bytes_arrive(piece):
    """Catches a line cut where a packet ends, and the tail of a long line taken for a new one."""
    text = (
        "größer\n\n/pause\n"
        + "x" * MAX_LINE_BYTES
        + "\n"
        + "y" * (2 * MAX_LINE_BYTES + 1)
        + "\nlast\n"
    )
    data = text.encode()
    splitter = LineSplitter()
    lines = [
        line for i in range(0, len(data), piece) for line in splitter.feed(data[i : i + piece])
    ]
    assert lines == ["größer".encode(), b"", b"/pause", b"x" * MAX_LINE_BYTES, None, b"last"]


def test_a_line_without_end_takes_no_memory():
    """Catches a splitter that gathers for ever: 16 MiB without a line's end."""
    splitter = LineSplitter()
    piece = b"x" * 4096
    tracemalloc.start()
    for _ in range(4096):
        assert list(splitter.feed(piece)) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**16


class Pipe:
    """A reader at one end of a pipe; `send` writes into the other."""

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe()
        self.control = Control()
        self.replies = []
        self._stream = os.fdopen(read_end, "rb")
        self.reader = LineReader(self._stream, self.control, self.replies.append)

    def send(self, data: bytes) -> None:
        os.write(self._write_end, data)

    def end(self) -> None:
        """Close, and wait until the reader has seen it."""
        os.close(self._write_end)
        self.reader.thread.join(PATIENCE_S)
        assert not self.reader.thread.is_alive()


def wait_for(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.002)


def test_lines_arrive_while_the_stream_is_open():
    """Catches a reader that waits for the end of its input or for a full buffer."""
    pipe = Pipe()
    pipe.send(b"a disc moves\n")
    pipe.send(b"/pause\n")
    wait_for(lambda: pipe.replies)
    assert pipe.replies == ["ok pause"]
    assert pipe.control.poll() == [NewPrompt("a disc moves"), Pause()]
    pipe.end()


def test_the_end_of_stdin_ends_nothing_else():
    """Catches a stream that stops when its stdin ends, as after `echo ... |`.

    The last line needs no line end.
    """
    pipe = Pipe()
    pipe.send(b"/pause\na disc")
    pipe.end()
    assert pipe.control.poll() == [Pause(), NewPrompt("a disc")]
    assert pipe.control.poll() == []


def test_bytes_that_are_no_text_are_answered():
    """Catches a reader that dies of a stray byte and is deaf from then on."""
    pipe = Pipe()
    pipe.send(b"\xff\xfe\n" + b"x" * (MAX_LINE_BYTES + 1) + b"\n/resume\n")
    pipe.end()
    assert [reply[:24] for reply in pipe.replies] == [
        "error the line is not UT",
        "error the line is over 4",
        "ok resume",
    ]
    assert pipe.control.poll() == [Resume()]


def test_python_ends_while_the_reader_waits():
    """Catches `Fatal Python error: could not acquire lock for stdin` at exit.

    It came at the end of each stream from a terminal.
    """
    code = (
        "import sys\n"
        "from selfforcing_dfd.live.control import Control, LineReader\n"
        "LineReader(sys.stdin, Control(), print)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.wait(3 * PATIENCE_S) == 0
        assert process.stderr is not None and process.stderr.read() == b""


@pytest.fixture(autouse=True)
def thread_errors(monkeypatch, caplog):
    """What threads die of or log as an error; nothing, in each of these tests."""
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    yield
    assert errors == [] and caplog.get_records("call") == []
