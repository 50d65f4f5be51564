"""Latents and text embeddings in webdataset tar shards, read through an index.

Tars are the storage: any webdataset tool reads them. The index is the dataset: it knows where each
member lies, so samples are read in any order without parsing a tar, and the state of a data stream
is one integer, the position in an endless order that is a function of (seed, epoch). Workers and
ranks only decide who reads a position.

    <key>.latent.npy   float16 or float32 [F, C, H, W]; none in a folder of prompts without clips
    <key>.text.npy     float16 or float32 [n, D], trimmed to the valid tokens
    <key>.noise.npy    optional: the noise to which the teacher's probability-flow ODE maps this
      sample
    <key>.json         caption, source, num_video_frames, fingerprints of codec and text encoder

Beside the shards may lie `negative.safetensors`: key `text`, the negative prompt's embedding [n,
D], trimmed likewise.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.ahead import in_order

FORMAT_VERSION = 1
INDEX_NAME, NEGATIVE_NAME = "index.json", "negative.safetensors"
LATENT, TEXT, NOISE = "latent.npy", "text.npy", "noise.npy"


class ShardError(UserError):
    """A shard folder that cannot be trusted; the message says what was found, what was wanted and
    how to repair it.
    """


@dataclass(frozen=True, slots=True)
class Shard:
    """name: file name within the folder; bytes: its size; sha256: of the whole file."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Member:
    """Where one array lies in its shard, in bytes, and the CRC-32 that is checked on every read."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample of the index. members: by name without the key, for example `latent.npy`."""

    key: str
    shard: str
    caption: str
    members: dict[str, Member]

    def to_fields(self) -> dict[str, Any]:
        members = {
            name: [place.offset, place.size, place.crc32] for name, place in self.members.items()
        }
        return {"key": self.key, "shard": self.shard, "caption": self.caption, "members": members}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Entry:
        members = {name: Member(*place) for name, place in fields["members"].items()}
        return cls(fields["key"], fields["shard"], fields["caption"], members)


