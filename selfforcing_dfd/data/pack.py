"""From a folder of clips with captions to a folder of shards.

A shard folder appears complete or not at all: it is written beside its place as `<out>.partial`, index last, and
renamed at the end. A clip that cannot be used is left out by name, with the reason, in the summary and in the index.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from webdataset import ShardWriter

from selfforcing_dfd.data.shards import (
    INDEX_NAME,
    LATENT,
    NOISE,
    TEXT,
    Entry,
    Index,
    Member,
    Shard,
    ShardReader,
    pad_text,
    sha256_of,
)
from selfforcing_dfd.data.video import ClipError, read_video

Invert = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, F, C, H, W], text [B, L, D]) -> noise [B, F, C, H, W]: the teacher's ODE, from data to noise."""


class VideoCodec(Protocol):
    """What the packer asks of a codec: the tiny world's linear one, or Wan's VAE."""

    @property
    def fingerprint(self) -> str: ...

    def num_latent_frames(self, num_video_frames: int) -> int: ...

    def encode(self, video: Tensor) -> Tensor:
        """[B, T, H, W, 3] in [0, 1] -> [B, F, C, h, w]."""
        ...


class TextEncoder(Protocol):
    """What the packer asks of a text encoder: the tiny world's word table, or UMT5."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, captions: list[str]) -> Tensor:
        """-> [B, L, D] with a fixed L, zeros past each caption's end."""
        ...


