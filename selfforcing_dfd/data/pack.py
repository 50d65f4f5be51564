"""From clips with captions to a folder of shards.

A shard folder appears complete or not at all. A clip that cannot be used is left out by name, with
the reason, in the summary and in the index. Threads decode ahead of the encoder; neither order nor
bytes depend on how many.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd.data.ahead import in_order
from selfforcing_dfd.data.publish import Unfinished, published
from selfforcing_dfd.data.shards import INDEX_NAME, LATENT, NOISE, TEXT, ShardReader, pad_text
from selfforcing_dfd.data.sources.files import Clip, PackError, list_clips, list_hash, share_of
from selfforcing_dfd.data.sources.video import ClipError, Resize, read_video
from selfforcing_dfd.data.writing import (
    Job,
    Journal,
    PackSummary,
    Record,
    Refusal,
    Refuse,
    negative_files,
    npy,
    trim,
    write_folder,
    write_index,
    write_shards,
)

Invert = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, F, C, H, W], text [B, L, D]) -> noise [B, F, C, H, W]: the teacher's ODE, from data
to noise.
"""


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


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How to read the clips and how to run.

    captions, recursive: see `list_clips`. resize, fps: see `read_video`. device: where the codec
    is. num_workers: threads that decode ahead. part: i of n, counted from 1, for several machines
    (see `merge`). negative_prompt: is encoded into `negative.safetensors`; None for none. settings:
    more for the index that a resumed run must agree in, such as the codec's dtype. strict: the
    first unusable clip is a PackError. unfinished: see `published`.
    """

    captions: Path | None = None
    recursive: bool = False
    resize: Resize = "none"
    fps: Fraction | None = None
    device: torch.device | str = "cpu"
    num_workers: int = 0
    part: tuple[int, int] = (1, 1)
    negative_prompt: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    unfinished: Unfinished = "discard"


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a clip becomes a record: `read` may run in any thread, `record` in the one that owns the
    encoders.
    """

    codec: VideoCodec
    text: TextEncoder
    fingerprints: dict[str, str]  # of both; a codec may take a second to work out its own
    num_video_frames: int
    video_size: tuple[int, int]
    dtype: str
    options: PackOptions

    def latent_shape(self) -> tuple[int, ...]:
        """F, C, h, w of every sample, from a black clip: a length or size that the codec cannot
        take fails first.
        """
        num_latent_frames = self.codec.num_latent_frames(self.num_video_frames)
        black = torch.zeros(
            1, self.num_video_frames, *self.video_size, 3, device=self.options.device
        )
        _, _, *rest = self.codec.encode(black).shape
        return (num_latent_frames, *rest)

    def read(self, clip: Clip) -> Tensor | ClipError:
        """uint8 [T, H, W, 3], or why not; an error is a result here, so that threads that read
        ahead go on.
        """
        if clip.problem:
            return ClipError(f"{clip.path.name}: {clip.problem}")
        options = self.options
        try:
            return read_video(
                clip.path, self.num_video_frames, self.video_size, options.resize, options.fps
            )
        except ClipError as error:
            return error

    def record(self, clip: Clip, number: int, frames: Tensor) -> Record:
        latents = self.codec.encode(frames.to(self.options.device)[None].float() / 255)[0]
        try:
            tokens = self.text.encode([clip.caption])[0]
        except ValueError as error:
            raise ClipError(f"{clip.path.name}: {error}") from error
        about = {
            "caption": clip.caption,
            "source": clip.name,
            "num_video_frames": self.num_video_frames,
            **self.fingerprints,
        }
        members = {
            LATENT: npy(latents, self.dtype, clip.name),
            TEXT: npy(trim(tokens), self.dtype, clip.name),
            "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode(),
        }
        return Record(number, clip.key, clip.caption, members)

    def settings(self) -> dict[str, Any]:
        height, width = self.video_size
        fps = self.options.fps and str(self.options.fps)
        taken = {
            "num_video_frames": self.num_video_frames,
            "height": height,
            "width": width,
            "fps": fps,
        }
        return {
            **taken,
            "resize": self.options.resize,
            "dtype": self.dtype,
            **self.options.settings,
        }


