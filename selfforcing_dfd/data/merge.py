"""Shard folders that were packed as parts of one source, by several machines, put together."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from selfforcing_dfd.data.publish import published
from selfforcing_dfd.data.shards import INDEX_NAME, Index, Shard, ShardError, sha256_of
from selfforcing_dfd.data.sources.files import PackError
from selfforcing_dfd.data.writing import NUM_NAMED, PackSummary, Refusal, differences, write_index


def merge(parts: Sequence[Path | str], out: Path | str, overwrite: bool = False) -> PackSummary:
    """One folder of all parts 1/n to n/n, in that order, whatever order they are named in.

    Shards are hard links where the file system can, so that nothing is copied; the parts stay and
    may be deleted. PackError: parts are missing, given twice, of other sources or settings, or hold
    no sample between them.
    """
    found = _in_order([(Path(part), _read_index(Path(part))) for part in parts])
    indexes = [index for _, index in found]
    first = indexes[0]
    about = {name: value for name, value in first.about.items() if name != "part"}
    with published(Path(out), overwrite) as partial:
        shards: list[Shard] = []
        renamed: dict[tuple[int, str], str] = {}
        for number, (folder, index) in enumerate(found):
            _add_files(folder, partial)
            for shard in index.shards:
                name = renamed[number, shard.name] = f"shard-{len(shards):06d}.tar"
                _check_size(folder, shard)
                _link(folder / shard.name, partial / name)
                shards.append(replace(shard, name=name))
        samples = tuple(
            replace(entry, shard=renamed[number, entry.shard])
            for number, index in enumerate(indexes)
            for entry in index.samples
        )
        if not samples:
            raise PackError(
                f"none of the {len(found)} parts holds a sample; their index.json say why, under refused"
            )
        refused = tuple(refusal for index in indexes for refusal in index.refused)
        write_index(
            partial,
            replace(first, shards=tuple(shards), samples=samples, refused=refused, about=about),
        )
    return PackSummary(
        Path(out), len(samples), len(shards), tuple(Refusal(**refusal) for refusal in refused)
    )


def _read_index(folder: Path) -> Index:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise PackError(
            f"{folder}: no {INDEX_NAME}, so this part is not finished; go on with it with --resume"
        )
    return Index.from_json(path.read_text(encoding="utf-8"))


def _in_order(found: list[tuple[Path, Index]]) -> list[tuple[Path, Index]]:
    """By their numbers. PackError unless they are all the parts of one source, packed alike."""
    (folder, first), *others = found
    if missing := [str(folder) for folder, index in found if "part" not in index.about]:
        raise PackError(
            f"{', '.join(missing)}: packed without --part, so there is nothing to merge"
        )
    for other, index in others:
        names = ("latent_shape", "text_shape", "fingerprints", "about")
        ours, theirs = ({name: getattr(one, name) for name in names} for one in (first, index))
        ours["about"], theirs["about"] = (one["about"] | {"part": ""} for one in (ours, theirs))
        if changes := differences(ours, theirs):
            raise PackError(
                f"{other} and {folder} were packed differently: {'; '.join(changes[:NUM_NAMED])}"
            )
    numbers = [tuple(map(int, index.about["part"].split("/"))) for _, index in found]
    count = numbers[0][1]
    if sorted(numbers) != [(number, count) for number in range(1, count + 1)]:
        given = ", ".join(sorted(index.about["part"] for _, index in found))
        raise PackError(f"the parts are {given}; want each of 1/{count} to {count}/{count} once")
    return [found[numbers.index(number)] for number in sorted(numbers)]


def _check_size(folder: Path, shard: Shard) -> None:
    path = folder / shard.name
    if not path.is_file() or path.stat().st_size != shard.bytes:
        got = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
        raise ShardError(
            f"{path}: {got}, the index wants {shard.bytes} bytes; copy it again or pack the part again"
        )


def _add_files(folder: Path, partial: Path) -> None:
    """What lies beside the shards, such as the negative prompt and the codec's basis; the same in
    all parts.
    """
    for path in sorted(folder.glob("*.safetensors")):
        there = partial / path.name
        if not there.exists():
            shutil.copyfile(path, there)
        elif sha256_of(there) != sha256_of(path):
            raise PackError(
                f"{path} differs from that of the other parts; they were packed with different encoders"
            )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
