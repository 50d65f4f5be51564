"""What a shard folder consists of: file names, the index, and arrays as bytes.

    <key>.latent.npy   float16 or float32 [F, C, H, W]; none in a folder of prompts without clips
    <key>.text.npy     float16 or float32 [n, D], without the zeros past the caption's end; where
                       captions have levels, one for each: text.short.npy, text.medium.npy, ...
    <key>.noise.npy    optional: the noise that the teacher's ODE maps to this sample
    <key>.picture.latent.npy, <key>.picture.tokens.npy
                       optional: the clip's first video frame as Wan2.1-I2V sees it, latents
                       [F, C, H, W] of this frame followed by grey ones, and states [T, D_image] of
                       an image encoder
    <key>.json         caption, source, where captions have levels all of them as `captions`, and
                       for clips num_video_frames and the fingerprints

All of these are members of `shard-%06d.tar`. Beside the shards lie `index.json` and, where a
negative prompt was encoded, `negative.safetensors`: key `text`, [n, D].
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfforcing_dfd.common import SEAL, UserError, is_as_sealed, sealed
from selfforcing_dfd.data.levels import LEVELS

FORMAT_VERSION = 1
MOST = 65_536  # of a shape: far more than clips and captions have
INDEX_NAME = "index.json"
NEGATIVE_NAME = "negative.safetensors"
LATENT = "latent.npy"
TEXT = "text.npy"
NOISE = "noise.npy"
PICTURE = "picture.latent.npy"
PICTURE_TOKENS = "picture.tokens.npy"
KEYS = {
    *("version", "shards", "samples", "latent_shape", "text_shape", "fingerprints", "refused"),
    *("about", SEAL),
}
"""Entries of the index."""
NO_INDEX = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What `Index.from_json` raises for text that is no index of this version."""


class PackError(UserError):
    """Shards cannot be written; the message says how to go on."""


