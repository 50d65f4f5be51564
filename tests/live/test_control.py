"""Lines of text to a running stream: what they mean, floods, ends, and clients that behave badly."""

from __future__ import annotations

import os
import select
import socket
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from selfforcing_dfd.live.control import (
    MAX_CLIENTS,
    MAX_LINE_BYTES,
    MAX_PENDING,
    Control,
    ControlError,
    LineReader,
    LineSplitter,
    Mode,
    NewPrompt,
    Pause,
    Quit,
    Reset,
    Resume,
    Seed,
    SocketControl,
)

ROOT = Path(__file__).parents[2]
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
    assert control.submit(line).startswith("ok")
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
    """Catches a mistyped command that becomes the prompt, a seed no generator takes, and a reply of
    many lines.
    """
    control = Control()
    reply = control.submit(line)
    assert (
        reply.startswith("error ") and message in reply and "\n" not in reply and len(reply) < 300
    )
    assert control.poll() == []


@pytest.mark.parametrize("line", ["", "  \n", "/help"])
def test_blank_lines_and_help_change_nothing(line):
    """Catches the Enter key emptying the prompt."""
    control = Control()
    assert control.submit(line).startswith("ok")
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
    """Catches memory that grows with the sender's speed, and a flood that locks out prompts or the
    way to stop it.
    """
    control = Control()
    replies = [control.submit(f"/seed {i}") for i in range(MAX_PENDING + 10)]
    assert [reply.startswith("ok") for reply in replies] == [True] * MAX_PENDING + [False] * 10
    for i in range(1000):
        assert control.submit(f"prompt {i}").startswith("ok")
    assert control.poll() == [*(Seed(i) for i in range(MAX_PENDING)), NewPrompt("prompt 999")]
    control.submit("/quit")
    assert control.poll() == [Quit()]


@pytest.mark.parametrize("piece", [1, 2, 7, 10_000])
def test_lines_do_not_depend_on_how_bytes_arrive(piece):
    """Catches a line torn at a packet's border, and the tail of a long line taken for a line of its
    own.
    """
    text = (
        "größer\n\n/pause\n"
        + "x" * MAX_LINE_BYTES
        + "\n"
        + "y" * (2 * MAX_LINE_BYTES + 1)
        + "\nlast\n"
    )
    data, splitter = text.encode(), LineSplitter()
    lines = [
        line for i in range(0, len(data), piece) for line in splitter.feed(data[i : i + piece])
    ]
    assert lines == ["größer".encode(), b"", b"/pause", b"x" * MAX_LINE_BYTES, None, b"last"]


def test_a_line_without_end_takes_no_memory():
    """Catches a splitter that gathers for ever: 16 MiB without a line's end."""
    splitter, piece = LineSplitter(), b"x" * 4096
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
        self.control, self.replies = Control(), []
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
    wait_for(lambda: pipe.replies)
    assert pipe.replies == ["ok newprompt"]
    assert pipe.control.poll() == [NewPrompt("a disc moves")]
    pipe.end()


def test_the_end_of_stdin_ends_nothing_else():
    """Catches a stream that stops, or polls that fail, once `echo ... |` has said all; its last
    line needs no end.
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
    """Catches `Fatal Python error: could not acquire lock for stdin` at the end of each stream from
    a terminal.
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


