"""Records into shards, shard by shard, with a journal from which an interrupted run goes on to the
same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from webdataset import TarWriter

from selfforcing_dfd.common import sync
from selfforcing_dfd.data.publish import JOURNAL_NAME, Unfinished, published
from selfforcing_dfd.data.shards import (
    INDEX_NAME,
    NEGATIVE_NAME,
    Entry,
    Index,
    Member,
    Shard,
    sha256_of,
)
from selfforcing_dfd.data.sources.files import PackError

NUM_NAMED = 5


@dataclass(frozen=True, slots=True)
class Refusal:
    """A clip that was left out."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class PackSummary:
    folder: Path
    num_samples: int
    num_shards: int
    refused: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One sample on its way into a shard, its members as bytes. number: its clip's place in the
    source.
    """

    number: int
    key: str
    caption: str
    members: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Job:
    """All that decides the bytes of a shard folder, but for the clips themselves. num_items: clips
    in the source.

    files: further ones beside the shards, by name, the same for every run. May hold no samples if
    `may_be_empty`.
    """

    name: str
    num_items: int
    latent_shape: tuple[int, ...]
    text_shape: tuple[int, ...]
    fingerprints: dict[str, str]
    about: dict[str, Any]
    shard_size: int
    files: Mapping[str, bytes] = field(default_factory=dict)
    may_be_empty: bool = False

    def header(self) -> dict[str, Any]:
        """What a run must agree in with the one that it resumes."""
        names = ("latent_shape", "text_shape", "fingerprints", "about", "shard_size")
        return dict(json.loads(json.dumps({name: getattr(self, name) for name in names})))


Refuse = Callable[[int, Refusal], None]
Records = Callable[[int, Refuse], Iterator[Record]]
"""(first, refuse) -> the records of items first, first + 1, ... in order, with `refuse(number,
refusal)` for the others.
"""


def write_folder(
    out: Path | str,
    job: Job,
    records: Records,
    overwrite: bool = False,
    unfinished: Unfinished = "discard",
    attach: Callable[[Path], None] | None = None,
) -> PackSummary:
    """Write shards and index of a job, all or none; see `published`. attach: writes more files into
    the folder.

    PackError: `out` exists, nothing can be used, or the interrupted run to go on with was another
    job. With "resume", a finished folder of the same job is left as it is.
    """
    out = Path(out)
    if unfinished == "resume" and (finished := finished_folder(out, job)):
        return finished
    with published(out, overwrite, unfinished) as partial:
        journal = Journal(partial, job)
        for name, content in job.files.items():
            (partial / name).write_bytes(content)
        if attach:
            attach(partial)
        refused: dict[int, Refusal] = {}
        write_shards(partial, records(journal.next, refused.__setitem__), journal, refused)
        journal.refused += [refused[number] for number in sorted(refused) if number >= journal.next]
        if not journal.samples and not job.may_be_empty:
            reasons = "".join(
                f"\n  {refusal.file}: {refusal.reason}" for refusal in journal.refused[:NUM_NAMED]
            )
            counted = f"none of its {job.num_items} clips can be used"
            raise PackError(f"{job.name}: {counted}; the first of them:{reasons}")
        left_out = tuple(asdict(refusal) for refusal in journal.refused)
        shards, samples = tuple(journal.shards), tuple(journal.samples)
        index = Index(
            shards, samples, job.latent_shape, job.text_shape, job.fingerprints, left_out, job.about
        )
        write_index(partial, index)
    return PackSummary(out, len(samples), len(shards), tuple(journal.refused))


class Journal:
    """What of a partial folder is complete: a line that describes the job, then a line for each
    shard.

    A shard is entered when it is on disk. `next` is the first item that no complete shard has dealt
    with.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        """Of a run that begins here, or goes on where the journal ends. PackError if that was
        another job.
        """
        self.path, self.shard_size, self.next = folder / JOURNAL_NAME, job.shard_size, 0
        self.shards: list[Shard] = []
        self.samples: list[Entry] = []
        self.refused: list[Refusal] = []
        lines = self._complete_lines()
        header, *entries = lines or [job.header()]
        if changes := differences(header, job.header()):
            begun = f"{folder} was begun otherwise: {'; '.join(changes[:NUM_NAMED])}"
            raise PackError(
                f"{begun}. Go on with what it was begun with, or start anew with --overwrite, not --resume"
            )
        for entry in entries:
            self._enter(entry)
        if not lines:
            self.path.write_text(json.dumps(header) + "\n")
        for path in folder.iterdir():
            if path != self.path and path.name not in {shard.name for shard in self.shards}:
                path.unlink()

    def add(
        self, shard: Shard, samples: list[Entry], refused: list[Refusal], following: int
    ) -> None:
        """Enter a shard whose file is on disk. following: the number after its last sample's."""
        entry = {
            "shard": asdict(shard),
            "samples": [sample.to_fields() for sample in samples],
            "refused": [asdict(refusal) for refusal in refused],
            "next": following,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        sync(self.path)
        self._enter(entry)

    def _enter(self, entry: dict[str, Any]) -> None:
        shard = Shard(**entry["shard"])
        path = self.path.with_name(shard.name)
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise PackError(
                f"{path} is not as it was left ({shard.bytes} bytes); start anew with --overwrite"
            )
        self.shards.append(shard)
        self.samples += [Entry.from_fields(fields) for fields in entry["samples"]]
        self.refused += [Refusal(**fields) for fields in entry["refused"]]
        self.next = entry["next"]

    def _complete_lines(self) -> list[dict[str, Any]]:
        """After cutting off a last line that a killed process left without its end."""
        if not self.path.is_file():
            return []
        text = self.path.read_bytes()
        os.truncate(self.path, text.rfind(b"\n") + 1)
        return [json.loads(line) for line in text.split(b"\n")[:-1]]


def write_shards(
    folder: Path,
    records: Iterable[Record],
    journal: Journal,
    refused: Mapping[int, Refusal] | None = None,
) -> None:
    """Write `shard-%06d.tar`, each entered into the journal when it is on disk; the same records
    give the same bytes.
    """
    records = iter(records)
    while (first := next(records, None)) is not None:
        path = folder / f"shard-{len(journal.shards):06d}.tar"
        captions: dict[str, str] = {}
        following = first.number
        with path.open("wb") as file, TarWriter(file, mtime=0.0) as tar:
            for record in chain([first], islice(records, journal.shard_size - 1)):
                tar.write({"__key__": record.key, **record.members})
                captions[record.key], following = record.caption, record.number + 1
        sync(path)
        left_out = [
            (refused or {})[n] for n in sorted(refused or {}) if journal.next <= n < following
        ]
        samples = [
            Entry(key, path.name, captions[key], members)
            for key, members in tar_members(path).items()
        ]
        journal.add(
            Shard(path.name, path.stat().st_size, sha256_of(path)), samples, left_out, following
        )


def tar_members(path: Path) -> dict[str, dict[str, Member]]:
    """Where each member of a tar lies: key -> name without the key -> place."""
    places: dict[str, dict[str, Member]] = {}
    with tarfile.open(path) as tar, path.open("rb") as file:
        for info in tar:
            file.seek(info.offset_data)
            key, _, name = info.name.partition(".")
            places.setdefault(key, {})[name] = Member(
                info.offset_data, info.size, zlib.crc32(file.read(info.size))
            )
    return places


def write_index(folder: Path, index: Index) -> None:
    (folder / INDEX_NAME).write_text(index.to_json(), encoding="utf-8")


def finished_folder(out: Path, job: Job) -> PackSummary | None:
    """The summary of `out` if it is the finished result of this very job."""
    path = out / INDEX_NAME
    if not path.is_file():
        return None
    index = Index.from_json(path.read_text(encoding="utf-8"))
    made = {
        name: getattr(index, name)
        for name in ("latent_shape", "text_shape", "fingerprints", "about")
    }
    if differences(json.loads(json.dumps(made)), {name: job.header()[name] for name in made}):
        return None
    (out / JOURNAL_NAME).unlink(missing_ok=True)
    return PackSummary(
        out,
        len(index.samples),
        len(index.shards),
        tuple(Refusal(**refusal) for refusal in index.refused),
    )


def differences(was: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> list[str]:
    """`settings.fps was 16, is 24` for every value in which two trees differ."""
    found = []
    for name in {**was, **now}:
        before, after = was.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{place}{name}.")
        elif before != after:
            found.append(f"{place}{name} was {before}, is {after}")
    return found


def npy(tensor: Tensor, dtype: str, name: str) -> bytes:
    """As the bytes of a .npy file. PackError if a value is not finite in `dtype`."""
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is reported below
        array = tensor.detach().float().cpu().numpy().astype(dtype)
    if not np.isfinite(array).all():
        raise PackError(
            f"{name}: NaN, infinity or too large for {dtype}; check the clip and the codec, or store float32"
        )
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def trim(tokens: Tensor) -> Tensor:
    """[L, D] -> [n, D]: without the zeros past the caption's end."""
    valid = tokens.ne(0).any(-1).nonzero()
    return tokens[: int(valid.max()) + 1] if len(valid) else tokens[:0]


def negative_files(
    tokens: Tensor | None, prompt: str, dtype: str
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What `ShardReader.negative` reads, by file name, and what the index says of it; nothing
    without a negative prompt.

    tokens: [L, D]; stored trimmed, in the dtype of the shards.
    """
    if tokens is None:
        return {}, {}
    rows = torch.from_numpy(np.load(io.BytesIO(npy(trim(tokens), dtype, "the negative prompt"))))
    content = save({"text": rows.contiguous()}, {"prompt": prompt})
    about = {"prompt": prompt, "sha256": hashlib.sha256(content).hexdigest()}
    return {NEGATIVE_NAME: content}, {"negative": about}
