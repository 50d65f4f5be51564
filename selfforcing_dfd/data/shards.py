"""Latents and text embeddings in webdataset tar shards, read through an index.

Tars are the storage: any webdataset tool reads them. The index is the data set: it knows where
each member lies, so samples are read in any order without parsing a tar. See `format` for the
files and `order` for the order in which training reads samples.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.data.format import (
    INDEX_NAME,
    LATENT,
    NEGATIVE_NAME,
    NO_INDEX,
    NOISE,
    PICTURE,
    PICTURE_TOKENS,
    Entry,
    Index,
    load_npy,
    pad_text,
)
from selfforcing_dfd.data.levels import Choice, draw_level, levels_of, text_member, unknown_level
from selfforcing_dfd.data.places import is_remote, place_of
from selfforcing_dfd.models.picture import Picture, conditioning_of


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
    float32, zeros past the caption's end. picture: latents [F, C, H, W] of the first video frame
    and grey ones after it, and an image encoder's states [T, D_image], both float32.
    """

    latents: Tensor
    text: Tensor
    caption: str
    key: str
    noise: Tensor | None
    picture: tuple[Tensor, Tensor] | None = None


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
    picture: Picture | None = None

    @property
    def conditioning(self) -> Conditioning:
        """What a network is asked for: the captions, with their pictures where there are some."""
        return conditioning_of(self.text, self.picture)


