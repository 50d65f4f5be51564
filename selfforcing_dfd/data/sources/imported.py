"""Data sets of latents from other projects, told apart by their files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.source import Source
from selfforcing_dfd.data.sources.fastgen import FastGenSource, Layout
from selfforcing_dfd.data.sources.lmdb import LmdbSource, find_environments


def open_import(
    path: Path,
    kind: Literal["auto", "lmdb", "fastgen"] = "auto",
    *,
    step: int = -1,
    row_shape: tuple[int, ...] | None = None,
    layout: Layout = "cfhw",
    negative: Path | None = None,
) -> Source:
    """The data set in a folder or file.

    step, row_shape: see `LmdbSource`. layout, negative: see `FastGenSource`. Raises PackError if
    there is none or it cannot be read.
    """
    if not path.exists():
        raise PackError(f"{path}: no such folder or file")
    is_tars = path.suffix == ".tar" if path.is_file() else any(path.glob("*.tar"))
    if kind == "auto" and not is_tars and not find_environments(path):
        raise PackError(
            f"{path}: want a folder with data.mdb (LMDB), with such folders, or with .tar files "
            "(FastGen)"
        )
    if kind == "fastgen" or (kind == "auto" and is_tars):
        return FastGenSource(path, layout, negative)
    return LmdbSource(path, step, row_shape)
