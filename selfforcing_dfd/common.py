"""What every room may use: user errors, shipped files, atomic files, dtypes by name, the device.

Importing this module does not import torch, so that command lines can use it and start at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    DTYPES: dict[str, torch.dtype]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

PACKAGE = Path(__file__).resolve().parent
PRESETS = PACKAGE / "presets"  # only in an installed package; see pyproject.toml

PARTIAL = ".tmp-"  # how the name of a folder that is being written or deleted begins
DAMAGED = "damaged-"  # how the name of what cannot be trusted begins once it was moved aside
REPLACED = ".old-"  # how that of the folder before it begins; see `replace_folder`

M_TRIM_THRESHOLD = -1  # a name of glibc's mallopt
M_MMAP_THRESHOLD = -3  # another one
KEEP_BYTES = 32 << 20  # the largest that glibc accepts for mmap

SEAL = "sha256"  # entry of a JSON object: the SHA-256 of all its other entries

AT_FDCWD = -100  # a flag of renameat2: paths are relative to the working directory
RENAME_EXCHANGE = 2  # another one: exchange the two names


def __getattr__(name: str) -> Any:
    """DTYPES: torch's floating-point types by name, made when it is first asked for."""
    if name != "DTYPES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    globals()["DTYPES"] = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return globals()["DTYPES"]


class UserError(ValueError):
    """A mistake that the user can mend.

    The message says what was got, what was wanted and how to fix it. Every command prints it as
    one line and ends with EXIT_USER_ERROR.
    """


class Interrupted(Exception):
    """A command was asked to stop and has saved its state; the message says how to go on.

    Every command prints the message and ends with EXIT_INTERRUPTED.
    """


def shipped(name: str) -> Path:
    """Where a file or folder that comes with the package lies.

    name: as in the repository, such as `configs` or `assets/tiny/student.safetensors`. A checkout
    has these folders beside the package, a wheel carries them inside it. The path need not exist.
    """
    return (PRESETS if PRESETS.is_dir() else PACKAGE.parent) / name


def find_file(name: str) -> Path:
    """A path as the user gave it, or, where it names a shipped file, where that lies."""
    path = Path(name)
    return path if path.exists() or not shipped(name).exists() else shipped(name)


def find_device(name: str, setting: str = "device") -> torch.device:
    """The device of that name; `auto` is a GPU where there is one, else the CPU.

    setting: how the user calls it, for the message.
    Raises UserError for a name that torch does not know and for a GPU that is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{setting} is {name!r}; use auto, cpu, cuda or cuda:N") from error
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"{setting} is {name} but torch sees {found} GPUs; use auto or cpu")
    return device


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end; a kill leaves the old file or the new.

    An exception leaves `path` as it was and removes what was written. The folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """An empty folder to write into, which becomes `path` at the end and replaces what was there.

    A kill leaves the old folder or the new one. An exception leaves `path` as it was and removes
    what was written.
    """
    path = Path(path)
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sealed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a JSON object with a SHA-256 over all of them beside."""
    return {**entries, SEAL: seal_of(entries)}


def seal_of(entries: Mapping[str, Any]) -> str:
    """SHA-256 over the entries of a JSON object, in any order, without a seal that is there."""
    others = {name: value for name, value in entries.items() if name != SEAL}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def is_as_sealed(entries: Mapping[str, Any]) -> bool:
    """Whether every entry of a JSON object is what it was when it was sealed."""
    return entries.get(SEAL) == seal_of(entries)


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move_aside(path: Path) -> Path:
    """Rename a damaged file or folder to `damaged-NAME`, with a number if that is taken."""
    number = 1
    aside = path.with_name(f"{DAMAGED}{path.name}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{DAMAGED}{number}-{path.name}")
    path.rename(aside)
    return aside


def partial_of(path: Path) -> Path:
    """Where a folder is written, or deleted, beside its place: a leftover has this name."""
    return path.with_name(f"{PARTIAL}{path.name}")


def replace_folder(partial: Path, path: Path) -> None:
    """Rename the complete folder `partial` to `path`, in place of what was there.

    Both lie in the same folder. Where the file system can exchange two names (most on Linux),
    `path` exists at every moment. Elsewhere a kill between two renames leaves what was there as
    `.old-NAME`, and the next call puts it back before it goes on.
    """
    replaced = path.with_name(f"{REPLACED}{path.name}")
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)
    for written in (*partial.rglob("*"), partial):
        sync(written)
    if not path.exists():
        partial.rename(path)
    elif exchange(partial, path):
        partial.rename(replaced)
    else:
        path.rename(replaced)
        try:
            partial.rename(path)
        except OSError:
            replaced.rename(path)
            raise
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; a kill leaves the whole of it, or a leftover under another name."""
    leftover = partial_of(path)
    shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(path.rename(leftover))


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders at once; False where the system cannot do it."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE)
    return bool(done == 0)


def tune_allocator() -> None:
    """Make glibc keep large freed blocks instead of giving them back and faulting them in anew.

    Linux; elsewhere nothing happens. Call before the first tensor is made.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)


def give_back_memory() -> None:
    """Return freed memory to the system, which glibc keeps after `tune_allocator`. Linux."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Memory of this process now, in bytes."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """Most memory that this process has had, in bytes, loading included."""
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
