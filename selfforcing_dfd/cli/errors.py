"""The error boundary around every command: mistakes end in one line, faults in a traceback."""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import sys
import threading
import traceback
from pathlib import Path

from selfforcing_dfd.cli.options import as_typed
from selfforcing_dfd.common import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    PACKAGE,
    Interrupted,
    UserError,
)

EXIT_FAULT = 1  # as Python ends with an exception that nobody caught
EXIT_READER_GONE = 128 + signal.SIGPIPE  # as shells report who wrote into a closed pipe
STDOUT = 1
TRACEBACK_VARIABLE = "SELFFORCING_DFD_TRACEBACK"

EXTRAS = {
    "flash_attn": "flash",
    "lmdb": "lmdb",
    "peft": "lora",
    "starlette": "serve",
    "tensorboard": "track",
    "uvicorn": "serve",
    "wandb": "track",
    "websockets": "serve",
}
"""Packages that not everybody needs, and the extra of ours that installs each."""

REPORT = "a fault of selfforcing_dfd: please report it, with the lines above and the command"


def guarded(options: argparse.Namespace) -> int:
    """Do what the options ask for (`options.command`) and return the exit code.

    0 for success, EXIT_USER_ERROR for what the user can mend, EXIT_INTERRUPTED for Ctrl-C,
    EXIT_READER_GONE for a closed pipe, EXIT_FAULT for everything that is not foreseen.
    """
    try:
        options.command(options)
        if sys.stdout is not None:  # closed before the program began
            sys.stdout.flush()
    except Interrupted as stop:
        return end(str(stop), EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        _stop_at_once_next_time()
        again = "; the same command with --resume goes on" if "resume" in options else ""
        return end(f"interrupted{again}", EXIT_INTERRUPTED)
    except Exception as error:
        return _failed(error, options)
    return 0


def _failed(error: Exception, options: argparse.Namespace) -> int:
    if isinstance(error, BrokenPipeError) and reader_is_gone():
        return EXIT_READER_GONE
    message = explain(error)
    asked = options.traceback or os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")
    if message is None or asked:
        traceback.print_exception(error)
    if message is None:
        return end(REPORT, EXIT_FAULT)
    rank = "".join(f"{note}: " for note in vars(error).get("__notes__", ()))
    return end(f"error: {rank}{as_typed(message, options)}", EXIT_USER_ERROR)


def explain(error: Exception) -> str | None:
    """What to tell the user, in one line; None for an error that is not the user's mistake.

    The modules of the core check their arguments with plain ValueErrors, as they know of torch
    alone. So a ValueError that our own code raised counts as explained, and one of a library does
    not.
    """
    if isinstance(error, UserError) or (isinstance(error, ValueError) and _is_ours(error)):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return _explain_import(error)
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return f"out of memory: {_first_line(error) or 'no more to be had'}"
    if isinstance(error, RecursionError | _class("yaml", "YAMLError")):
        return _explain_yaml(error)
    if isinstance(error, _class("omegaconf.errors", "OmegaConfBaseException")):
        return _first_line(error)
    if isinstance(error, OSError):
        return _explain_os(error)
    return None


def _explain_os(error: OSError) -> str:
    if error.errno is None:
        return _first_line(error)
    name = "" if error.filename is None else f"{_text(error.filename)}: "
    match error.errno:
        case errno.ENOENT:
            return f"{name}no such file or folder"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            cure = "choose another place or change its permissions"
            return f"{name}{_reason(error)}; {cure}"
        case errno.ENOSPC | errno.EDQUOT:
            return f"{name}the disk is full; free some space and start again"
    return f"{name}{_reason(error)}"


def _reason(error: OSError) -> str:
    return (error.strerror or "the system gave no reason").lower()


def _text(filename: str | bytes | int) -> str:
    return os.fsdecode(filename) if isinstance(filename, str | bytes) else f"file {filename}"


def _explain_yaml(error: Exception) -> str | None:
    """`FILE, line 3, column 5: what is wrong`; None for a recursion outside of YAML."""
    if isinstance(error, RecursionError):
        frames = traceback.extract_tb(error.__traceback__)
        in_yaml = any(Path(frame.filename).parent.name == "yaml" for frame in frames)
        return "the YAML file is nested too deeply" if in_yaml else None
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or _first_line(error)
    if mark is None:
        return f"this is not YAML: {problem}"
    return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: not YAML: {problem}"


def _explain_import(error: ModuleNotFoundError) -> str | None:
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        return None
    extra = EXTRAS[package]
    return f"this needs {package}, which is not installed: pip install 'selfforcing_dfd[{extra}]'"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch had no memory left: on a GPU a class of its own, on a CPU only a message."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )


def _is_ours(error: Exception) -> bool:
    """Whether a line of this package raised the error, and no library that it calls."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def _class(module: str, name: str) -> type[Exception]:
    """An exception class of a library, or a class that no error has if the library is not imported.

    If the library was not imported, none of its errors can be raised.
    """
    if module not in sys.modules:
        return type("Absent", (Exception,), {})
    found: type[Exception] = getattr(sys.modules[module], name)
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def reader_is_gone() -> bool:
    """Whether the reader of our stdout has left.

    If so, the remaining output is thrown away, so that Python does not complain at exit.
    """
    poll = select.poll()
    poll.register(STDOUT, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return True


def _stop_at_once_next_time() -> None:
    """A further Ctrl-C, while Python waits for threads at its end, ends the process silently."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))


def end(message: str, code: int) -> int:
    """Print the last word of a command, below a progress bar that may be there; returns `code`."""
    print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr)
    return code