class PackError(ValueError):
    """Packing cannot go on, or must not; the message says how to go on."""


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
class _Record:
    """One sample on its way into a shard, its members as bytes."""

    key: str
    caption: str
    members: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a clip becomes a record."""

    codec: VideoCodec
    text: TextEncoder
    num_video_frames: int
    video_size: tuple[int, int]
    caption_suffix: str
    dtype: str

    def latent_shape(self) -> tuple[int, ...]:
        """F, C, h, w of every sample, from a black clip: a length or size that the codec cannot take fails first."""
        num_latent_frames = self.codec.num_latent_frames(self.num_video_frames)
        _, _, *rest = self.codec.encode(torch.zeros(1, self.num_video_frames, *self.video_size, 3)).shape
        return (num_latent_frames, *rest)

    def record(self, clip: Path, key: str) -> _Record:
        caption = _read_caption(clip, self.caption_suffix)
        frames = read_video(clip, self.num_video_frames, self.video_size)
        latents = self.codec.encode(frames[None].float() / 255)[0]
        try:
            tokens = self.text.encode([caption])[0]
        except ValueError as error:
            raise ClipError(f"{clip.name}: {error}") from error
        about = {
            "caption": caption,
            "source": clip.name,
            "num_video_frames": self.num_video_frames,
            "codec": self.codec.fingerprint,
            "text": self.text.fingerprint,
        }
        members = {
            LATENT: _npy(latents, self.dtype, clip.name),
            TEXT: _npy(_trim(tokens), self.dtype, clip.name),
            "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode(),
        }
        return _Record(key, caption, members)


def pack(
    folder: Path | str,
    out: Path | str,
    codec: VideoCodec,
    text: TextEncoder,
    *,
    num_video_frames: int,
    video_size: tuple[int, int],
    caption_suffix: str = ".txt",
    shard_size: int = 512,
    dtype: str = "float16",
    invert: Invert | None = None,
    noise_fingerprint: str = "",
    batch_size: int = 16,
    overwrite: bool = False,
    attach: Callable[[Path], None] | None = None,
) -> PackSummary:
    """Pack each `.mp4` of `folder` that has a caption beside it, its first `num_video_frames`, in order of name.

    video_size: height, width; other clips are left out, never resized. shard_size: samples per shard. dtype: of the
    stored arrays. invert: adds noise members (see `add_noise`), `batch_size` samples at a time. attach: writes further
    files, such as the codec's basis, into the folder before it appears. PackError: `out` exists, or no clip is usable.
    """
    clips = find_clips(folder)
    recipe = _Recipe(codec, text, num_video_frames, video_size, caption_suffix, dtype)
    latent_shape, text_shape = recipe.latent_shape(), tuple(text.encode([""]).shape[1:])
    refused: list[Refusal] = []
    records = _records(clips, recipe, refused)
    fingerprints = {"codec": codec.fingerprint, "text": text.fingerprint}
    if invert:
        records = _with_noise(records, invert, batch_size, text_shape[0])
        fingerprints["noise"] = noise_fingerprint
    with _published(Path(out), overwrite) as partial:
        if attach:
            attach(partial)
        shards, samples = _write_shards(partial, records, shard_size)
        if not samples:
            reasons = "".join(f"\n  {refusal.file}: {refusal.reason}" for refusal in refused[:5])
            raise PackError(f"{folder}: none of its {len(clips)} clips can be used; the first of them:{reasons}")
        left_out = tuple(asdict(refusal) for refusal in refused)
        _write_index(partial, Index(shards, samples, latent_shape, text_shape, fingerprints, left_out))
    return PackSummary(Path(out), len(samples), len(shards), tuple(refused))


def add_noise(
    folder: Path | str,
    invert: Invert,
    *,
    batch_size: int = 16,
    out: Path | str | None = None,
    noise_fingerprint: str = "",
) -> PackSummary:
    """Give every sample of a shard folder its noise member; samples, their order and all other bytes stay as they are.

    noise_fingerprint: names the teacher and solver, kept in the index. The folder is replaced as a whole at the end, or
    left alone if `out` names another, which must not exist.
    """
    reader = ShardReader(folder)
    index = reader.index
    shard_size = sum(entry.shard == index.samples[0].shard for entry in index.samples)
    stored = _stored_records(reader)
    records = _with_noise(stored, invert, batch_size, index.text_shape[0])
    with _published(Path(out or folder), overwrite=out is None) as partial:
        for path in Path(folder).iterdir():
            if path.name != INDEX_NAME and path.suffix != ".tar":
                shutil.copyfile(path, partial / path.name)
        shards, samples = _write_shards(partial, records, shard_size)
        fingerprints = index.fingerprints | {"noise": noise_fingerprint}
        _write_index(partial, replace(index, shards=shards, samples=samples, fingerprints=fingerprints))
    refused = tuple(Refusal(**refusal) for refusal in index.refused)
    return PackSummary(Path(out or folder), len(samples), len(shards), refused)


def find_clips(folder: Path | str) -> list[Path]:
    """The `.mp4` files of a folder in order of name; PackError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PackError(f"{folder}: no such folder; want one with .mp4 clips and a caption file beside each")
    clips = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".mp4")
    if not clips:
        raise PackError(f"{folder}: no .mp4 files in it; want clips with a caption file beside each")
    return clips


def _records(clips: list[Path], recipe: _Recipe, refused: list[Refusal]) -> Iterator[_Record]:
    """A record for each usable clip; the others are appended to `refused`."""
    used: set[str] = set()
    for clip in tqdm(clips, desc="packing", unit="clip", disable=None):
        key = _key(clip, used)
        try:
            record = recipe.record(clip, key)
        except ClipError as error:
            refused.append(Refusal(clip.name, str(error).removeprefix(f"{clip.name}: ")))
            continue
        used.add(key)
        yield record


def _stored_records(reader: ShardReader) -> Iterator[_Record]:
    for number in tqdm(range(len(reader)), desc="adding noise", unit="clip", disable=None):
        entry = reader.index.samples[number]
        yield _Record(entry.key, entry.caption, reader.members(number))


def _with_noise(records: Iterable[_Record], invert: Invert, batch_size: int, text_length: int) -> Iterator[_Record]:
    """Each record with the noise of its *stored* latents, so that it does not matter when the noise is added."""
    records = iter(records)
    while group := list(islice(records, batch_size)):
        latents = torch.stack([_tensor(record, LATENT) for record in group])
        text = torch.stack([pad_text(_tensor(record, TEXT), text_length) for record in group])
        noise = invert(latents, text)
        if noise.shape != latents.shape:
            raise PackError(
                f"invert gave noise {list(noise.shape)} for latents {list(latents.shape)}; want the same shape"
            )
        for record, one in zip(group, noise, strict=True):
            dtype = np.load(io.BytesIO(record.members[LATENT])).dtype.name
            yield replace(record, members=record.members | {NOISE: _npy(one, dtype, f"{record.key}, noise")})


