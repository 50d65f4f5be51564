"""What was fetched from far away, kept on disk up to a limit, for all processes of a machine.

Every piece is a file of its own under a name that says its content. A file is there whole or not at
all; one that is damaged is fetched again. What was not used for the longest goes first.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "SELFFORCING_DFD_CACHE"
LIMIT_VARIABLE = "SELFFORCING_DFD_CACHE_GB"
LIMIT_GB = 100.0
NUM_LOCKS = 256  # so many pieces can be fetched at once by all processes
LEFT_AFTER = 0.9  # of the limit, once room was made, so that it is seldom made


def default_kept() -> Kept:
    """In the folder and up to the limit that variables name; by default ~/.cache and 100 GB."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get(FOLDER_VARIABLE) or Path(cache) / "selfforcing_dfd" / "shards"
    gigabytes = float(os.environ.get(LIMIT_VARIABLE) or LIMIT_GB)
    return Kept(Path(folder), int(gigabytes * 1e9))


@dataclass(frozen=True, slots=True)
class Kept:
    """folder: shared by processes of one machine. limit: bytes of all pieces together."""

    folder: Path
    limit: int

    def get(
        self, name: str, fetch: Callable[[], bytes], is_whole: Callable[[bytes], bool]
    ) -> bytes:
        """The piece of that name: from disk if it is whole there, else what `fetch` returns.

        Processes and threads that want the same piece fetch it once.
        """
        found = self._read(name, is_whole)
        if found is not None:
            return found
        with self._locked(f"lock-{zlib.crc32(name.encode()) % NUM_LOCKS:03d}"):
            found = self._read(name, is_whole)
            if found is not None:
                return found
            content = fetch()
            if is_whole(content):
                self._write(name, content)
        return content

    def path(self, name: str) -> Path:
        return self.folder / "pieces" / name

    def used(self) -> int:
        """Bytes of all pieces, by a look at each while none is written."""
        with self._locked("used"):
            return self._total()

    def _read(self, name: str, is_whole: Callable[[bytes], bool]) -> bytes | None:
        path = self.path(name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if not is_whole(content):
            logger.warning("%s is damaged and is fetched again", path)
            path.unlink(missing_ok=True)
            return None
        with suppress(FileNotFoundError):  # another process may make room at this moment
            os.utime(path)
        return content

    def _write(self, name: str, content: bytes) -> None:
        """Keep a piece, unless it is larger than the limit or the disk is full."""
        if len(content) > self.limit:
            return
        path = self.path(name)
        partial = path.with_name(f".tmp-{os.getpid()}-{threading.get_ident()}-{name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked("used") as counter:
                self._make_room(counter, len(content))
                # still locked: whoever counts all pieces has to see this one
                partial.write_bytes(content)
                partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            logger.warning("%s: nothing is kept there (%s); it is fetched each time", path, error)

    def _make_room(self, counter: IO[str], size: int) -> None:
        """Count `size` bytes more, and remove the oldest pieces if that is too much."""
        text = counter.read()
        used = size + (int(text) if text.isdecimal() else self._total())
        if used > self.limit:
            used = size + self._remove_down_to(int(LEFT_AFTER * self.limit) - size)
        counter.seek(0)
        counter.truncate()
        counter.write(str(used))
        counter.flush()  # before the piece: after a kill too much is counted, never too little

    def _remove_down_to(self, wanted: int) -> int:
        """Remove the pieces that were used least lately; the bytes that are left."""
        pieces = sorted(self._pieces())
        left = sum(size for _, _, size in pieces)
        for _, path, size in pieces:
            if left <= max(wanted, 0):
                break
            path.unlink(missing_ok=True)
            left -= size
        return left

    def _total(self) -> int:
        return sum(size for _, _, size in self._pieces())

    def _pieces(self) -> Iterator[tuple[int, Path, int]]:
        """When each was used last, where it is, and its bytes."""
        folder = self.folder / "pieces"
        if not folder.is_dir():
            return
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime_ns, path, found.st_size

    @contextmanager
    def _locked(self, name: str) -> Iterator[IO[str]]:
        """One thread of one process at a time; a kill unlocks."""
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file
