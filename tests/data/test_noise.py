"""Noise that is stored with the samples: where it comes from, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pack import pack_tiny
from torch import Tensor

from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.order import SampleOrder, load_batch
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.tiny.codec import TinyCodec


def rotate_noise(latents: Tensor, text: Tensor, fresh: Tensor) -> Tensor:
    """Stands in for the teacher's ODE: depends on every argument, sample by sample."""
    return latents.flip(1) * 0.5 + text.mean(dim=(1, 2))[:, None, None, None, None]


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_noise_comes_back_bit_for_bit(own_shards: Path, batch_size: int) -> None:
    """Catches noise that belongs to another sample, at whatever batch size it was computed.

    Exact: the inversion sees the stored latents and text, and its result is rounded to the stored
    type once.
    """
    store_noise(own_shards, rotate_noise, batch_size=batch_size, noise_fingerprint="rotation")
    reader = ShardReader(own_shards)
    reader.verify()
    for number in range(len(reader)):
        sample = reader[number]
        assert sample.noise is not None
        noise = rotate_noise(sample.latents[None], sample.text[None], sample.latents[None])[0]
        assert torch.equal(sample.noise, noise.half().float())
    assert reader.index.fingerprints["noise"] == "rotation"


def test_a_batch_carries_the_noise_of_its_samples(own_shards: Path) -> None:
    """Catches noise in another order than the samples of a batch, on which pairing relies."""
    store_noise(own_shards, rotate_noise)
    reader = ShardReader(own_shards)
    batch = load_batch(reader, SampleOrder(len(reader), 0), start=3, size=6)
    assert batch.noise is not None
    assert torch.equal(
        batch.noise, rotate_noise(batch.latents, batch.text, batch.latents).half().float()
    )


def test_all_but_the_noise_stays_as_it_is(packed: Path, own_shards: Path) -> None:
    """Catches samples reordered, re-rounded or lost, and shards cut elsewhere.

    Also when noise replaces other noise.
    """
    for fingerprint in ("first", "second"):
        summary = store_noise(own_shards, rotate_noise, noise_fingerprint=fingerprint)
    before = ShardReader(packed)
    after = ShardReader(own_shards)
    assert (summary.num_samples, summary.num_shards) == (12, 3)
    assert [(e.key, e.shard, e.caption) for e in after.index.samples] == [
        (e.key, e.shard, e.caption) for e in before.index.samples
    ]
    for number in range(len(before)):
        members = after.members(number)
        del members["noise.npy"]
        assert members == before.members(number)
    assert after.index.about == before.index.about
    assert after.index.fingerprints == before.index.fingerprints | {"noise": "second"}


def test_noise_in_another_folder_keeps_the_first_and_what_lies_beside_the_shards(
    clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches the codec's basis lost on the way, without which the latents cannot be decoded."""
    shards = tmp_path / "shards"
    out = tmp_path / "with-noise"
    pack_tiny(clips, shards, codec, attach=lambda folder: codec.save(folder / "codec.safetensors"))
    before = ShardReader(shards).index_hash
    store_noise(shards, rotate_noise, out=out)
    assert ShardReader(shards).index_hash == before
    reader = ShardReader(out)
    assert reader.has_noise
    stored = TinyCodec.load(out / "codec.safetensors")
    assert stored.fingerprint == reader.index.fingerprints["codec"]
    with pytest.raises(PackError, match="with-noise exists"):
        store_noise(shards, rotate_noise, out=out)


def test_interrupted_noise_leaves_the_shards_as_they_were(own_shards: Path) -> None:
    """Catches a folder half with noise and half without."""
    before = ShardReader(own_shards).index_hash

    def fail_later(latents: Tensor, text: Tensor, fresh: Tensor) -> Tensor:
        if len(latents) < 5:
            raise RuntimeError
        return latents

    with pytest.raises(RuntimeError):
        store_noise(own_shards, fail_later, batch_size=5)
    assert ShardReader(own_shards).index_hash == before
    assert [path.name for path in own_shards.parent.iterdir()] == [own_shards.name]


@pytest.mark.parametrize(
    ("invert", "message"),
    [
        (
            lambda latents, text, fresh: latents[:, :1],
            r"invert gave noise \[12, 1, 16, 8, 8\] for latents \[12, 3, 16, 8, 8\]",
        ),
        (
            lambda latents, text, fresh: latents / 0,
            r"000000, noise: NaN, infinity or too large for float16",
        ),
    ],
)
def test_noise_that_fits_no_sample_is_refused(own_shards: Path, invert: Any, message: str) -> None:
    """Catches an ODE that diverged, stored as the start of every student rollout."""
    with pytest.raises(PackError, match=message):
        store_noise(own_shards, invert)
    assert not ShardReader(own_shards).has_noise