def _key(clip: Path, used: set[str]) -> str:
    """The file name without its ending, fit for webdataset: ASCII, no dots, short enough for a tar, and unique."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", clip.stem)[:64]
    key, number = stem, 1
    while key in used:
        number += 1
        key = f"{stem}_{number}"
    return key


def _read_caption(clip: Path, suffix: str) -> str:
    path = clip.with_name(clip.stem + suffix)
    try:
        caption = " ".join(path.read_text(encoding="utf-8").split())
    except FileNotFoundError as error:
        raise ClipError(f"{clip.name}: no caption; write one into {path.name} beside it") from error
    except UnicodeDecodeError as error:
        raise ClipError(f"{clip.name}: {path.name} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    if not caption:
        raise ClipError(f"{clip.name}: the caption in {path.name} is empty; write one")
    return caption


def _trim(tokens: Tensor) -> Tensor:
    """[L, D] -> [n, D]: without the zeros past the caption's end."""
    valid = tokens.ne(0).any(-1).nonzero()
    return tokens[: int(valid.max()) + 1] if len(valid) else tokens[:0]


def _npy(tensor: Tensor, dtype: str, name: str) -> bytes:
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


def _tensor(record: _Record, name: str) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(record.members[name]))).float()


def _write_shards(
    folder: Path, records: Iterable[_Record], shard_size: int
) -> tuple[tuple[Shard, ...], tuple[Entry, ...]]:
    """Write `shard-%06d.tar`; the same records give the same bytes."""
    captions: dict[str, str] = {}
    shards: list[Shard] = []
    samples: list[Entry] = []

    def finish(name: str) -> None:
        path = Path(name)
        shards.append(Shard(path.name, path.stat().st_size, sha256_of(path)))
        samples.extend(Entry(key, path.name, captions[key], members) for key, members in _tar_members(path).items())

    pattern = str(folder.resolve()).replace("%", "%%") + "/shard-%06d.tar"
    with ShardWriter(pattern, maxcount=shard_size, post=finish, verbose=0, mtime=0.0) as writer:
        for record in records:
            captions[record.key] = record.caption
            writer.write({"__key__": record.key, **record.members})
    return tuple(shards), tuple(samples)


def _tar_members(path: Path) -> dict[str, dict[str, Member]]:
    """Where each member of a tar lies: key -> name without the key -> place."""
    places: dict[str, dict[str, Member]] = {}
    with tarfile.open(path) as tar, path.open("rb") as file:
        for info in tar:
            file.seek(info.offset_data)
            key, _, name = info.name.partition(".")
            places.setdefault(key, {})[name] = Member(info.offset_data, info.size, zlib.crc32(file.read(info.size)))
    return places


def _write_index(folder: Path, index: Index) -> None:
    (folder / INDEX_NAME).write_text(index.to_json(), encoding="utf-8")


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename after it never shows less than what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _published(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; on any exception it is removed and `out` is as it was."""
    out = out.resolve()
    partial, replaced = (out.with_name(out.name + ending) for ending in (".partial", ".replaced"))
    if out.exists() and not overwrite:
        raise PackError(f"{out} exists; choose another folder, or replace it with overwrite (--overwrite)")
    for folder in (out, partial, replaced):
        _check_is_ours(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
    except BaseException:
        shutil.rmtree(partial)
        raise
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    _sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_is_ours(folder: Path) -> None:
    """Nothing but what packing writes lies in a folder that packing is about to replace."""
    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    foreign = [name for name in names if not re.fullmatch(r"shard-\d{6}\.tar|index\.json|[\w.-]+\.safetensors", name)]
    if foreign:
        raise PackError(f"{folder} holds {', '.join(sorted(foreign)[:3])}, not only shards; choose another folder")
