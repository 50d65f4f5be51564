"""Samples into a folder of shards, which appears complete or not at all.

It is written beside its place as `<out>.partial` and renamed at the end. An interrupted run can go
on with the shards that are complete; the bytes are those of a run without interruption.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from webdataset import TarWriter

from selfforcing_dfd.common import replace_folder, sha256_of, sync
from selfforcing_dfd.data.format import (
    INDEX_NAME,
    NO_INDEX,
    Entry,
    Index,
    Member,
    PackError,
    Shard,
    npy,
    write_index,
)
from selfforcing_dfd.data.journal import (
    JOURNAL_NAME,
    NUM_NAMED,
    Job,
    Journal,
    Refusal,
    differences,
    num_complete_shards,
)

__all__ = [
    "Job",
    "PackSummary",
    "Record",
    "Records",
    "Refusal",
    "Refuse",
    "Unfinished",
    "npy",
    "shard_folder",
    "write_folder",
    "write_shards",
]

Unfinished = Literal["discard", "keep", "resume"]
"""What happens to the partial folder of an interrupted run.

discard: it is removed, after an exception or at the next start. keep: it stays, and the next run
refuses to start while complete shards are in it. resume: as keep, but the next run goes on with it.
"""

OUR_FILES = r"shard-\d{6}\.tar|(index|curation)\.json|progress\.jsonl|[\w.-]+\.safetensors"


@dataclass(frozen=True, slots=True)
class PackSummary:
    """What was packed.

    refused: clips that cannot be used, damaged ones among them. skipped: files of other kinds.
    longer: how many files have frames left for at least one more sample. frames_left: how many
    frames these are.
    """

    folder: Path
    num_samples: int
    num_shards: int
    refused: tuple[Refusal, ...]
    skipped: tuple[str, ...] = ()
    longer: int = 0
    frames_left: int = 0

    @property
    def account(self) -> str:
        """`offered = packed + refused + damaged`, in numbers."""
        damaged = sum(refusal.damaged for refusal in self.refused)
        refused = len(self.refused) - damaged
        offered = self.num_samples + len(self.refused)
        return (
            f"{offered} offered = {self.num_samples} packed + {refused} refused + {damaged} damaged"
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One sample, its members as bytes.

    number: which item of the source it is. captions: by level, see `Entry`.
    """

    number: int
    key: str
    caption: str
    members: dict[str, bytes]
    captions: dict[str, str] = field(default_factory=dict)


Refuse = Callable[[int, Refusal], None]
Records = Callable[[int, Refuse], Iterator[Record]]
"""(first, refuse) -> the records of items first, first + 1, ... in order.

It calls `refuse(number, refusal)` for each item that becomes no record.
"""


def write_folder(
    out: Path | str,
    job: Job,
    records: Records,
    overwrite: bool = False,
    unfinished: Unfinished = "discard",
    attach: Callable[[Path], None] | None = None,
) -> PackSummary:
    """Write shards and index of a job, all or none.

    attach: writes more files into the folder. With "resume", a finished folder of the same job is
    left as it is. Raises PackError if `out` exists, if no item can be used, or if the interrupted
    run was another job.
    """
    out = Path(out)
    finished = finished_folder(out, job) if unfinished == "resume" else None
    if finished:
        return finished
    with shard_folder(out, overwrite, unfinished) as partial:
        journal = Journal(partial, job)
        for name, content in job.files.items():
            (partial / name).write_bytes(content)
        if attach:
            attach(partial)
        refused: dict[int, Refusal] = {}
        write_shards(partial, records(journal.next, refused.__setitem__), journal, refused)
        journal.refused += [refused[number] for number in sorted(refused) if number >= journal.next]
        check_account(job, journal)
        if not journal.samples and not job.may_be_empty:
            raise none_usable(job.name, job.num_items, journal.refused)
        index = Index(
            tuple(journal.shards),
            tuple(journal.samples),
            job.latent_shape,
            job.text_shape,
            job.fingerprints,
            tuple(refusal.to_fields() for refusal in journal.refused),
            job.about,
        )
        write_index(partial, index)
    return PackSummary(out, len(journal.samples), len(journal.shards), tuple(journal.refused))


