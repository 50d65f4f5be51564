"""What every room may use: one class of user errors, dtypes by name, atomic files, the device."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

EXIT_USER_ERROR = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt
KEEP_BYTES = 32 << 20  # the largest that glibc accepts for mmap


class UserError(ValueError):
    """A mistake that the user can mend. The message says what was got, what was wanted and how to
    fix it; every command prints it as one line and ends with EXIT_USER_ERROR.
    """


def find_device(name: str, setting: str = "device") -> torch.device:
    """`auto` takes a GPU where there is one. `setting` is how the user calls it, for the message.

    Raises UserError for a name that torch does not know and for a GPU that is not there.
    """
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

    An exception leaves `path` as it was and removes what was written.
    """
    path = Path(path)
    partial = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, path: Path) -> None:
    """Rename the complete folder `partial` to `path`, in place of what was there.

    Both lie in the same folder. What was there is deleted only after the rename.
    """
    replaced = path.with_name(f".old-{path.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    for written in (*partial.rglob("*"), partial):
        sync(written)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


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
