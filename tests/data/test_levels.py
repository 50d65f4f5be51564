"""Shards whose clips have a short, a medium and a long caption, and which of them is read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from tiny_pack import pack_tiny
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import sealed
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.levels import LEVELS
from selfforcing_dfd.data.merge import merge
from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.order import SampleOrder, batches, load_batch
from selfforcing_dfd.data.pack import pack
from selfforcing_dfd.data.shards import ShardError, ShardReader
from selfforcing_dfd.data.sources.listing import list_clips
from selfforcing_dfd.data.sources.tiny import TinySource
from selfforcing_dfd.tiny import world
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from tests.data.test_shards import edit_index, replace_member

NUM = 6


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory, codec: TinyCodec) -> Path:
    """A folder `clips` with three captions beside each clip, and its `shards` of 4 and 2."""
    folder = tmp_path_factory.mktemp("levels")
    world.write_clips(folder / "clips", NUM, 0, "all", 9)
    pack_tiny(folder / "clips", folder / "shards", codec, shard_size=4, levels=LEVELS)
    return folder


@pytest.fixture
def own(three: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(three / "shards", tmp_path / "shards"))


def wanted(level: str) -> list[str]:
    """What `world` says of the clips at a level."""
    return [world.clip_number(number, 0, level)[1] for number in range(NUM)]


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_is_read_with_its_own_text(three: Path, level: Any) -> None:
    """Catches the embedding of one caption beside the words of another."""
    reader = ShardReader(three / "shards", level)
    reader.verify()
    assert reader.levels == LEVELS
    assert reader.captions == wanted(level)
    for number in range(NUM):
        sample = reader[number]
        assert sample.caption == wanted(level)[number]
        assert torch.equal(sample.text, TinyText().encode([sample.caption])[0].half().float())
        assert torch.equal(sample.latents, ShardReader(three / "shards")[number].latents)


def test_unasked_the_longest_caption_stands_for_a_clip(three: Path) -> None:
    """Catches tools that know of one caption and get none, or the least."""
    reader = ShardReader(three / "shards")
    assert reader.captions == wanted("long")
    assert [entry.caption for entry in reader.index.samples] == wanted("long")


def test_mixed_levels_depend_on_seed_and_position_alone(three: Path) -> None:
    """Catches levels that a resume, another number of processes or a worker would change."""
    reader = ShardReader(three / "shards", "mixed")
    order = SampleOrder(NUM, seed=3)
    whole = load_batch(reader, order, 0, 60).captions
    read = batches(ShardReader(three / "shards", "mixed"), order, range(0, 60, 4), 4, 2)
    assert tuple(caption for batch in read for caption in batch.captions) == whole
    for rank in range(2):  # of two processes with batches of 3, resumed at 12
        starts = range(12 + 3 * rank, 60, 6)
        part = [load_batch(reader, order, start, 3).captions for start in starts]
        assert part == [whole[start : start + 3] for start in starts]
    again = load_batch(reader, SampleOrder(NUM, seed=4), 0, 60).captions
    levels = [len(caption.split()) for caption in whole]
    assert levels != [len(caption.split()) for caption in again]
    assert {number for number, count in Counter(levels).items() if count > 8} == {3, 4, 7}


def test_mixed_levels_of_seed_zero_are_pinned(three: Path) -> None:
    """Catches other draws after an update: a resumed run must go on with the same captions."""
    reader = ShardReader(three / "shards", "mixed")
    drawn = [LEVELS.index(reader.level_at(0, 0, position)) for position in range(12)]
    assert drawn == [2, 1, 0, 1, 1, 0, 1, 1, 2, 0, 0, 2]


def test_text_and_caption_of_a_mixed_sample_belong_together(three: Path) -> None:
    """Catches a level drawn once for the words and once more for the embedding."""
    reader = ShardReader(three / "shards", "mixed")
    batch = load_batch(reader, SampleOrder(NUM, 0), 0, 12)
    assert torch.equal(batch.text, TinyText().encode(list(batch.captions)).half().float())
    alone = [reader[number] for number in range(NUM)]
    assert [sample.caption for sample in alone] == reader.captions


@pytest.mark.parametrize(("choice", "held"), [("short", "one caption"), ("mixed", "one caption")])
def test_a_level_that_shards_lack_is_refused_with_the_way_to_it(
    packed: Path, choice: Any, held: str
) -> None:
    """Catches a run with captions of another level than its settings say."""
    with pytest.raises(ShardError, match=rf"shards holds {held} for each clip, .*--levels short"):
        ShardReader(packed, choice)


def test_two_levels_do(three: Path, codec: TinyCodec, tmp_path: Path) -> None:
    """Catches code that knows three levels or one."""
    pack_tiny(three / "clips", tmp_path / "two", codec, levels=("short", "long"))
    reader = ShardReader(tmp_path / "two", "mixed")
    reader.verify()
    assert reader.levels == ("short", "long")
    with pytest.raises(ShardError, match="level short and long, and medium captions are asked for"):
        ShardReader(tmp_path / "two", "medium")


def test_one_caption_is_packed_as_before(packed: Path) -> None:
    """Catches shards without levels that another version could not read."""
    index = json.loads((packed / "index.json").read_text())
    assert set(index["samples"][0]) == {"key", "shard", "caption", "members"}
    assert set(index["samples"][0]["members"]) == {"latent.npy", "text.npy", "json"}
    assert "captions" not in index["about"]["settings"]
    assert ShardReader(packed).levels == ()


def test_webdataset_reads_all_levels(three: Path) -> None:
    """Catches members that webdataset takes for those of another sample, or cannot decode."""
    reader = ShardReader(three / "shards")
    urls = [str(three / "shards" / shard.name) for shard in reader.index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == NUM
    for number, sample in enumerate(samples):
        for level in LEVELS:
            text = torch.from_numpy(sample[f"text.{level}.npy"]).float()
            read = reader.read(number, level)
            assert sample["json"]["captions"][level] == read.caption
            assert torch.equal(text, read.text[: len(text)])
            assert not read.text[len(text) :].any()


def test_parts_merge_to_the_whole(three: Path, codec: TinyCodec, tmp_path: Path) -> None:
    """Catches captions lost where folders are put together."""
    parts = [tmp_path / f"part-{number}" for number in (1, 2)]
    for number, out in enumerate(parts, 1):
        pack_tiny(three / "clips", out, codec, levels=LEVELS, part=(number, 2))
    merge(parts, tmp_path / "merged")
    reader = ShardReader(tmp_path / "merged", "medium")
    reader.verify()
    assert reader.captions == wanted("medium")


def test_the_tiny_world_packs_three_captions(codec: TinyCodec, tmp_path: Path) -> None:
    """Catches clips that differ from those of one level, or captions of another clip."""
    for level in ("all", "medium"):
        pack(TinySource(4, 0, level, 9), tmp_path / level, codec, TinyText())
    one = ShardReader(tmp_path / "medium")
    several = ShardReader(tmp_path / "all", "medium")
    for number in range(4):
        assert torch.equal(one[number].latents, several[number].latents)
        assert torch.equal(one[number].text, several[number].text)
        assert one[number].caption == several[number].caption


def edit(folder: Path, number: int, level: str, caption: str | None) -> None:
    """Change a caption in the index, or remove it, and seal the index again."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    captions = index["samples"][number]["captions"]
    captions.pop(level)
    if caption is not None:
        captions[level] = caption
    path.write_text(json.dumps(sealed(index)))


