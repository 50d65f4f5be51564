"""Latents and text embeddings in webdataset tar shards, read through an index.

Tars are the storage: any webdataset tool reads them. The index is the data set: it knows where
each member lies, so samples are read in any order without parsing a tar. The state of a data
stream is one integer, the position in an endless order that is a function of (seed, epoch).
Workers and ranks only decide who reads a position. See `format` for the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.common import UserError, sha256_of
from selfforcing_dfd.data.ahead import in_order
from selfforcing_dfd.data.format import (
    INDEX_NAME,
    LATENT,
    NEGATIVE_NAME,
    NO_INDEX,
    NOISE,
    TEXT,
    Entry,
    Index,
    load_npy,
    pad_text,
)


class ShardError(UserError):
    """A shard folder that cannot be trusted.

    The message says what was found, what was wanted and how to repair it.
    """


class NonFiniteSampleError(ShardError):
    """A sample that holds NaN or infinity as it was packed, so no copy of it is whole.

    key: of the sample.
    """

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[type[NonFiniteSampleError], tuple[str, str]]:
        """Processes tell each other of it."""
        return type(self), (str(self), self.key)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample.

    latents, noise: [F, C, H, W] float32; latents are zeros in a folder without clips. text: [L, D]
    float32, zeros past the caption's end.
    """

    latents: Tensor
    text: Tensor
    caption: str
    key: str
    noise: Tensor | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples side by side.

    latents, noise: [B, F, C, H, W] float32; latents are zeros where `has_clips` is False. text:
    [B, L, D] float32.
    """

    latents: Tensor
    text: Tensor
    captions: tuple[str, ...]
    keys: tuple[str, ...]
    noise: Tensor | None
    has_clips: bool = True


class ShardReader:
    """The samples of a shard folder, by number. Safe to share between threads.

    Opening checks the index, that each shard is there with its size, and the first sample. Every
    read checks checksum, dtype, shape and that values are finite; `verify` reads everything. All
    raise ShardError, and NonFiniteSampleError for values that are not finite.
    index_hash: SHA-256 of the index, which holds those of the shards.
    """

    def __init__(self, folder: Path | str):
        self._files: dict[str, int] = {}
        self._opening = Lock()
        self.folder = Path(folder)
        self.index, self.index_hash = self._open_index()
        self._check_shards()
        self._check_samples()
        self._read_sample(0)

    def __len__(self) -> int:
        return len(self.index.samples)

    def __getitem__(self, number: int) -> Sample:
        sample = self._read_sample(number)
        for name, array in ((LATENT, sample.latents), (TEXT, sample.text), (NOISE, sample.noise)):
            if array is not None and not bool(array.isfinite().all()):
                entry = self.index.samples[number]
                raise NonFiniteSampleError(
                    f"{self.folder / entry.shard}: {entry.key}.{name} holds values that are not "
                    "finite, and did when it was packed. Training leaves such samples out; to be "
                    "rid of it, pack the clips again",
                    entry.key,
                )
        return sample

    def _read_sample(self, number: int) -> Sample:
        """A sample whose values may be anything."""
        entry = self.index.samples[number]
        tokens = self._array(entry, TEXT)
        problem = self._text_problem(tokens)
        if problem:
            raise self._error(entry, TEXT, problem)
        if self.has_clips:
            latents = self._clip_array(entry, LATENT)
        else:
            latents = torch.zeros(self.index.latent_shape)
        return Sample(
            latents=latents,
            text=pad_text(tokens, self.index.text_shape[0]),
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
        """[L, D] float32: the negative prompt's embedding, zeros past its end.

        None if the folder was packed without one.
        """
        packed = self.index.about.get("negative")
        if not packed:
            return None
        path = self.folder / NEGATIVE_NAME
        if not path.is_file() or sha256_of(path) != packed["sha256"]:
            state = "not as packed (SHA-256 differs)" if path.is_file() else "missing"
            raise ShardError(f"{path}: {state}; it holds the negative prompt. {self._remedy}")
        try:
            with safe_open(path, "pt") as file:
                tokens = file.get_tensor("text").float()
        except SafetensorError as error:
            raise ShardError(f"{path}: cannot be read ({error}). {self._remedy}") from error
        problem = self._text_problem(tokens)
        if problem:
            raise ShardError(f"{path}: {problem}")
        return pad_text(tokens, self.index.text_shape[0])

    @property
    def captions(self) -> list[str]:
        return [entry.caption for entry in self.index.samples]

    def members(self, number: int) -> dict[str, bytes]:
        """The stored bytes of a sample's members, checksums verified."""
        entry = self.index.samples[number]
        return {name: self._read(entry, name) for name in entry.members}

    def verify(self) -> None:
        """Recompute every checksum and read every sample, and compare captions with the shards'.

        The error names all damaged shards, or all samples that cannot be used.
        """
        changed = [
            shard.name
            for shard in self.index.shards
            if sha256_of(self.folder / shard.name) != shard.sha256
        ]
        if changed:
            raise ShardError(
                f"{self.folder}: {', '.join(changed)}: not as packed (SHA-256 differs). "
                f"{self._remedy}"
            )
        problems = [problem for number in range(len(self)) if (problem := self._problem(number))]
        if problems:
            raise ShardError(f"{self.folder}: {'; '.join(problems)}")
        self.negative  # noqa: B018  reading it checks it

    def _problem(self, number: int) -> str:
        """What is wrong with a sample; empty if nothing is."""
        entry = self.index.samples[number]
        try:
            self[number]
        except NonFiniteSampleError as error:
            return str(error)
        about = json.loads(self._read(entry, "json")) if "json" in entry.members else {}
        packed = about.get("caption", entry.caption)
        if packed == entry.caption:
            return ""
        return f"{entry.key} was packed as {packed!r}, but {INDEX_NAME} says {entry.caption!r}"

    @property
    def _remedy(self) -> str:
        again = f"`selfforcing-dfd pack CLIPS --out {self.folder} --overwrite`"
        return f"Copy the folder again from where it is whole, or pack the clips again: {again}"

    def _error(self, entry: Entry, name: str, problem: str) -> ShardError:
        return ShardError(
            f"{self.folder / entry.shard}: {entry.key}.{name} {problem}. {self._remedy}"
        )

    def _open_index(self) -> tuple[Index, str]:
        path = self.folder / INDEX_NAME
        if not path.is_file():
            raise ShardError(
                f"{self.folder}: no {INDEX_NAME}, so this is no finished shard folder. "
                f"{self._remedy}"
            )
        data = path.read_bytes()
        try:
            return Index.from_json(data.decode()), hashlib.sha256(data).hexdigest()
        except NO_INDEX as error:
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
        wanted = {TEXT} | (_arrays_of(self.index.samples[0]) & {LATENT, NOISE})
        for entry in self.index.samples:
            arrays = _arrays_of(entry)
            if arrays != wanted:
                problem = f"has members {sorted(arrays)}, the first sample has {sorted(wanted)}"
                raise self._error(entry, "*", problem)
            for name, member in entry.members.items():
                end = member.offset + member.size
                if member.offset < 0 or end > sizes.get(entry.shard, 0):
                    problem = f"would end at byte {end}, past the end of its shard"
                    raise self._error(entry, name, problem)

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
            array = load_npy(self._read(entry, name))
        except (ValueError, EOFError) as error:
            raise self._error(entry, name, f"is no .npy array ({error})") from error
        if array.dtype not in (np.float16, np.float32):
            raise self._error(entry, name, f"has dtype {array.dtype}, want float16 or float32")
        return torch.from_numpy(array).float()

    def _clip_array(self, entry: Entry, name: str) -> Tensor:
        array = self._array(entry, name)
        wanted = self.index.latent_shape
        if tuple(array.shape) != wanted:
            problem = f"is {list(array.shape)}, the index wants {list(wanted)}"
            raise self._error(entry, name, problem)
        return array

    def _text_problem(self, tokens: Tensor) -> str:
        """What is wrong with the shape of [n, D]; empty if nothing is."""
        length, dim = self.index.text_shape
        if tokens.shape[1:] == (dim,) and len(tokens) <= length:
            return ""
        return f"is {list(tokens.shape)}, the index wants [at most {length}, {dim}]"


