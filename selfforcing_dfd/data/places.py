"""Where a shard folder lies: on disk, or behind any address that fsspec knows.

Of a remote folder only the members that are asked for are fetched, as ranges of the shards, and
kept on disk: a shuffled epoch needs no whole shards, and a second one fetches nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

from selfforcing_dfd.common import UserError, sha256_of
from selfforcing_dfd.data.ahead import in_order
from selfforcing_dfd.data.format import INDEX_NAME, Member, Shard
from selfforcing_dfd.data.kept import Kept, default_kept

TRIES = 5
WAIT_S = 0.5  # before the second try; doubled before each further one
LISTERS = 8  # threads that ask for sizes
BLOCK_BYTES = 8 << 20  # of a shard that is verified

INSTALLED_BY = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}
"""Packages by the protocols that need them."""

ADDRESS = r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://"

T = TypeVar("T")


class Place(Protocol):
    """name: as it was given, for messages."""

    name: str

    @property
    def folder(self) -> Path:
        """On disk. UserError for a remote one."""
        ...

    def content(self, name: str) -> bytes | None:
        """Of a small file; None where there is none."""
        ...

    def sizes(self, names: Sequence[str]) -> Mapping[str, int | None]:
        """In bytes, of the files that are there; None where nobody tells."""
        ...

    def read(self, shard: Shard, member: Member) -> bytes:
        """The bytes of a member, whatever they are."""
        ...

    def sha256(self, name: str) -> str:
        """Of a whole file, read anew."""
        ...


def is_remote(place: Path | str) -> bool:
    """Whether this is an address such as s3://bucket/folder, and no folder."""
    return isinstance(place, str) and bool(re.match(ADDRESS, place))


def place_of(place: Path | str) -> Place:
    return RemotePlace(str(place), default_kept()) if is_remote(place) else DiskPlace(Path(place))


def is_there(place: Path | str) -> bool:
    """Whether a folder has an index. A remote one is believed to have it until it is opened."""
    return is_remote(place) or (Path(place) / INDEX_NAME).is_file()


def file_beside(place: Path | str, name: str) -> Path | None:
    """A small file beside shards, on disk; None where there is none."""
    if not is_remote(place):
        path = Path(place) / name
        return path if path.is_file() else None
    remote = place_of(place)
    content = remote.content(name)
    return None if content is None else kept_file(content, name)


def kept_file(content: bytes, name: str) -> Path:
    """The content as a file of this name, which stays."""
    folder = default_kept().folder / "files" / hashlib.sha256(content).hexdigest()[:32]
    path = folder / name
    if not path.is_file() or path.read_bytes() != content:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".tmp-{os.getpid()}-{name}"
        partial.write_bytes(content)
        partial.replace(path)
    return path


class DiskPlace:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)
        self._files: dict[str, int] = {}
        self._opening = Lock()

    def content(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def sizes(self, names: Sequence[str]) -> Mapping[str, int | None]:
        paths = [self.folder / name for name in names]
        return {path.name: path.stat().st_size for path in paths if path.is_file()}

    def read(self, shard: Shard, member: Member) -> bytes:
        with self._opening:
            if shard.name not in self._files:
                self._files[shard.name] = os.open(self.folder / shard.name, os.O_RDONLY)
        return os.pread(self._files[shard.name], member.size, member.offset)

    def sha256(self, name: str) -> str:
        return sha256_of(self.folder / name)

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


class RemotePlace:
    """A folder behind an address, read through fsspec; what is read is kept.

    A request that fails, or that gives other bytes than the index describes, is made again.
    """

    def __init__(self, name: str, kept: Kept) -> None:
        """UserError for a protocol that nothing here knows."""
        self.name = name.rstrip("/")
        self.kept = kept
        self._opened(self.name)

    @property
    def folder(self) -> Path:
        raise UserError(
            f"{self.name} is read from afar and cannot be changed there; copy it to a folder, and "
            "name that"
        )

    def content(self, name: str) -> bytes | None:
        def fetch() -> bytes | None:
            try:
                files, path = self._opened(f"{self.name}/{name}")
                found: bytes = files.cat_file(path)
            except FileNotFoundError:
                return None
            return found

        return self._patiently(fetch, name)

    def sizes(self, names: Sequence[str]) -> Mapping[str, int | None]:
        found = in_order(self._size, names, min(len(names), LISTERS))
        return {name: size for name, size in zip(names, found, strict=True) if size != -1}

    def read(self, shard: Shard, member: Member) -> bytes:
        """From disk, or fetched. The last try's bytes where all are damaged, for the reader."""
        end = member.offset + member.size
        attempts = 0

        def is_whole(content: bytes) -> bool:
            return len(content) == member.size and zlib.crc32(content) == member.crc32

        def fetch() -> bytes:
            nonlocal attempts
            attempts += 1
            files, path = self._opened(f"{self.name}/{shard.name}")
            content: bytes = files.cat_file(path, start=member.offset, end=end)
            if not is_whole(content) and attempts < TRIES:
                raise OSError(
                    f"{len(content)} bytes of {member.size} came, or others than the index has"
                )
            return content

        name = f"{shard.sha256[:32]}-{member.offset}-{member.size}"
        return self.kept.get(name, lambda: self._patiently(fetch, shard.name), is_whole)

    def sha256(self, name: str) -> str:
        def fetch() -> str:
            digest = hashlib.sha256()
            files, path = self._opened(f"{self.name}/{name}")
            with files.open(path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
            return digest.hexdigest()

        return self._patiently(fetch, name)

    def _size(self, name: str) -> int | None:
        """-1 for a file that is not there."""

        def fetch() -> int | None:
            try:
                files, path = self._opened(f"{self.name}/{name}")
                size: int | None = files.size(path)
            except FileNotFoundError:
                return -1
            return size

        return self._patiently(fetch, name)

    def _opened(self, address: str) -> tuple[Any, str]:
        """The file system of an address, and the path in it. fsspec keeps one for each process."""
        import fsspec

        try:
            files, path = fsspec.url_to_fs(address)
        except (ImportError, ValueError) as error:
            protocol = address.partition(":")[0]
            package = INSTALLED_BY.get(protocol)
            cure = f"pip install {package}" if package else "use an address that fsspec knows"
            raise UserError(f"{address} cannot be opened ({error}): {cure}") from error
        return files, path

    def _patiently(self, fetch: Callable[[], T], name: str) -> T:
        """What `fetch` returns, after some tries. UserError if none succeeds.

        Libraries of the protocols raise errors of their own, which only some derive from OSError.
        """
        for attempt in range(TRIES):
            if attempt:
                time.sleep(WAIT_S * 2 ** (attempt - 1))
            try:
                return fetch()
            except (UserError, PermissionError):
                raise
            except Exception as error:
                problem = error
        raise UserError(
            f"{self.name}/{name} cannot be read after {TRIES} tries ({type(problem).__name__}: "
            f"{problem}); look at the network and at your rights there, and run the same command "
            "again, with --resume if it trains. What was fetched is kept"
        ) from problem