def test_verify_compares_every_level(own: Path) -> None:
    """Catches a short caption that was changed in the index, which only the long one guards."""
    edit(own, 2, "short", "a cross moves slowly")
    with pytest.raises(ShardError, match=r"000002 was packed as '.*', but .* 'a cross moves slow"):
        ShardReader(own).verify()


def test_a_sample_without_a_level_is_refused(own: Path) -> None:
    """Catches a KeyError at the batch that draws the missing caption."""
    edit(own, 3, "medium", None)
    with pytest.raises(ShardError, match=r"000003\.\* has captions \['long', 'short'\], the first"):
        ShardReader(own)


def test_a_flipped_bit_of_one_level_is_found(own: Path) -> None:
    """Catches a reader, or `verify`, that looks at one level's embedding only."""
    reader = ShardReader(own)
    member = reader.index.samples[1].members["text.short.npy"]
    path = own / reader.index.samples[1].shard
    data = bytearray(path.read_bytes())
    data[member.offset + member.size - 1] ^= 1
    path.write_bytes(data)
    assert ShardReader(own, "long")[1].caption == wanted("long")[1]
    with pytest.raises(ShardError, match=r"text\.short\.npy is not what the index describes"):
        ShardReader(own, "short")[1]
    with pytest.raises(ShardError, match="not as packed"):
        ShardReader(own, "long").verify()


