"""The negative prompt beside the shards, so that training needs no text encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pack import pack_tiny

from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.shards import ShardError, ShardReader
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText


@pytest.mark.parametrize(("prompt", "num_rows"), [("a red disc", 3), ("", 0)])
def test_the_negative_prompt_comes_back(
    clips: Path, codec: TinyCodec, tmp_path: Path, prompt: str, num_rows: int
) -> None:
    """Catches padding stored, or missing where it is read.

    Training must need no text encoder. Rounded to half once.
    """
    pack_tiny(clips, tmp_path / "shards", codec, negative_prompt=prompt)
    reader = ShardReader(tmp_path / "shards")
    assert reader.negative is not None and reader.negative.equal(
        TinyText().encode([prompt])[0].half().float()
    )
    assert load_file(tmp_path / "shards" / "negative.safetensors")["text"].shape == (num_rows, 32)
    assert reader.index.about["negative"]["prompt"] == prompt
    store_noise(tmp_path / "shards", lambda latents, text, fresh: latents)
    again = ShardReader(tmp_path / "shards").negative
    assert again is not None and torch.equal(again, reader.negative)


def test_no_negative_prompt_is_none(packed: Path) -> None:
    """Catches a file that is read although it was not packed."""
    assert ShardReader(packed).negative is None


@pytest.mark.parametrize(("damage", "message"), [(b"other", "not as packed"), (None, "missing")])
def test_a_negative_prompt_that_changed_is_not_used(
    clips: Path, codec: TinyCodec, tmp_path: Path, damage: bytes | None, message: str
) -> None:
    """Catches guidance with the negative prompt of another data set."""
    pack_tiny(clips, tmp_path / "shards", codec, negative_prompt="grey")
    path = tmp_path / "shards" / "negative.safetensors"
    path.unlink()
    if damage:
        path.write_bytes(damage)
    with pytest.raises(ShardError, match=rf"negative\.safetensors: {message}"):
        ShardReader(tmp_path / "shards").verify()
