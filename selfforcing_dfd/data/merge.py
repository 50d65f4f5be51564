"""Shard folders that were packed as parts of one source, by several machines, put together."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import sha256_of
from selfforcing_dfd.data.format import (
    INDEX_NAME,
    NO_INDEX,
    Entry,
    Index,
    PackError,
    Shard,
    write_index,
)
from selfforcing_dfd.data.journal import NUM_NAMED, differences
from selfforcing_dfd.data.shards import ShardError
from selfforcing_dfd.data.write import PackSummary, shard_folder, summary_of

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


def merge(parts: Sequence[Path | str], out: Path | str, overwrite: bool = False) -> PackSummary:
    """One folder of all parts 1/n to n/n, in that order, whatever order they are named in.

    Shards are hard links where the file system can, so nothing is copied; the parts stay and may
    be deleted. Raises PackError if parts are missing, given twice, of other sources or settings,
    or hold no sample between them.
    """
    found = _in_order([(Path(part), _read_index(Path(part))) for part in parts])
    with shard_folder(Path(out), overwrite) as partial:
        shards: list[Shard] = []
        samples: list[Entry] = []
        for folder, index in found:
            _copy_other_files(folder, partial)
            new_names: dict[str, str] = {}
            for shard in index.shards:
                new_names[shard.name] = f"shard-{len(shards):06d}.tar"
                _check_size(folder, shard)
                _link(folder / shard.name, partial / new_names[shard.name])
                shards.append(replace(shard, name=new_names[shard.name]))
            samples += [replace(entry, shard=new_names[entry.shard]) for entry in index.samples]
        if not samples:
            raise PackError(
                f"none of the {len(found)} parts holds a sample; the index.json of each says why, "
                "under refused"
            )
        first = found[0][1]
        merged = replace(
            first,
            shards=tuple(shards),
            samples=tuple(samples),
            refused=tuple(refusal for _, index in found for refusal in index.refused),
            about=_without_part(first),
        )
        write_index(partial, merged)
    return summary_of(Path(out), merged)


def _read_index(folder: Path) -> Index:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise PackError(
            f"{folder}: no {INDEX_NAME}, so this part is not finished; go on with it with --resume"
        )
    try:
        return Index.from_json(path.read_text(encoding="utf-8"))
    except NO_INDEX as error:
        raise PackError(f"{path}: damaged ({error}); copy or pack this part again") from error


def _in_order(found: list[tuple[Path, Index]]) -> list[tuple[Path, Index]]:
    """By their numbers. PackError unless they are all the parts of one source, packed alike."""
    missing = [str(folder) for folder, index in found if "part" not in index.about]
    if missing:
        raise PackError(
            f"{', '.join(missing)}: packed without --part, so there is nothing to merge"
        )
    (folder, first), *others = found
    for other, index in others:
        changes = differences(_common(first), _common(index))
        if changes:
            raise PackError(
                f"{other} and {folder} were packed differently: {'; '.join(changes[:NUM_NAMED])}"
            )
    numbers = [_part_of(index) for _, index in found]
    count = numbers[0][1]
    if sorted(numbers) != [(number, count) for number in range(1, count + 1)]:
        given = ", ".join(sorted(index.about["part"] for _, index in found))
        raise PackError(f"the parts are {given}; want each of 1/{count} to {count}/{count} once")
    return [found[numbers.index(number)] for number in sorted(numbers)]


def _common(index: Index) -> dict[str, Any]:
    """What all parts have in common."""
    return {
        "latent_shape": index.latent_shape,
        "text_shape": index.text_shape,
        "fingerprints": index.fingerprints,
        "about": _without_part(index),
    }


def _without_part(index: Index) -> dict[str, Any]:
    return {name: value for name, value in index.about.items() if name != "part"}


def _part_of(index: Index) -> tuple[int, int]:
    number, count = index.about["part"].split("/")
    return int(number), int(count)


def _check_size(folder: Path, shard: Shard) -> None:
    path = folder / shard.name
    if not path.is_file() or path.stat().st_size != shard.bytes:
        got = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
        raise ShardError(
            f"{path}: {got}, the index wants {shard.bytes} bytes; "
            "copy it again or pack the part again"
        )


def _copy_other_files(folder: Path, partial: Path) -> None:
    """The negative prompt and the codec's basis, which must be the same in all parts."""
    for path in sorted(folder.glob("*.safetensors")):
        there = partial / path.name
        if not there.exists():
            shutil.copyfile(path, there)
        elif sha256_of(there) != sha256_of(path):
            raise PackError(
                f"{path} differs from that of the other parts; "
                "they were packed with different encoders"
            )


def _link(shard: Path, target: Path) -> None:
    try:
        os.link(shard, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(shard, target)
