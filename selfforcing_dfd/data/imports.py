"""Other projects' latent data sets into shard folders of ours: an interrupted import goes on like
packing.

The sources are `lmdb_source.py` (Self-Forcing, DFD, CausVid, Causal-Forcing) and
`fastgen_source.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd.data.pack import TextEncoder
from selfforcing_dfd.data.publish import Unfinished
from selfforcing_dfd.data.shards import LATENT, TEXT
from selfforcing_dfd.data.sources.files import PackError, keys_of
from selfforcing_dfd.data.sources.video import ClipError
from selfforcing_dfd.data.writing import (
    Job,
    PackSummary,
    Record,
    Refusal,
    Refuse,
    negative_files,
    npy,
    trim,
    write_folder,
)

TIME = 4  # video frames of every latent frame but the first, in all of these data sets


@dataclass(frozen=True, slots=True)
class Imported:
    """latents: [F, C, H, W]. text: [L, D] where the data set holds embeddings. caption: one line,
    empty if there is none.
    """

    latents: Tensor
    caption: str
    text: Tensor | None = None


class ImportSource(Protocol):
    """A data set of another project."""

    @property
    def names(self) -> list[str]:
        """Of all samples, in order."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """What identifies it: kind, contents, and how it is read."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """F, C, H, W of every sample."""
        ...

    @property
    def text_shape(self) -> tuple[int, ...] | None:
        """L, D of its text embeddings; None if it holds prompts only."""
        ...

    @property
    def negative(self) -> Tensor | None:
        """[L, D]: its negative prompt's embedding, if it has one."""
        ...

    def read(self, number: int) -> Imported:
        """A sample. ClipError, whose message begins with its name, if it cannot be used."""
        ...


def import_folder(
    source: ImportSource,
    out: Path | str,
    text: TextEncoder | None = None,
    *,
    codec_fingerprint: str,
    negative_prompt: str | None = None,
    shard_size: int = 512,
    dtype: str = "float16",
    strict: bool = False,
    overwrite: bool = False,
    unfinished: Unfinished = "discard",
) -> PackSummary:
    """A shard folder of a data set. text: encodes its captions; without it, the stored embeddings
    are taken.

    A sample with an embedding and no caption gets a caption made of the embedding's hash, so that
    samples of one prompt still count as such. codec_fingerprint: names the VAE that its latents
    come from, which no data set says. negative_prompt: is encoded by `text`; the stored embedding
    is taken where there is no `text`. PackError: as for `pack`, and if captions are to be encoded
    but there is no encoder.
    """
    stored = source.text_shape
    if text is None and stored is None:
        raise PackError(
            "this data set holds prompts without embeddings; name a text encoder with --text"
        )
    text_shape = tuple(text.encode([""]).shape[1:]) if text else stored or ()
    encoded = text.encode([negative_prompt])[0] if text and negative_prompt is not None else None
    negative = encoded if text else source.negative
    files, about_negative = negative_files(negative, negative_prompt or "", dtype)
    fingerprints = {
        "codec": codec_fingerprint,
        "text": text.fingerprint if text else f"{source.about['kind']}-stored",
    }
    settings = {"dtype": dtype, "shard_size": shard_size}
    about = {"source": source.about, "settings": settings, **about_negative}

    def records(first: int, refuse: Refuse) -> Iterator[Record]:
        return _records(source, text, first, refuse, fingerprints, text_shape, dtype, strict)

    name, count = str(source.about["kind"]), len(source.names)
    job = Job(name, count, source.latent_shape, text_shape, fingerprints, about, shard_size, files)
    return write_folder(out, job, records, overwrite, unfinished)


def _records(
    source: ImportSource,
    text: TextEncoder | None,
    first: int,
    refuse: Refuse,
    fingerprints: dict[str, str],
    text_shape: tuple[int, ...],
    dtype: str,
    strict: bool,
) -> Iterator[Record]:
    names = source.names
    keys = keys_of(names)
    numbers = range(first, len(names))
    for number in tqdm(numbers, "importing", len(names), initial=first, unit="clip", disable=None):
        name = names[number]
        try:
            sample = source.read(number)
            tokens = _tokens(sample, text, text_shape, name)
        except ClipError as error:
            reason = str(error).removeprefix(f"{name}: ")
            if strict:
                raise PackError(
                    f"{name}: {reason}. Repair it, or import without --strict"
                ) from error
            refuse(number, Refusal(name, reason))
            continue
        caption = (
            sample.caption
            or f"embedding {hashlib.sha256(npy(tokens, dtype, name)).hexdigest()[:16]}"
        )
        about = {
            "caption": caption,
            "source": name,
            "num_video_frames": 1 + TIME * (len(sample.latents) - 1),
        }
        members = {
            LATENT: npy(sample.latents, dtype, name),
            TEXT: npy(trim(tokens), dtype, name),
            "json": json.dumps(about | fingerprints, ensure_ascii=False, sort_keys=True).encode(),
        }
        yield Record(number, keys[number], caption, members)


def _tokens(
    sample: Imported, text: TextEncoder | None, shape: tuple[int, ...], name: str
) -> Tensor:
    """[L, D] of the caption, or as stored. ClipError if there is neither, or it has another shape."""
    if text:
        if not sample.caption:
            raise ClipError(f"{name}: no caption")
        try:
            return text.encode([sample.caption])[0]
        except ValueError as error:
            raise ClipError(f"{name}: {error}") from error
    if sample.text is None:
        raise ClipError(
            f"{name}: no text embedding; name a text encoder with --text to encode the captions"
        )
    if sample.text.shape[1:] != shape[1:] or len(sample.text) > shape[0]:
        got = list(sample.text.shape)
        raise ClipError(
            f"{name}: its text embedding is {got}, that of the first sample {list(shape)}"
        )
    return sample.text