def pack(
    source: Path | str,
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
    options: PackOptions | None = None,
) -> PackSummary:
    """Pack the clips of a folder or list (see `list_clips`), of each its first `num_video_frames`,
    in their order.

    video_size: height, width; other clips are left out unless options.resize says otherwise.
    shard_size: samples per shard. dtype: of the stored arrays. invert: adds noise members (see
    `add_noise`), `batch_size` samples at a time. attach: writes further files, such as the codec's
    basis, into the folder before it appears. PackError: `out` exists, no clip is usable, or the
    interrupted run to go on with was another one.
    """
    options = options or PackOptions()
    if invert and options.unfinished != "discard":
        raise PackError(
            "a run that adds noise cannot be resumed; pack first, then run `python -m selfforcing_dfd invert`"
        )
    everything = list_clips(source, caption_suffix, options.captions, options.recursive)
    clips = share_of(everything, options.part)
    fingerprints = {"codec": codec.fingerprint, "text": text.fingerprint}
    recipe = _Recipe(codec, text, fingerprints.copy(), num_video_frames, video_size, dtype, options)
    latent_shape, text_shape = recipe.latent_shape(), tuple(text.encode([""]).shape[1:])
    prompt = options.negative_prompt
    negative = None if prompt is None else text.encode([prompt])[0]
    files, about_negative = negative_files(negative, prompt or "", dtype)
    about = {
        "source": {"num_clips": len(everything), "sha256": list_hash(everything)},
        "settings": {**recipe.settings(), "shard_size": shard_size},
        **about_negative,
    }
    if options.part != (1, 1):
        about["part"] = "/".join(map(str, options.part))

    def records(first: int, refuse: Refuse) -> Iterator[Record]:
        found = _records(clips, recipe, first, refuse)
        return _with_noise(found, invert, batch_size, text_shape[0]) if invert else found

    if invert:
        fingerprints["noise"] = noise_fingerprint
    empty = options.part != (1, 1)
    job = Job(
        str(source),
        len(clips),
        latent_shape,
        text_shape,
        fingerprints,
        about,
        shard_size,
        files,
        empty,
    )
    return write_folder(out, job, records, overwrite, options.unfinished, attach)


def add_noise(
    folder: Path | str,
    invert: Invert,
    *,
    batch_size: int = 16,
    out: Path | str | None = None,
    noise_fingerprint: str = "",
) -> PackSummary:
    """Give every sample of a shard folder its noise member; samples, their order and all other
    bytes stay as they are.

    noise_fingerprint: names the teacher and solver, kept in the index. The folder is replaced as a
    whole at the end, or left alone if `out` names another, which must not exist.
    """
    reader = ShardReader(folder)
    index = reader.index
    shard_size = sum(entry.shard == index.samples[0].shard for entry in index.samples)
    fingerprints = index.fingerprints | {"noise": noise_fingerprint}
    job = Job(
        str(folder),
        len(reader),
        index.latent_shape,
        index.text_shape,
        fingerprints,
        index.about,
        shard_size,
    )
    records = _with_noise(_stored_records(reader), invert, batch_size, index.text_shape[0])
    with published(Path(out or folder), overwrite=out is None) as partial:
        journal = Journal(partial, job)
        for path in Path(folder).iterdir():
            if path.name != INDEX_NAME and path.suffix != ".tar":
                shutil.copyfile(path, partial / path.name)
        write_shards(partial, records, journal)
        shards, samples = tuple(journal.shards), tuple(journal.samples)
        write_index(
            partial, replace(index, shards=shards, samples=samples, fingerprints=fingerprints)
        )
    refused = tuple(Refusal(**refusal) for refusal in index.refused)
    return PackSummary(Path(out or folder), len(samples), len(shards), refused)


def _records(
    clips: Sequence[Clip], recipe: _Recipe, first: int, refuse: Refuse
) -> Iterator[Record]:
    """A record for each usable clip from number `first` on; with options.strict the first unusable
    one is a PackError.
    """
    numbers = range(first, len(clips))
    frames = in_order(
        lambda number: recipe.read(clips[number]), numbers, recipe.options.num_workers
    )
    bar = tqdm(numbers, "packing", len(clips), initial=first, unit="clip", disable=None)
    num_refused = 0
    for number, read in zip(bar, frames, strict=True):
        clip = clips[number]
        try:
            if isinstance(read, ClipError):
                raise read
            yield recipe.record(clip, number, read)
        except ClipError as error:
            refusal = Refusal(clip.name, str(error).removeprefix(f"{clip.path.name}: "))
            if recipe.options.strict:
                raise PackError(
                    f"{refusal.file}: {refusal.reason}. Repair it, or pack without --strict"
                ) from error
            refuse(number, refusal)
            num_refused += 1
            bar.set_postfix(refused=num_refused)


def _stored_records(reader: ShardReader) -> Iterator[Record]:
    for number in tqdm(range(len(reader)), desc="adding noise", unit="clip", disable=None):
        entry = reader.index.samples[number]
        yield Record(number, entry.key, entry.caption, reader.members(number))


def _with_noise(
    records: Iterable[Record], invert: Invert, batch_size: int, text_length: int
) -> Iterator[Record]:
    """Each record with the noise of its *stored* latents, so that it does not matter when the noise
    is added.
    """
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
            yield replace(
                record, members=record.members | {NOISE: npy(one, dtype, f"{record.key}, noise")}
            )


def _tensor(record: Record, name: str) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(record.members[name]))).float()
