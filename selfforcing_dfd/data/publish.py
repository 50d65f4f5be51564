"""A shard folder appears complete or not at all: it is written beside its place as `<out>.partial`
and renamed at the end.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from selfforcing_dfd.common import sync
from selfforcing_dfd.data.sources.files import PackError

Unfinished = Literal["discard", "keep", "resume"]
"""What becomes of the partial folder of an interrupted run: "discard" removes it, on an exception
or at the next start; "keep" leaves it there and refuses to start while one with complete shards is
there; "resume" goes on with it.
"""

JOURNAL_NAME = "progress.jsonl"
OURS = r"shard-\d{6}\.tar|index\.json|progress\.jsonl|[\w.-]+\.safetensors"


@contextmanager
def published(
    out: Path, overwrite: bool = False, unfinished: Unfinished = "discard"
) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; until then `out` is as it was.

    PackError: `out` exists and is not to be replaced, holds other things than shards, or an
    interrupted run is in the way.
    """
    out = out.resolve()
    partial, replaced = (out.with_name(out.name + ending) for ending in (".partial", ".replaced"))
    if out.exists() and not overwrite:
        raise PackError(
            f"{out} exists; choose another folder, or replace it with overwrite (--overwrite)"
        )
    for folder in (out, partial, replaced):
        check_is_ours(folder)
    if unfinished == "keep" and not overwrite and (num_shards := num_complete(partial)):
        begun = f"{partial} holds {num_shards} complete shards of an interrupted run"
        raise PackError(f"{begun}; go on with them with --resume, or start anew with --overwrite")
    if unfinished != "resume":
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
    except BaseException:
        if unfinished == "discard" or not num_complete(partial):
            shutil.rmtree(partial)
        raise
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    # only now: until the rename it is what a resumed run goes by
    (out / JOURNAL_NAME).unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)


def num_complete(partial: Path) -> int:
    """Complete shards that an interrupted run left: the lines of its journal but the first, each
    with its end.
    """
    journal = partial / JOURNAL_NAME
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.is_file() else 0


def check_is_ours(folder: Path) -> None:
    """Nothing but what packing writes lies in a folder that packing is about to replace."""
    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    foreign = [name for name in names if not re.fullmatch(OURS, name)]
    if foreign:
        raise PackError(
            f"{folder} holds {', '.join(sorted(foreign)[:3])}, not only shards; choose another folder"
        )
