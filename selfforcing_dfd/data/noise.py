"""Noise for the samples of a shard folder: what the teacher's ODE maps each of them to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.data.format import LATENT, NOISE, PackError, from_npy, load_npy, npy, pad_text
from selfforcing_dfd.data.further import stored_records, write_again
from selfforcing_dfd.data.levels import Choice
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.write import PackSummary, Record

Invert = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents [B, F, C, H, W], text [B, L, D], fresh noise like the latents) -> noise like the
latents: the teacher's ODE, from data to noise.
"""


def store_noise(
    folder: Path | str,
    invert: Invert,
    *,
    batch_size: int = 16,
    out: Path | str | None = None,
    noise_fingerprint: str = "",
    captions: Choice = "",
) -> PackSummary:
    """Give every sample of a shard folder its noise member, `batch_size` samples at a time.

    Samples, their order and all other bytes stay as they are. noise_fingerprint: names the teacher
    and solver, for the index. The folder is replaced as a whole at the end; or left alone if `out`
    names another, which must not exist. captions: the level under which noise is found, which the
    index states as `about.noise_captions`. Raises PackError for noise of another shape or not
    finite, and for mixed levels: noise belongs to one caption.
    """
    reader = ShardReader(folder, captions)
    records = _with_noise(stored_records(reader, "finding noise"), invert, batch_size, reader)
    fingerprints = {"noise": noise_fingerprint}
    return write_again(
        reader, records, Path(out) if out else None, fingerprints, _found_for(reader)
    )


def _found_for(reader: ShardReader) -> dict[str, str]:
    """What the index states of the captions, where there are levels. PackError if mixed."""
    if reader.choice == "mixed":
        raise PackError(
            f"{reader.folder}: noise belongs to one caption of a clip, and data.captions is mixed; "
            f"find it for one level, such as data.captions={reader.levels[-1]}"
        )
    return {"noise_captions": reader.level_of(0)} if reader.levels else {}


def _with_noise(
    records: Iterable[Record], invert: Invert, batch_size: int, reader: ShardReader
) -> Iterator[Record]:
    """Each record with the noise of its *stored* latents, which are what training reads."""
    records = iter(records)
    while group := list(islice(records, batch_size)):
        latents = torch.stack([from_npy(record.members[LATENT]) for record in group])
        tokens = [from_npy(reader.text_bytes(record.number)) for record in group]
        text = torch.stack([pad_text(one, reader.index.text_shape[0]) for one in tokens])
        shape = tuple(latents.shape[1:])
        fresh = [rng.normal(shape, 0, "inversion", record.number) for record in group]
        noise = invert(latents, text, torch.stack(fresh))
        if noise.shape != latents.shape:
            raise PackError(
                f"invert gave noise {list(noise.shape)} for latents {list(latents.shape)}; "
                "want the same shape"
            )
        for record, one in zip(group, noise, strict=True):
            dtype = load_npy(record.members[LATENT]).dtype.name
            member = npy(one, dtype, f"{record.key}, noise")
            yield replace(record, members=record.members | {NOISE: member})
