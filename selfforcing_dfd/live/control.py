"""Commands to a running stream: lines of text from stdin, carried out between two chunks."""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, get_args

from selfforcing_dfd.common import UserError
from selfforcing_dfd.streaming.session import PromptMode

MAX_LINE_BYTES = 4096
MAX_PENDING = 64
MAX_SEED = 2**63 - 1
HELP = (
    "a line of text is the new prompt; "
    "/pause /resume /reset /seed N /mode recache|flush|keep /help /quit"
)
FOREGROUND_POLL_S = 0.5


class ControlError(UserError):
    """A line that is no command; the message says what to write."""


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
    """Start again, with the newest seed. A schedule starts again with its first prompt."""


@dataclass(frozen=True, slots=True)
class Seed:
    """The seed of the next reset."""

    seed: int


@dataclass(frozen=True, slots=True)
class Mode:
    """What later prompts do to the context."""

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
        return Seed(parse_seed(line, arguments))
    if word == "/mode":
        return Mode(parse_mode(line, arguments))
    raise ControlError(f"got {line[:60]!r}; {HELP}")


def parse_seed(line: str, arguments: list[str]) -> int:
    digits = arguments[0] if len(arguments) == 1 else ""
    if not re.fullmatch("[0-9]{1,19}", digits) or int(digits) > MAX_SEED:
        raise ControlError(
            f"got {line[:60]!r}; write /seed N with a whole number from 0 to {MAX_SEED}"
        )
    return int(digits)


def parse_mode(line: str, arguments: list[str]) -> PromptMode:
    for mode in get_args(PromptMode):
        if arguments == [mode]:
            return mode
    known = ", ".join(get_args(PromptMode))
    raise ControlError(f"got {line[:60]!r}; write /mode and one of {known}")


class Control:
    """A queue of commands from any number of threads. The stream empties it between chunks.

    Commands keep their order. Only the newest prompt is kept, in the place where it came. /quit
    drops all other commands. At most MAX_PENDING commands besides the prompt wait; further ones are
    refused with an error, so memory is bounded.
    """

    def __init__(self) -> None:
        self._pending: deque[Command] = deque()
        self._lock = threading.Lock()

    def submit(self, line: str) -> str:
        """Take one line and return the reply, which begins with `ok` or `error`.

        The reply is empty for a blank line, which does nothing, and for a prompt: only the model
        can say whether it takes it, so the stream answers that one.
        """
        line = line.strip()
        if not line:
            return ""
        if line == "/help":
            return f"ok {HELP}"
        try:
            command = parse_command(line)
            self._add(command)
        except ControlError as error:
            return f"error {error}"
        return "" if isinstance(command, NewPrompt) else f"ok {type(command).__name__.lower()}"

    def poll(self) -> list[Command]:
        """All commands that wait, the oldest first. Never blocks."""
        with self._lock:
            commands = list(self._pending)
            self._pending.clear()
        return commands

    def _add(self, command: Command) -> None:
        with self._lock:
            if isinstance(command, Quit):
                self._pending.clear()
            elif isinstance(command, NewPrompt):
                self._pending = deque(self._others())
            elif len(self._others()) >= MAX_PENDING:
                raise ControlError(
                    f"{MAX_PENDING} commands wait already; send it again after the next chunk"
                )
            self._pending.append(command)

    def _others(self) -> list[Command]:
        """Waiting commands that are no prompts."""
        return [command for command in self._pending if not isinstance(command, NewPrompt)]


class LineSplitter:
    """Splits bytes into lines in bounded memory: a line over MAX_LINE_BYTES is not kept."""

    def __init__(self) -> None:
        self._rest = b""
        self._is_skipping = False

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """The lines that end within `data`, without line ends; None for one that was too long."""
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
    """Reads lines of a stream such as stdin in a daemon thread, submits them and reports replies.

    Reads the file descriptor itself: a thread that waits inside `sys.stdin` would crash Python at
    its end. A terminal is left alone while the process runs in the shell's background, because
    reading it there would stop the process. The end of the stream ends the thread only.
    """

    def __init__(self, stream: HasFileno, control: Control, reply: Callable[[str], object]) -> None:
        self._descriptor = stream.fileno()
        self._control = control
        self._reply = reply
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
        except OSError:  # the terminal has been closed
            return b""

    def _submit(self, lines: Iterator[bytes | None]) -> None:
        for line in lines:
            reply = reply_to(self._control, line)
            if reply:
                self._reply(reply)


def in_background(descriptor: int) -> bool:
    """Whether this is a terminal that another job of the shell has at present."""
    try:
        return os.tcgetpgrp(descriptor) != os.getpgrp()
    except OSError:  # no terminal, or one that cannot stop this process
        return False
