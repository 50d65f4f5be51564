"""Parts of one source, packed apart and put together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_pack import other_codec, pack_tiny

from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.merge import merge
from selfforcing_dfd.data.shards import ShardError, ShardReader
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText


def pack_parts(clips: Path, out: Path, codec: TinyCodec, count: int, **settings: Any) -> list[Path]:
    parts = [out.with_name(f"{out.name}-{number}") for number in range(1, count + 1)]
    for number, folder in enumerate(parts, 1):
        part = (number, count)
        pack_tiny(
            clips,
            folder,
            codec,
            shard_size=2,
            unfinished="keep",
            part=part,
            negative_prompt="grey",
            **settings,
        )
    return parts


def test_parts_merge_to_the_samples_of_one_run(
    mixed: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches clips lost between parts, keys that depend on the part, and wrong offsets."""
    parts = pack_parts(
        mixed, tmp_path / "part", codec, 3, attach=lambda to: codec.save(to / "codec.safetensors")
    )
    merge([parts[2], parts[0], parts[1]], tmp_path / "merged")
    for folder in parts:
        shutil.rmtree(folder)
    pack_tiny(mixed, tmp_path / "one", codec, negative_prompt="grey")
    merged = ShardReader(tmp_path / "merged")
    one = ShardReader(tmp_path / "one")
    merged.verify()
    assert [merged.members(number) for number in range(8)] == [
        one.members(number) for number in range(8)
    ]
    assert [entry.key for entry in merged.index.samples] == [
        entry.key for entry in one.index.samples
    ]
    assert merged.index.refused == one.index.refused
    assert merged.index.about["source"] == one.index.about["source"]
    assert "part" not in merged.index.about
    assert merged.negative is not None and merged.negative.equal(
        TinyText().encode(["grey"])[0].half().float()
    )
    assert (
        TinyCodec.load(tmp_path / "merged" / "codec.safetensors").fingerprint == codec.fingerprint
    )


def test_a_part_without_usable_clips_is_no_obstacle(
    mixed: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches a merge that then waits for it forever.

    Part 12 of 12 is one clip that cannot be read.
    """
    parts = pack_parts(mixed, tmp_path / "part", codec, 12)
    assert merge(parts, tmp_path / "merged").num_samples == 8


def test_parts_that_do_not_belong_together_are_refused(
    mixed: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches half a data set under the name of a whole one, and one of two kinds of latents."""
    parts = pack_parts(mixed, tmp_path / "part", codec, 2)
    with pytest.raises(PackError, match="the parts are 1/2; want each of 1/2 to 2/2 once"):
        merge(parts[:1], tmp_path / "merged")
    with pytest.raises(PackError, match="the parts are 1/2, 1/2; want"):
        merge([parts[0], parts[0]], tmp_path / "merged")
    others = pack_parts(mixed, tmp_path / "other", other_codec(codec), 2)
    with pytest.raises(
        PackError, match=r"other-2 and .*part-1 were packed differently: fingerprints\.codec was"
    ):
        merge([parts[0], others[1]], tmp_path / "merged")
    pack_tiny(mixed, tmp_path / "one", codec)
    with pytest.raises(PackError, match="one: packed without --part"):
        merge([tmp_path / "one", parts[1]], tmp_path / "merged")
    (parts[1] / "shard-000000.tar").write_bytes(b"short")
    with pytest.raises(ShardError, match="5 bytes, the index wants"):
        merge(parts, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_a_part_that_does_not_exist_is_refused(
    clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches part 0 of 2, which packs nothing or everything."""
    for part in ((0, 2), (3, 2)):
        with pytest.raises(PackError, match=rf"part {part[0]}/2 does not exist; want 1/2 to 2/2"):
            pack_tiny(clips, tmp_path / "shards", codec, part=part)
