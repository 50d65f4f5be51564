"""One run at a time writes to a run folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from selfforcing_dfd.common import UserError

LOCK_FILE = ".lock"


class ExclusiveError(UserError):
    """Another program writes to the folder of this run."""


@contextmanager
def lock_folders(*folders: Path | str) -> Iterator[None]:
    """Hold run folders, which are made if they are missing, until the `with` ends.

    The kernel releases the locks of a process that dies, however it dies: a lock file that is left
    behind locks nothing. Raises ExclusiveError, with nothing held, if another process (or another
    `with` of this one) holds one of the folders.
    """
    with ExitStack() as held:
        for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
            held.enter_context(_lock(folder))
        yield


def holder_of(folder: Path | str) -> str:
    """Who holds a folder, in words; empty if nobody does. Nothing is written."""
    path = Path(folder) / LOCK_FILE
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(file)
    return ""


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExclusiveError(
                f"{folder} is in use by {_holder(file)}; wait until that run ends, stop it, "
                "or give this run another run.name"
            ) from error
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        yield


def _holder(file: TextIO) -> str:
    """Who wrote the lock file. It is empty for a moment while its holder starts."""
    file.seek(0)
    text = file.read()
    if not text:
        return "another process"
    holder = json.loads(text)
    return f"process {holder['pid']} on {holder['host']}"