@dataclass(frozen=True, slots=True)
class Index:
    """All about a shard folder but the arrays. fingerprints: of `codec`, `text` and, where there is
    noise, `noise`.

    about: what was packed and how: `source` (number and SHA-256 of its list), `settings`,
    `negative` (prompt and SHA-256 of its file) where there is one, `part` where it is one of
    several. Empty in folders packed before there was any.
    """

    shards: tuple[Shard, ...]
    samples: tuple[Entry, ...]
    latent_shape: tuple[int, ...]  # F, C, H, W
    text_shape: tuple[int, ...]  # padded length L, D
    fingerprints: dict[str, str]
    refused: tuple[dict[str, str], ...]  # file and reason of each clip that the packer left out
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        shards, samples = (
            [asdict(s) for s in self.shards],
            [entry.to_fields() for entry in self.samples],
        )
        rest = ("latent_shape", "text_shape", "fingerprints", "refused", "about")
        fields = {"version": FORMAT_VERSION, "shards": shards, "samples": samples}
        return json.dumps(fields | {name: getattr(self, name) for name in rest}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Index:
        fields = json.loads(text)
        if fields["version"] != FORMAT_VERSION:
            raise ValueError(
                f"format version {fields['version']}, this program reads version {FORMAT_VERSION}"
            )
        samples = tuple(Entry.from_fields(sample) for sample in fields["samples"])
        return cls(
            shards=tuple(Shard(**shard) for shard in fields["shards"]),
            samples=samples,
            latent_shape=tuple(fields["latent_shape"]),
            text_shape=tuple(fields["text_shape"]),
            fingerprints=fields["fingerprints"],
            refused=tuple(fields["refused"]),
            about=fields.get("about", {}),
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """latents, noise: [F, C, H, W] float32, zeros without clips; text: [L, D] float32, zeros past
    the caption's end.
    """

    latents: Tensor
    text: Tensor
    caption: str
    key: str
    noise: Tensor | None


@dataclass(frozen=True, slots=True)
class Batch:
    """latents, noise: [B, F, C, H, W] float32; text: [B, L, D] float32. Without clips latents are
    zeros, of the right shape.
    """

    latents: Tensor
    text: Tensor
    captions: tuple[str, ...]
    keys: tuple[str, ...]
    noise: Tensor | None
    has_clips: bool = True


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pad_text(tokens: Tensor, length: int) -> Tensor:
    """[n, D] -> [length, D], zeros past n."""
    return torch.nn.functional.pad(tokens, (0, 0, 0, length - len(tokens)))


class ShardReader:
    """The samples of a shard folder, by number. Safe to share between threads: every read carries
    its own offset.

    Opening checks the index, that each shard is there with its size, and the first sample; every
    read checks checksum, dtype and shape; `verify` reads everything. index_hash: SHA-256 of the
    index, which holds the shards' own.
    """

    def __init__(self, folder: Path | str):
        self._files: dict[str, int] = {}
        self._opening = Lock()
        self.folder = Path(folder)
        self.index, self.index_hash = self._open_index()
        self._check_shards()
        self._check_samples()
        self[0]

    def __len__(self) -> int:
        return len(self.index.samples)

    def __getitem__(self, number: int) -> Sample:
        entry = self.index.samples[number]
        length, dim = self.index.text_shape
        tokens = self._array(entry, TEXT)
        if tokens.shape[1:] != (dim,) or len(tokens) > length:
            raise self._error(
                entry, TEXT, f"is {list(tokens.shape)}, the index wants [at most {length}, {dim}]"
            )
        return Sample(
            latents=self._clip_array(entry, LATENT)
            if self.has_clips
            else torch.zeros(self.index.latent_shape),
            text=pad_text(tokens, length),
            caption=entry.caption,
            key=entry.key,
            noise=self._clip_array(entry, NOISE) if self.has_noise else None,
        )

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    @property
    def has_clips(self) -> bool:
        """False for prompts alone."""
        return LATENT in self.index.samples[0].members

    @property
    def has_noise(self) -> bool:
        return NOISE in self.index.samples[0].members

    @property
    def negative(self) -> Tensor | None:
        """[L, D] float32: the negative prompt's embedding, zeros past its end; None if the folder
        was packed without.
        """
        packed = self.index.about.get("negative")
        if not packed:
            return None
        path, (length, dim) = self.folder / NEGATIVE_NAME, self.index.text_shape
        if not path.is_file() or sha256_of(path) != packed["sha256"]:
            state = "not as packed (SHA-256 differs)" if path.is_file() else "missing"
            raise ShardError(f"{path}: {state}; it holds the negative prompt. {self._remedy}")
        try:
            with safe_open(path, "pt") as file:
                tokens = file.get_tensor("text").float()
        except SafetensorError as error:
            raise ShardError(f"{path}: cannot be read ({error}). {self._remedy}") from error
        if tokens.shape[1:] != (dim,) or len(tokens) > length:
            raise ShardError(
                f"{path}: is {list(tokens.shape)}, the index wants [at most {length}, {dim}]"
            )
        return pad_text(tokens, length)

    @property
    def captions(self) -> list[str]:
        return [entry.caption for entry in self.index.samples]

    @property
    def caption_ids(self) -> list[int]:
        """One number per sample, equal where captions are equal: the `group` of a `SampleOrder`."""
        ids: dict[str, int] = {}
        return [ids.setdefault(caption, len(ids)) for caption in self.captions]

    def members(self, number: int) -> dict[str, bytes]:
        """The stored bytes of a sample's members, checksums verified."""
        entry = self.index.samples[number]
        return {name: self._read(entry, name) for name in entry.members}

    def verify(self) -> None:
        """Recompute every checksum and read every sample; the ShardError names all shards that
        differ.
        """
        changed = [
            shard.name
            for shard in self.index.shards
            if sha256_of(self.folder / shard.name) != shard.sha256
        ]
        if changed:
            raise ShardError(
                f"{self.folder}: {', '.join(changed)}: not as packed (SHA-256 differs). {self._remedy}"
            )
        for number in range(len(self)):
            self[number]
        self.negative  # noqa: B018  reading it checks it

    @property
    def _remedy(self) -> str:
        again = f"`python -m selfforcing_dfd pack CLIPS --out {self.folder} --overwrite`"
        return f"Copy the folder again from where it is whole, or pack the clips again: {again}"

    def _error(self, entry: Entry, name: str, problem: str) -> ShardError:
        return ShardError(
            f"{self.folder / entry.shard}: {entry.key}.{name} {problem}. {self._remedy}"
        )

    def _open_index(self) -> tuple[Index, str]:
        path = self.folder / INDEX_NAME
        if not path.is_file():
            raise ShardError(
                f"{self.folder}: no {INDEX_NAME}, so this is no finished shard folder. {self._remedy}"
            )
        data = path.read_bytes()
        try:
            return Index.from_json(data.decode()), hashlib.sha256(data).hexdigest()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ShardError(
                f"{path}: not an index this program can read ({problem}). {self._remedy}"
            ) from error

    def _check_shards(self) -> None:
        problems = []
        for shard in self.index.shards:
            path = self.folder / shard.name
            if not path.is_file():
                problems.append(f"{shard.name} is missing, the index wants {shard.bytes} bytes")
            elif path.stat().st_size != shard.bytes:
                problems.append(
                    f"{shard.name} has {path.stat().st_size} bytes, the index wants {shard.bytes}"
                )
        if problems:
            raise ShardError(f"{self.folder}: {'; '.join(problems)}. {self._remedy}")

    def _check_samples(self) -> None:
        """What the index says of its samples agrees with itself."""
        sizes = {shard.name: shard.bytes for shard in self.index.shards}
        if not self.index.samples:
            raise ShardError(f"{self.folder}: the index lists no samples. {self._remedy}")
        wanted = {TEXT, *([LATENT] if self.has_clips else []), *([NOISE] if self.has_noise else [])}
        for entry in self.index.samples:
            arrays = {name for name in entry.members if name.endswith(".npy")}
            if arrays != wanted:
                raise self._error(
                    entry,
                    "*",
                    f"has members {sorted(arrays)}, the first sample has {sorted(wanted)}",
                )
            for name, member in entry.members.items():
                end = member.offset + member.size
                if member.offset < 0 or end > sizes.get(entry.shard, 0):
                    raise self._error(
                        entry, name, f"would end at byte {end}, past the end of its shard"
                    )

    def _read(self, entry: Entry, name: str) -> bytes:
        member = entry.members[name]
        with self._opening:
            if entry.shard not in self._files:
                self._files[entry.shard] = os.open(self.folder / entry.shard, os.O_RDONLY)
        data = os.pread(self._files[entry.shard], member.size, member.offset)
        if zlib.crc32(data) != member.crc32:
            raise self._error(entry, name, "is not what the index describes (CRC-32 differs)")
        return data

    def _array(self, entry: Entry, name: str) -> Tensor:
        try:
            array = np.load(io.BytesIO(self._read(entry, name)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise self._error(entry, name, f"is no .npy array ({error})") from error
        if array.dtype not in (np.float16, np.float32):
            raise self._error(entry, name, f"has dtype {array.dtype}, want float16 or float32")
        return torch.from_numpy(array).float()

    def _clip_array(self, entry: Entry, name: str) -> Tensor:
        array, wanted = self._array(entry, name), self.index.latent_shape
        if tuple(array.shape) != wanted:
            raise self._error(
                entry, name, f"is {list(array.shape)}, the index wants {list(wanted)}"
            )
        return array


class SampleOrder:
    """An endless order: position n of the stream is sample `arrangement(seed, n // N)[n % N]`.

    With group_size g > 1, runs of g positions that start at a multiple of g share one caption as
    far as counts allow. What is left of each caption comes last, also by caption; where g does not
    divide N, some of it comes first, so that the runs still start at multiples of g. Every sample
    comes exactly once per epoch either way.
    """

    def __init__(
        self, num_samples: int, seed: int, group: Sequence[int] | None = None, group_size: int = 1
    ):
        if num_samples < 1 or group_size < 1:
            raise ValueError(
                f"num_samples is {num_samples} and group_size {group_size}; want both to be at least 1"
            )
        if group_size > 1 and (group is None or len(group) != num_samples):
            got = "no ids" if group is None else f"{len(group)} ids"
            raise ValueError(
                f"group_size {group_size} needs {num_samples} caption ids, one per sample; got {got}"
            )
        self.num_samples, self.seed, self.group_size = num_samples, seed, group_size
        self._group = group or [0] * num_samples
        # two, as a batch may straddle epochs
        self._arrangement = lru_cache(maxsize=2)(self.arrangement)

    def sample_at(self, position: int) -> int:
        """The sample number at a position of the stream, 0 <= position without end."""
        epoch, place = divmod(position, self.num_samples)
        return self._arrangement(epoch)[place]

    def arrangement(self, epoch: int) -> list[int]:
        """All sample numbers in the order of one epoch."""
        generator = rng.generator(self.seed, "order", epoch)
        shuffled = torch.randperm(self.num_samples, generator=generator).tolist()
        if self.group_size == 1:
            return shuffled
        by_caption: dict[int, list[int]] = defaultdict(list)
        for sample in shuffled:
            by_caption[self._group[sample]].append(sample)
        g = self.group_size
        runs = [
            members[i : i + g] for members in by_caption.values() for i in range(0, len(members), g)
        ]
        full = [run for run in runs if len(run) == g]
        left = [sample for run in runs if len(run) < g for sample in run]
        full = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        num_first = -epoch * self.num_samples % g
        while len(left) < num_first and full:
            left += full.pop()
        return left[:num_first] + [sample for run in full for sample in run] + left[num_first:]


def load_batch(
    reader: ShardReader, order: SampleOrder, start: int, size: int, stride: int = 1, offset: int = 0
) -> Batch:
    """The samples at positions start + offset + stride i, i < size.

    Rank r of R reads stride R and offset r, or stride 1 and offset r * size where a group must stay
    on one rank.
    """
    samples = [reader[order.sample_at(start + offset + stride * i)] for i in range(size)]
    noise = [sample.noise for sample in samples if sample.noise is not None]
    return Batch(
        latents=torch.stack([sample.latents for sample in samples]),
        text=torch.stack([sample.text for sample in samples]),
        captions=tuple(sample.caption for sample in samples),
        keys=tuple(sample.key for sample in samples),
        noise=torch.stack(noise) if noise else None,
        has_clips=reader.has_clips,
    )


def batches(
    reader: ShardReader,
    order: SampleOrder,
    starts: Iterable[int],
    size: int,
    num_workers: int = 0,
    stride: int = 1,
    offset: int = 0,
) -> Iterator[Batch]:
    """`load_batch` for each of `starts` (may be endless), in order. Workers only read ahead and
    change nothing.
    """

    def load(start: int) -> Batch:
        return load_batch(reader, order, start, size, stride, offset)

    return in_order(load, starts, num_workers)