class Client:
    """One connection that sends bytes and reads lines."""

    def __init__(self, server: SocketControl) -> None:
        is_port = isinstance(server.address, int)
        self.socket = socket.socket(socket.AF_INET if is_port else socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(("127.0.0.1", server.address) if is_port else server.address)
        self.lines = self.socket.makefile("r", encoding="utf-8")

    def ask(self, line: bytes) -> str:
        self.socket.sendall(line)
        return self.lines.readline()


@pytest.fixture(params=["socket", "port"])
def address(request, tmp_path):
    return tmp_path / "control" if request.param == "socket" else 0


def test_each_line_is_answered_by_a_line(address):
    """Catches answers that come late, of several lines, or not at all, and an error that ends the
    connection.
    """
    control = Control()
    with SocketControl(address, control) as server:
        client = Client(server)
        assert client.ask(b"a disc moves\n") == "ok newprompt\n"
        assert client.ask(b"/seed x\n").startswith("error got '/seed x'")
        assert client.ask(b"\n") == "ok\n"
        assert client.ask(b"/help\n").startswith("ok a line of text")
        assert client.ask(b"\xff\n").startswith("error the line is not UTF-8")
        assert client.ask(b"/pause\n") == "ok pause\n"
    assert control.poll() == [NewPrompt("a disc moves"), Pause()]


def test_a_last_line_without_end_counts(address):
    """Catches the command lost that `printf /quit | nc` sends."""
    control = Control()
    with SocketControl(address, control) as server:
        client = Client(server)
        client.socket.sendall(b"/quit")
        client.socket.shutdown(socket.SHUT_WR)
        assert client.lines.read() == "ok quit\n"
    assert control.poll() == [Quit()]


def test_an_overlong_line_is_refused(address):
    """Catches a prompt of a gigabyte, and lines that hide behind one."""
    control = Control()
    with SocketControl(address, control) as server:
        client = Client(server)
        assert client.ask(b"x" * (MAX_LINE_BYTES + 1) + b"\n/quit\n").startswith(
            "error the line is over 4096 bytes"
        )
        assert client.lines.read() == ""
    assert control.poll() == []


@pytest.mark.parametrize("padding", [0, MAX_LINE_BYTES])
def test_a_web_page_cannot_send_commands(padding):
    """Catches fetch("http://127.0.0.1:PORT", {method: "POST", body: "/quit"}) from any page the
    user looks at.

    A long address must not hide the line by which HTTP is known.
    """
    control = Control()
    request = b"POST /" + b"a" * padding + b" HTTP/1.1\r\nHost: localhost\r\n\r\n/quit\n"
    with SocketControl(0, control) as server:
        client = Client(server)
        assert client.ask(request).startswith("error")
        assert client.lines.read() == ""
    assert control.poll() == []


def test_a_client_that_does_not_read_is_alone_with_it(address):
    """Catches one client that blocks all others, and replies to it that pile up."""
    control = Control()
    with SocketControl(address, control) as server:
        deaf, other = Client(server), Client(server)
        deaf.socket.setblocking(False)
        num_sent = 0
        # until the server reads no more from it either
        while select.select([], [deaf.socket], [], 0.5)[1]:
            num_sent += deaf.socket.send(b"/help\n" * 1000)
            assert num_sent < 2**25, (
                "the kernel's buffers are smaller: the server reads on and keeps the replies"
            )
        assert other.ask(b"/pause\n") == "ok pause\n"
        assert control.poll() == [Pause()]


def test_clients_are_limited_and_their_places_free_again(address):
    """Catches connections without bound, and a count that only grows."""
    with SocketControl(address, Control()) as server:
        clients = [Client(server) for _ in range(MAX_CLIENTS)]
        assert [client.ask(b"/pause\n") for client in clients] == ["ok pause\n"] * MAX_CLIENTS
        assert (
            Client(server).lines.readline().startswith(f"error {MAX_CLIENTS} clients are connected")
        )
        clients[0].socket.shutdown(socket.SHUT_WR)
        assert clients[0].lines.read() == ""
        assert Client(server).ask(b"/pause\n") == "ok pause\n"


def test_closing_drops_clients_and_frees_the_address(address):
    """Catches a socket file that stays, a port that stays taken, and a client that waits for ever."""
    server = SocketControl(address, Control())
    client = Client(server)
    client.ask(b"/pause\n")
    server.close()
    server.close()
    assert client.lines.read() == ""
    with pytest.raises(OSError):
        Client(server)
    with SocketControl(server.address, Control()) as again:
        assert Client(again).ask(b"/pause\n") == "ok pause\n"


def test_closing_at_once_is_clean(address):
    """Catches a server that is stopped before it has begun: a traceback from its thread."""
    for _ in range(20):
        SocketControl(address, Control()).close()


def test_the_socket_file_is_its_owners_alone(tmp_path):
    """Catches a stream that every user of the machine can steer."""
    with SocketControl(tmp_path / "control", Control()):
        assert stat.S_IMODE((tmp_path / "control").stat().st_mode) == 0o600


def test_a_port_is_open_to_this_machine_only():
    """Catches a stream that the whole network can steer."""
    with SocketControl(0, Control()) as server:
        assert server._socket.getsockname()[0] == "127.0.0.1"


def test_a_socket_that_was_left_behind_is_replaced_and_a_live_one_is_not(tmp_path):
    """Catches `kill -9` once, and --control never again; and the opposite, a second stream that
    takes the first one's.
    """
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "control"))
    left.close()
    with SocketControl(tmp_path / "control", Control()) as server:
        with pytest.raises(ControlError, match="another stream listens there"):
            SocketControl(tmp_path / "control", Control())
        assert Client(server).ask(b"/pause\n") == "ok pause\n"


def test_other_files_are_left_alone(tmp_path):
    """Catches --control notes.txt that deletes the notes."""
    path = tmp_path / "notes.txt"
    path.write_text("notes")
    with pytest.raises(ControlError, match=r"cannot listen on .*no socket.*choose another"):
        SocketControl(path, Control())
    assert path.read_text() == "notes"


@pytest.mark.parametrize("port", ["70000", "99999999999999999999"])
def test_impossible_ports_are_refused(port):
    """Catches an OverflowError at the user."""
    with pytest.raises(ControlError, match=f"cannot listen on {port}"):
        SocketControl(port, Control())
