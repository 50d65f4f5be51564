"""Live control of a running stream: lines of text, from stdin or a local socket, become commands
for the next chunk.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, get_args

from selfforcing_dfd.common import UserError
from selfforcing_dfd.streaming.session import PromptMode

MAX_LINE_BYTES = 4096
MAX_PENDING = 64
MAX_CLIENTS = 8
MAX_SEED = 2**63 - 1
HELP = "a line of text is the new prompt; /pause /resume /reset /seed N /mode recache|flush|keep /help /quit"
HTTP = re.compile(rb"[A-Z]+ \S+ HTTP/\d")
FOREGROUND_POLL_S = 0.5


class ControlError(UserError):
    """A line that is no command, or an address that cannot be listened on; the message says what to
    do.
    """


@dataclass(frozen=True, slots=True)
class NewPrompt:
    text: str


@dataclass(frozen=True, slots=True)
class Pause:
    pass


@dataclass(frozen=True, slots=True)
class Resume:
    pass


@dataclass(frozen=True, slots=True)
class Reset:
    """Begin anew, with the seed that holds then; with the prompt too, where no schedule says which
    comes first.
    """


@dataclass(frozen=True, slots=True)
class Seed:
    """The seed of the next reset."""

    seed: int


@dataclass(frozen=True, slots=True)
class Mode:
    """What later prompts do to the past."""

    mode: PromptMode


@dataclass(frozen=True, slots=True)
class Quit:
    pass


Command = NewPrompt | Pause | Resume | Reset | Seed | Mode | Quit
PLAIN: dict[str, Command] = {
    "/pause": Pause(),
    "/resume": Resume(),
    "/reset": Reset(),
    "/quit": Quit(),
}


def parse_command(line: str) -> Command:
    """The command of one line that is neither blank nor /help. Raises ControlError."""
    line = line.strip()
    if not line.startswith("/"):
        return NewPrompt(line)
    word, *arguments = line.split()
    if word in PLAIN and not arguments:
        return PLAIN[word]
    if word == "/seed":
        if (
            len(arguments) != 1
            or not re.fullmatch("[0-9]{1,19}", arguments[0])
            or int(arguments[0]) > MAX_SEED
        ):
            raise ControlError(
                f"got {line[:60]!r}; write /seed N with a whole number from 0 to {MAX_SEED}"
            )
        return Seed(int(arguments[0]))
    if word == "/mode":
        for mode in get_args(PromptMode):
            if arguments == [mode]:
                return Mode(mode)
        raise ControlError(
            f"got {line[:60]!r}; write /mode and one of {', '.join(get_args(PromptMode))}"
        )
    raise ControlError(f"got {line[:60]!r}; {HELP}")


class Control:
    """Commands on their way from any number of threads to the stream, which takes them between two
    chunks.

    Commands keep their order. Only the newest prompt is kept, and it stands where it came. /quit
    drops all others. Of the rest MAX_PENDING wait at most; further ones are refused, with an error
    to their sender. Memory is bounded.
    """

    def __init__(self) -> None:
        self._pending: deque[Command] = deque()
        self._lock = threading.Lock()

    def submit(self, line: str) -> str:
        """Take one line; the reply is one line that begins with `ok` or `error`. A blank line does
        nothing.
        """
        line = line.strip()
        if not line:
            return "ok"
        if line == "/help":
            return f"ok {HELP}"
        try:
            command = parse_command(line)
            self._add(command)
        except ControlError as error:
            return f"error {error}"
        return f"ok {type(command).__name__.lower()}"

    def poll(self) -> list[Command]:
        """Everything that waits, the oldest first. Never blocks."""
        with self._lock:
            commands = list(self._pending)
            self._pending.clear()
        return commands

    def _add(self, command: Command) -> None:
        with self._lock:
            if isinstance(command, Quit):
                self._pending.clear()
            elif isinstance(command, NewPrompt):
                self._pending = deque(
                    other for other in self._pending if not isinstance(other, NewPrompt)
                )
            elif sum(not isinstance(other, NewPrompt) for other in self._pending) >= MAX_PENDING:
                raise ControlError(
                    f"{MAX_PENDING} commands wait already; send it again after the next chunk"
                )
            self._pending.append(command)


class LineSplitter:
    """Bytes into lines, in bounded memory: of a line over MAX_LINE_BYTES nothing is kept but that
    it was there.
    """

    def __init__(self) -> None:
        self._rest, self._is_skipping = b"", False

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """The lines that end within `data`, without their ends; None stands for one that was too
        long.
        """
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = b""
        for line in lines:
            yield None if self._is_skipping or len(line) > MAX_LINE_BYTES else line
            self._is_skipping = False
        self._is_skipping = self._is_skipping or len(rest) > MAX_LINE_BYTES
        self._rest = b"" if self._is_skipping else rest


def reply_to(control: Control, line: bytes | None) -> str:
    """Submit a line of a `LineSplitter`."""
    if line is None:
        return f"error the line is over {MAX_LINE_BYTES} bytes; send a shorter one"
    try:
        return control.submit(line.decode())
    except UnicodeDecodeError as error:
        return f"error the line is not UTF-8 (byte {error.start}); send UTF-8"


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class LineReader:
    """Reads lines of a stream, such as stdin, in a daemon thread and submits them; replies go to a
    callback there.

    Reads the file descriptor itself: a thread that waits inside `sys.stdin` would crash Python at
    its end. In a shell's background a terminal is left alone, for reading it there would stop the
    process. The end of the stream ends the thread and nothing else.
    """

    def __init__(self, stream: HasFileno, control: Control, reply: Callable[[str], object]) -> None:
        self._descriptor, self._control, self._reply = stream.fileno(), control, reply
        self.thread = threading.Thread(target=self._run, name="control lines", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        splitter = LineSplitter()
        while data := self._read():
            self._submit(splitter.feed(data))
        self._submit(splitter.feed(b"\n"))  # a last line without an end

    def _read(self) -> bytes:
        """The next bytes, none at the end. Waits."""
        select.select([self._descriptor], [], [])
        while in_background(self._descriptor):
            time.sleep(FOREGROUND_POLL_S)
            select.select([self._descriptor], [], [])
        try:
            return os.read(self._descriptor, MAX_LINE_BYTES)
        except OSError:  # a terminal that has gone
            return b""

    def _submit(self, lines: Iterator[bytes | None]) -> None:
        for line in lines:
            if line is None or line.strip():
                self._reply(reply_to(self._control, line))


def in_background(descriptor: int) -> bool:
    """Whether this is a terminal that at present belongs to another job of the shell."""
    try:
        return os.tcgetpgrp(descriptor) != os.getpgrp()
    except OSError:  # no terminal, or not ours to be stopped by
        return False


class SocketControl:
    """Listens on a Unix socket or a port of 127.0.0.1, in a daemon thread; each line is submitted
    and answered by a line.

    address: a path, or a port as number or digits (0: any free one; `address` then has it). The
    socket file is open to its owner only. A port is open to every user and program of this machine,
    so a client that speaks HTTP, as a web page could make a browser do, is sent away. MAX_CLIENTS
    at a time; one that does not read its replies waits by itself. A line over MAX_LINE_BYTES is
    answered by an error and ends its connection. Raises ControlError where one cannot listen.
    """

    def __init__(self, address: str | int | Path, control: Control) -> None:
        self._control, self._num_clients = control, 0
        self._path = None if str(address).isdigit() else Path(str(address))
        try:
            self._socket = listen_unix(self._path) if self._path else listen_port(int(str(address)))
        except (OSError, OverflowError) as error:
            raise ControlError(
                f"cannot listen on {address} ({error}); choose another path or port"
            ) from error
        self.address: str | int = str(self._path) if self._path else self._socket.getsockname()[1]
        self._loop, self._is_closing = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="control socket", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, drop the clients and remove the socket file."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._is_closing.set)
            self._thread.join()
            if self._path:
                self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._listen())
        finally:
            self._loop.close()

    async def _listen(self) -> None:
        """Serve until `close`, which may come before this has begun."""
        serving = asyncio.start_server if self._path is None else asyncio.start_unix_server
        server = await serving(self._serve, sock=self._socket)
        await self._is_closing.wait()
        server.close()
        clients = asyncio.all_tasks() - {asyncio.current_task()}
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, until it leaves. What goes wrong on its line is its own affair."""
        self._num_clients += 1
        try:
            with closing(writer):
                if self._num_clients > MAX_CLIENTS:
                    writer.write(
                        f"error {MAX_CLIENTS} clients are connected; try again later\n".encode()
                    )
                else:
                    await self._converse(reader, writer)
                await writer.drain()
        # gone, or dropped by `close`, which Python 3.11 would report
        except (ConnectionError, asyncio.CancelledError):
            return
        finally:
            self._num_clients -= 1

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer lines until the client leaves, or sends one that is too long: behind it a web page
        could hide others.
        """
        splitter = LineSplitter()
        while True:
            data = await reader.read(MAX_LINE_BYTES)
            for line in splitter.feed(data or b"\n"):
                if line and HTTP.match(line):
                    writer.write(b"error this is no web server; send lines of text\n")
                    return
                if data or line is None or line.strip():
                    writer.write(f"{reply_to(self._control, line)}\n".encode())
                if line is None:
                    return
            await writer.drain()
            if not data:
                return


def listen_port(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def listen_unix(path: Path) -> socket.socket:
    """A socket file for its owner only. One that nobody listens on any more is replaced; any other
    file stays.
    """
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise FileExistsError("a file is there that is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise FileExistsError("another stream listens there")
        path.unlink()
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(str(path))
        path.chmod(0o600)
        server.listen()
    except OSError:
        server.close()
        raise
    return server