@dataclass(frozen=True, slots=True)
class Shard:
    """name: file name within the folder. bytes: its size. sha256: of the whole file."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Member:
    """Where one array lies in its shard, in bytes, and the CRC-32 that every read checks."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample of the index.

    members: by name without the key, for example `latent.npy`. captions: by level, see `levels`;
    none where there is one caption for each clip. Else `caption` is the longest of them.
    """

    key: str
    shard: str
    caption: str
    members: dict[str, Member]
    captions: dict[str, str] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        members = {
            name: [member.offset, member.size, member.crc32]
            for name, member in self.members.items()
        }
        fields = {"key": self.key, "shard": self.shard, "caption": self.caption, "members": members}
        return {**fields, "captions": self.captions} if self.captions else fields

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Entry:
        members = {
            name: Member(*whole_numbers(numbers, name, 3))
            for name, numbers in fields["members"].items()
        }
        key, shard, caption = (text_in(fields, name) for name in ("key", "shard", "caption"))
        stated = dict(fields.get("captions", {}))
        captions = {level: text_in(stated, level) for level in stated}
        if not set(captions) <= set(LEVELS):
            raise ValueError(f"captions of {key} are {sorted(captions)}, want some of {LEVELS}")
        return cls(key, shard, caption, members, captions)


@dataclass(frozen=True, slots=True)
class Index:
    """All about a shard folder except the arrays.

    fingerprints: of `codec`, `text` and, where they are, of `noise` and `pictures`. refused: file
    and reason of each clip that could not be used, and `damaged` where it cannot be decoded. about:
    what was packed and how: `source` (its size and SHA-256), `settings`, `negative` (prompt and
    SHA-256 of its file) where there is one, `part` where the folder is one of several. `about` is
    empty in folders of the first version.
    """

    shards: tuple[Shard, ...]
    samples: tuple[Entry, ...]
    latent_shape: tuple[int, ...]  # F, C, H, W
    text_shape: tuple[int, ...]  # padded length L, D
    fingerprints: dict[str, str]
    refused: tuple[dict[str, Any], ...]
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        fields = {
            "version": FORMAT_VERSION,
            "shards": [asdict(shard) for shard in self.shards],
            "samples": [entry.to_fields() for entry in self.samples],
            "latent_shape": self.latent_shape,
            "text_shape": self.text_shape,
            "fingerprints": self.fingerprints,
            "refused": self.refused,
            "about": self.about,
        }
        return json.dumps(sealed(fields), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Index:
        """Raises one of `NO_INDEX` for anything else."""
        fields = json.loads(text)
        version = fields["version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format version {version}, this program reads version {FORMAT_VERSION}"
            )
        unknown = sorted(set(fields) - KEYS)
        if unknown:
            raise ValueError(f"unknown entry {unknown[0]!r}")
        # folders from before 2026-11-22 have no seal
        if SEAL in fields and not is_as_sealed(fields):
            raise ValueError("its content is not what was written (SHA-256 differs)")
        samples = tuple(Entry.from_fields(sample) for sample in fields["samples"])
        about = fields.get("about", {})
        negative = about.get("negative")
        if negative:
            text_in(negative, "sha256")
        shards = tuple(shard_of(shard) for shard in fields["shards"])
        stated = dict(fields["fingerprints"])
        fingerprints = {name: text_in(stated, name) for name in stated}
        return cls(
            shards=shards,
            samples=samples,
            latent_shape=shape_in(fields, "latent_shape", 4),
            text_shape=shape_in(fields, "text_shape", 2),
            fingerprints=fingerprints,
            refused=tuple(map(dict, fields["refused"])),
            about=about,
        )


def shard_of(fields: Mapping[str, Any]) -> Shard:
    shard = Shard(**fields)
    whole_numbers([shard.bytes], "bytes", 1)
    for name in ("name", "sha256"):
        text_in(fields, name)
    if Path(shard.name).name != shard.name:
        raise ValueError(f"shard {shard.name} does not lie in its folder")
    return shard


def whole_numbers(found: Any, name: str, number: int) -> list[int]:
    """A list of that many sizes or places. Raises TypeError for anything else."""
    is_list = isinstance(found, list) and len(found) == number
    if not is_list or not all(map(is_size, found)):
        raise TypeError(f"{name} is {found!r:.60}, want {number} whole numbers")
    return list(found)


def shape_in(fields: Mapping[str, Any], name: str, number: int) -> tuple[int, ...]:
    """A shape. Raises TypeError for anything else, ValueError for one that no clip can have."""
    shape = whole_numbers(fields[name], name, number)
    if max(shape) > MOST:
        raise ValueError(f"{name} is {shape}, want sizes up to {MOST:,}")
    return tuple(shape)


def is_size(found: Any) -> bool:
    """Whether something is a number of bytes, rows or values, and no truth value."""
    return type(found) is int and 0 <= found < 2**63


def text_in(fields: Mapping[str, Any], name: str) -> str:
    """An entry that is text. Raises TypeError for anything else."""
    found = fields[name]
    if not isinstance(found, str):
        raise TypeError(f"{name} is {found!r:.60}, want text")
    return found


def write_index(folder: Path, index: Index) -> None:
    (folder / INDEX_NAME).write_text(index.to_json(), encoding="utf-8")


def npy(tensor: Tensor, dtype: str, name: str) -> bytes:
    """The bytes of a .npy file. PackError if a value is not finite in `dtype`.

    name: of the clip, for the message.
    """
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is reported below
        array = tensor.detach().float().cpu().numpy().astype(dtype)
    if not np.isfinite(array).all():
        raise PackError(
            f"{name}: NaN, infinity or too large for {dtype}; check the clip and the codec, "
            "or store float32"
        )
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def load_npy(data: bytes) -> np.ndarray:
    """The array in the bytes of a .npy file. Raises ValueError or EOFError for anything else."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def from_npy(data: bytes) -> Tensor:
    """The array in the bytes of a .npy file, as float32."""
    return torch.from_numpy(load_npy(data)).float()


def trim(tokens: Tensor) -> Tensor:
    """[L, D] -> [n, D]: without the zeros past the caption's end."""
    valid = tokens.ne(0).any(-1).nonzero()
    return tokens[: int(valid.max()) + 1] if len(valid) else tokens[:0]


def pad_text(tokens: Tensor, length: int) -> Tensor:
    """[n, D] -> [length, D], zeros past n."""
    return torch.nn.functional.pad(tokens, (0, 0, 0, length - len(tokens)))