class ShardReader:
    """The samples of a shard folder, by number. Safe to share between threads.

    Opening checks the index, that each shard is there with its size, and the first sample. Every
    read checks checksum, dtype, shape and that values are finite; `verify` reads everything. All
    raise ShardError, and NonFiniteSampleError for values that are not finite.
    index_hash: SHA-256 of the index, which holds those of the shards.
    levels: of the captions; none where each sample has one caption.
    """

    def __init__(self, folder: Path | str, captions: Choice = ""):
        """folder: on disk, or an address (see `places`). captions: which level is read.

        ShardError for a level that the folder lacks.
        """
        self.place = place_of(folder)
        self.index, self.index_hash = self._open_index()
        self._shards = {shard.name: shard for shard in self.index.shards}
        self._check_shards()
        self._check_samples()
        self.levels = levels_of(self.index.samples[0].captions)
        self.choice = captions
        problem = unknown_level(captions, self.levels)
        if problem:
            raise ShardError(f"{self.place.name} {problem}")
        self._read_sample(0, self.level_of(0))

    def __len__(self) -> int:
        return len(self.index.samples)

    def __getitem__(self, number: int) -> Sample:
        """A sample with the caption that `level_of` names."""
        return self.read(number, self.level_of(number))

    def level_of(self, number: int) -> str:
        """The level of a sample's caption outside of training; empty where there are no levels.

        Where levels are mixed, it is drawn from the number alone.
        """
        if not self.levels:
            return ""
        if self.choice == "mixed":
            return draw_level(self.levels, 0, "caption of a sample", number)
        return self.choice or self.levels[-1]

    def level_at(self, number: int, seed: int, position: int) -> str:
        """As `level_of`, for a position of the stream that training reads.

        Where levels are mixed, it is drawn anew at each position.
        """
        if self.choice == "mixed":
            return draw_level(self.levels, seed, "caption level", position)
        return self.level_of(number)

    def read(self, number: int, level: str) -> Sample:
        """A sample with its caption of a level; the level is empty where there are none."""
        sample = self._read_sample(number, level)
        text = text_member(level)
        picture, tokens = sample.picture or (None, None)
        members = {LATENT: sample.latents, text: sample.text, NOISE: sample.noise}
        members |= {PICTURE: picture, PICTURE_TOKENS: tokens}
        for name, array in members.items():
            if array is not None and not bool(array.isfinite().all()):
                entry = self.index.samples[number]
                raise NonFiniteSampleError(
                    f"{self.place.name}/{entry.shard}: {entry.key}.{name} holds values that are "
                    "not finite, and did when it was packed. Training leaves such samples out; to "
                    "be rid of it, pack the clips again",
                    entry.key,
                )
        return sample

    def _read_sample(self, number: int, level: str) -> Sample:
        """A sample whose values may be anything."""
        entry = self.index.samples[number]
        name = text_member(level)
        tokens = self._array(entry, name)
        problem = self._text_problem(tokens)
        if problem:
            raise self._error(entry, name, problem)
        if self.has_clips:
            latents = self._clip_array(entry, LATENT)
        else:
            latents = torch.zeros(self.index.latent_shape)
        picture = None
        if self.has_pictures:
            picture = self._clip_array(entry, PICTURE), self._array(entry, PICTURE_TOKENS)
        return Sample(
            latents=latents,
            text=pad_text(tokens, self.index.text_shape[0]),
            caption=entry.captions[level] if level else entry.caption,
            key=entry.key,
            noise=self._clip_array(entry, NOISE) if self.has_noise else None,
            picture=picture,
        )

    @property
    def folder(self) -> Path:
        """On disk. UserError for a remote one."""
        return self.place.folder

    @property
    def has_clips(self) -> bool:
        """False for prompts alone."""
        return LATENT in self.index.samples[0].members

    @property
    def has_noise(self) -> bool:
        return NOISE in self.index.samples[0].members

    @property
    def has_pictures(self) -> bool:
        return PICTURE in self.index.samples[0].members

    @property
    def negative(self) -> Tensor | None:
        """[L, D] float32: the negative prompt's embedding, zeros past its end.

        None if the folder was packed without one.
        """
        packed = self.index.about.get("negative")
        if not packed:
            return None
        path = f"{self.place.name}/{NEGATIVE_NAME}"
        content = self.place.content(NEGATIVE_NAME)
        if content is None or hashlib.sha256(content).hexdigest() != packed["sha256"]:
            state = "missing" if content is None else "not as packed (SHA-256 differs)"
            raise ShardError(f"{path}: {state}; it holds the negative prompt. {self._remedy}")
        try:
            tokens = load(content)["text"].float()
        except (SafetensorError, KeyError) as error:
            raise ShardError(f"{path}: cannot be read ({error}). {self._remedy}") from error
        problem = self._text_problem(tokens)
        if problem:
            raise ShardError(f"{path}: {problem}")
        return pad_text(tokens, self.index.text_shape[0])

    @property
    def captions(self) -> list[str]:
        """Of all samples, as `reader[number].caption`."""
        if not self.levels:
            return [entry.caption for entry in self.index.samples]
        samples = enumerate(self.index.samples)
        return [entry.captions[self.level_of(number)] for number, entry in samples]

    def text_bytes(self, number: int) -> bytes:
        """The stored embedding of a sample's caption, as `reader[number].text`."""
        return self._read(self.index.samples[number], text_member(self.level_of(number)))

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
            if self.place.sha256(shard.name) != shard.sha256
        ]
        if changed:
            raise ShardError(
                f"{self.place.name}: {', '.join(changed)}: not as packed (SHA-256 differs). "
                f"{self._remedy}"
            )
        problems = [problem for number in range(len(self)) if (problem := self._problem(number))]
        if problems:
            raise ShardError(f"{self.place.name}: {'; '.join(problems)}")
        self.negative  # noqa: B018  reading it checks it

    def _problem(self, number: int) -> str:
        """What is wrong with a sample; empty if nothing is."""
        entry = self.index.samples[number]
        try:
            for named in self.levels or ("",):
                self.read(number, named)
        except NonFiniteSampleError as error:
            return str(error)
        about = json.loads(self._read(entry, "json")) if "json" in entry.members else {}
        packed = {"": about.get("caption", entry.caption), **about.get("captions", {})}
        stated = {"": entry.caption, **entry.captions}
        for level, caption in stated.items():
            found = packed.get(level)
            if found != caption:
                return f"{entry.key} was packed as {found!r}, but {INDEX_NAME} says {caption!r}"
        return ""

    @property
    def _remedy(self) -> str:
        if is_remote(self.place.name):
            return "Upload the folder again from where it is whole"
        again = f"`selfforcing-dfd pack CLIPS --out {self.place.name} --overwrite`"
        return f"Copy the folder again from where it is whole, or pack the clips again: {again}"

    def _error(self, entry: Entry, name: str, problem: str) -> ShardError:
        return ShardError(
            f"{self.place.name}/{entry.shard}: {entry.key}.{name} {problem}. {self._remedy}"
        )

    def _open_index(self) -> tuple[Index, str]:
        data = self.place.content(INDEX_NAME)
        if data is None:
            raise ShardError(
                f"{self.place.name}: no {INDEX_NAME}, so this is no finished shard folder. "
                f"{self._remedy}"
            )
        try:
            return Index.from_json(data.decode()), hashlib.sha256(data).hexdigest()
        except NO_INDEX as error:
            problem = f"{type(error).__name__}: {error}"
            raise ShardError(
                f"{self.place.name}/{INDEX_NAME}: not an index this program can read ({problem}). "
                f"{self._remedy}"
            ) from error

    def _check_shards(self) -> None:
        problems = []
        sizes = self.place.sizes([shard.name for shard in self.index.shards])
        for shard in self.index.shards:
            size = sizes.get(shard.name, -1)
            if size == -1:
                problems.append(f"{shard.name} is missing, the index wants {shard.bytes} bytes")
            elif size not in (None, shard.bytes):
                problems.append(f"{shard.name} has {size} bytes, the index wants {shard.bytes}")
        if problems:
            raise ShardError(f"{self.place.name}: {'; '.join(problems)}. {self._remedy}")

    def _check_samples(self) -> None:
        """What the index says of its samples agrees with itself."""
        sizes = {shard.name: shard.bytes for shard in self.index.shards}
        if not self.index.samples:
            raise ShardError(f"{self.place.name}: the index lists no samples. {self._remedy}")
        first = self.index.samples[0]
        levels = set(first.captions)
        texts = {text_member(level) for level in levels or {""}}
        wanted = texts | (_arrays_of(first) & {LATENT, NOISE, PICTURE, PICTURE_TOKENS})
        for entry in self.index.samples:
            arrays = _arrays_of(entry)
            if arrays != wanted:
                problem = f"has members {sorted(arrays)}, the first sample has {sorted(wanted)}"
                raise self._error(entry, "*", problem)
            if set(entry.captions) != levels:
                problem = (
                    f"has captions {sorted(entry.captions)}, the first sample {sorted(levels)}"
                )
                raise self._error(entry, "*", problem)
            for name, member in entry.members.items():
                end = member.offset + member.size
                if member.offset < 0 or end > sizes.get(entry.shard, -1):
                    problem = f"would end at byte {end}, past the end of its shard"
                    raise self._error(entry, name, problem)

    def _read(self, entry: Entry, name: str) -> bytes:
        member = entry.members[name]
        data = self.place.read(self._shards[entry.shard], member)
        if zlib.crc32(data) != member.crc32:
            raise self._error(entry, name, "is not what the index describes (CRC-32 differs)")
        return data

    def _array(self, entry: Entry, name: str) -> Tensor:
        data = self._read(entry, name)
        try:
            array = load_npy(data)
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
