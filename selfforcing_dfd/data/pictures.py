"""Pictures for the samples of a shard folder: first video frames as Wan2.1-I2V sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from selfforcing_dfd.data.format import (
    LATENT,
    PICTURE,
    PICTURE_TOKENS,
    PackError,
    from_npy,
    load_npy,
    npy,
)
from selfforcing_dfd.data.further import stored_records, write_again
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.write import PackSummary, Record

EncodePictures = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Clips [B, F, C, H, W] -> (latents like the clips of their pictures, tokens [B, T, D_image])."""


def store_pictures(
    folder: Path | str,
    encode: EncodePictures,
    *,
    fingerprint: str,
    batch_size: int = 1,
    out: Path | str | None = None,
) -> PackSummary:
    """Give every sample of a shard folder its picture, `batch_size` samples at a time.

    Other members stay as they are. fingerprint: names the image encoder, for the index. The folder
    is replaced as a whole at the end; or left alone if `out` names another, which must not exist.
    Raises PackError for a folder without clips, and for values that are not finite.
    """
    reader = ShardReader(folder)
    if not reader.has_clips:
        raise PackError(
            f"{folder} holds prompts without clips, so there is no first video frame; pack clips "
            "with `selfforcing-dfd pack`"
        )
    records = _with_pictures(stored_records(reader, "encoding pictures"), encode, batch_size)
    place = Path(out) if out else None
    return write_again(reader, records, place, {"pictures": fingerprint}, {})


def _with_pictures(
    records: Iterable[Record], encode: EncodePictures, batch_size: int
) -> Iterator[Record]:
    """Each record with the picture of its stored latents, in their dtype."""
    records = iter(records)
    while group := list(islice(records, batch_size)):
        clips = torch.stack([from_npy(record.members[LATENT]) for record in group])
        for record, latents, tokens in zip(group, *encode(clips), strict=True):
            dtype = load_npy(record.members[LATENT]).dtype.name
            further = {PICTURE: latents, PICTURE_TOKENS: tokens}
            made = {
                name: npy(array, dtype, f"{record.key}, {name}") for name, array in further.items()
            }
            yield replace(record, members=record.members | made)