def _arrays_of(entry: Entry) -> set[str]:
    return {name for name in entry.members if name.endswith(".npy")}


class SampleOrder:
    """An endless order: position n of the stream is sample `arrangement(n // N)[n % N]`.

    Every sample comes exactly once per epoch. aside: samples that are left out, with the position
    from which on; another one, drawn for that position, comes in their place, so all others stay
    where they are. ValueError if nothing is left.
    """

    def __init__(self, num_samples: int, seed: int, aside: Mapping[int, int] | None = None):
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; want at least 1")
        self.aside = dict(aside or {})
        if len(self.aside) >= num_samples:
            raise ValueError(f"all {num_samples} samples are set aside; none is left to train on")
        self.num_samples = num_samples
        self.seed = seed
        # two, as a batch may straddle epochs
        self._arrangement = lru_cache(maxsize=2)(self.arrangement)

    def sample_at(self, position: int) -> int:
        """The sample number at a position of the stream, 0 <= position without end."""
        epoch, rest = divmod(position, self.num_samples)
        number = self._arrangement(epoch)[rest]
        attempt = 0
        while position >= self.aside.get(number, math.inf):
            drawn = rng.uniform((), self.seed, "instead", position, attempt)
            number = int(drawn * self.num_samples)
            attempt += 1
        return number

    def arrangement(self, epoch: int) -> list[int]:
        """All sample numbers in the order of one epoch."""
        generator = rng.generator(self.seed, "order", epoch)
        return torch.randperm(self.num_samples, generator=generator).tolist()


def load_batch(reader: ShardReader, order: SampleOrder, start: int, size: int) -> Batch:
    """The samples at positions start, start + 1, ... start + size - 1."""
    samples = [reader[order.sample_at(start + i)] for i in range(size)]
    latents = torch.stack([sample.latents for sample in samples])
    text = torch.stack([sample.text for sample in samples])
    noise = [sample.noise for sample in samples if sample.noise is not None]
    captions = tuple(sample.caption for sample in samples)
    keys = tuple(sample.key for sample in samples)
    stacked_noise = torch.stack(noise) if noise else None
    return Batch(latents, text, captions, keys, stacked_noise, reader.has_clips)


def batches(
    reader: ShardReader, order: SampleOrder, starts: Iterable[int], size: int, num_workers: int = 0
) -> Iterator[Batch]:
    """`load_batch` for each of `starts`, in order; they may be endless.

    Rank r of R with batches of B starts at r B, r B + R B, ... Workers only read ahead.
    """
    return in_order(lambda start: load_batch(reader, order, start, size), starts, num_workers)