def test_verify_reads_every_level(own: Path) -> None:
    """Catches NaN with valid checksums in an embedding that only another level's run would meet."""
    array = ShardReader(own, "short")[0].text[:3].numpy().astype("float16")
    array.flat[5] = np.nan
    replace_member(own, "000000", "text.short.npy", array)
    digest = hashlib.sha256((own / "shard-000000.tar").read_bytes()).hexdigest()
    edit_index(own, lambda index: index["shards"][0].update(sha256=digest))
    assert ShardReader(own, "long")[0].caption == wanted("long")[0]
    with pytest.raises(ShardError, match=r"000000\.text\.short\.npy holds values .* not finite"):
        ShardReader(own, "long").verify()


def test_noise_belongs_to_one_level(own: Path) -> None:
    """Catches noise found under one caption and used under another."""

    def means(latents: Tensor, text: Tensor, fresh: Tensor) -> Tensor:
        return torch.zeros_like(latents) + text.mean(dim=(1, 2))[:, None, None, None, None]

    with pytest.raises(PackError, match=r"data\.captions is mixed; find it for one level"):
        store_noise(own, means, captions="mixed")
    store_noise(own, means, captions="short")
    reader = ShardReader(own, "short")
    reader.verify()
    assert reader.index.about["noise_captions"] == "short"
    assert reader.captions == wanted("short")
    sample = reader[1]
    assert sample.noise is not None
    assert torch.equal(sample.noise.mean(), sample.text.mean().half().float())


def test_captions_in_columns_are_read_unasked(three: Path, tmp_path: Path) -> None:
    """Catches a table of three captions that asks for a column `caption`."""
    rows = [
        {"video": f"{number:06d}.mp4", **{level: wanted(level)[number] for level in LEVELS}}
        for number in range(NUM)
    ]
    rows[1]["medium"] = ""
    table = tmp_path / "captions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips = list_clips(three / "clips", captions=table)
    assert [clip.captions["short"] for clip in clips] == wanted("short")
    assert [clip.caption for clip in clips] == wanted("long")
    assert clips[1].problem == "no medium caption in the list; write one"
    with pytest.raises(PackError, match="has no column or key caption; it has video"):
        table.write_text('{"video": "000000.mp4"}\n')
        list_clips(three / "clips", captions=table)


def test_a_clip_without_one_of_its_captions_is_left_out(
    three: Path, codec: TinyCodec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a clip that is packed with two captions of three; by the command line."""
    clips = shutil.copytree(three / "clips", tmp_path / "clips")
    (clips / "000001.medium.txt").unlink()
    command = ["pack", str(clips), "--codec", "tiny", "--frames", "9"]
    assert main([*command, "--levels", "short,medium,long", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "000001.mp4: no caption; write one into 000001.medium.txt beside it" in said
    assert len(ShardReader(tmp_path / "out", "mixed")) == NUM - 1
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "5 samples with short, medium, long captions in 1 shards" in capsys.readouterr().out