@contextmanager
def shard_folder(
    out: Path, overwrite: bool = False, unfinished: Unfinished = "discard"
) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; until then `out` is as it was.

    Raises PackError as `check_target` does.
    """
    check_target(out, overwrite, unfinished)
    out = out.resolve()
    partial = _partial_of(out)
    if unfinished != "resume":
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        if unfinished == "discard" or not num_complete_shards(partial):
            shutil.rmtree(partial)
        raise
    replace_folder(partial, out)
    # only now: a run that is killed before the rename is resumed from the journal
    (out / JOURNAL_NAME).unlink(missing_ok=True)


def check_target(out: Path, overwrite: bool, unfinished: Unfinished) -> None:
    """PackError if `out` cannot be written.

    It exists and is not to be replaced, it holds other things than shards, or the partial folder
    of an interrupted run is there and is neither to be resumed nor replaced.
    """
    out = out.resolve()
    partial = _partial_of(out)
    if out.exists() and not overwrite:
        raise PackError(
            f"{out} exists; choose another folder, or replace it with overwrite (--overwrite)"
        )
    for folder in (out, partial):
        check_is_ours(folder)
    num_complete = num_complete_shards(partial)
    if unfinished == "keep" and num_complete and not overwrite:
        raise PackError(
            f"{partial} holds {num_complete} complete shards of an interrupted run; "
            "go on with them with --resume, or start again with --overwrite"
        )


def _partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def check_is_ours(folder: Path) -> None:
    """PackError if a folder that is about to be replaced holds anything but shards."""
    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    foreign = sorted(name for name in names if not re.fullmatch(OUR_FILES, name))
    if foreign:
        raise PackError(
            f"{folder} holds {', '.join(foreign[:3])}, not only shards; choose another folder"
        )


def finished_folder(out: Path, job: Job) -> PackSummary | None:
    """The summary of `out` if it is the finished result of this very job, and whole."""
    path = out / INDEX_NAME
    if not path.is_file():
        return None
    try:
        index = Index.from_json(path.read_text(encoding="utf-8"))
    except NO_INDEX:
        return None
    found = {
        "latent_shape": list(index.latent_shape),
        "text_shape": list(index.text_shape),
        "fingerprints": index.fingerprints,
        "about": index.about,
    }
    wanted = job.header()
    if differences(found, {name: wanted[name] for name in found}):
        return None
    (out / JOURNAL_NAME).unlink(missing_ok=True)
    return summary_of(out, index)


def summary_of(folder: Path, index: Index) -> PackSummary:
    refused = tuple(Refusal(**refusal) for refusal in index.refused)
    return PackSummary(folder, len(index.samples), len(index.shards), refused)


def none_usable(name: str, num_items: int, refused: list[Refusal]) -> PackError:
    first = "".join(f"\n  {refusal.file}: {refusal.reason}" for refusal in refused[:NUM_NAMED])
    return PackError(
        f"{name}: none of its {num_items} clips can be used; the first of them:{first}"
    )


def check_account(job: Job, journal: Journal) -> None:
    """PackError unless every item became a sample or was left out by name."""
    packed = len(journal.samples)
    refused = len(journal.refused)
    if packed + refused != job.num_items:
        raise PackError(
            f"{job.name}: {job.num_items} items were offered, {packed} packed and {refused} left "
            "out, which does not add up. This is a fault of this program; please report it"
        )


def write_shards(
    folder: Path, records: Iterable[Record], journal: Journal, refused: dict[int, Refusal]
) -> None:
    """Write `shard-%06d.tar` files and enter each into the journal when it is on disk.

    The same records give the same bytes. refused: by number; filled while records are made.
    """
    records = iter(records)
    while (first := next(records, None)) is not None:
        path = folder / f"shard-{len(journal.shards):06d}.tar"
        written: dict[str, Record] = {}
        next_item = first.number
        with path.open("wb") as file, TarWriter(file, mtime=0.0) as tar:
            for record in chain([first], islice(records, journal.shard_size - 1)):
                tar.write({"__key__": record.key, **record.members})
                written[record.key] = replace(record, members={})
                next_item = record.number + 1
        sync(path)
        numbers = sorted(number for number in refused if journal.next <= number < next_item)
        samples = [
            Entry(key, path.name, written[key].caption, members, written[key].captions)
            for key, members in tar_members(path).items()
        ]
        shard = Shard(path.name, path.stat().st_size, sha256_of(path))
        journal.add(shard, samples, [refused[number] for number in numbers], next_item)


def tar_members(path: Path) -> dict[str, dict[str, Member]]:
    """The members of a shard: key -> name without the key -> offset, size and checksum."""
    found: dict[str, dict[str, Member]] = {}
    with tarfile.open(path) as tar, path.open("rb") as file:
        for info in tar:
            file.seek(info.offset_data)
            checksum = zlib.crc32(file.read(info.size))
            key, _, name = info.name.partition(".")
            found.setdefault(key, {})[name] = Member(info.offset_data, info.size, checksum)
    return found
