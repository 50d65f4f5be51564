"""Reading shards, and what a reader says of shards that it cannot trust."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from tiny_pack import pack_tiny

from selfforcing_dfd.common import sealed
from selfforcing_dfd.data.order import SampleOrder, batches
from selfforcing_dfd.data.shards import NonFiniteSampleError, ShardError, ShardReader
from selfforcing_dfd.data.sources.video import read_video
from selfforcing_dfd.tiny import world
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

REMEDY = (
    r"Copy the folder again .* or pack the clips again: "
    r"`selfforcing-dfd pack CLIPS --out .* --overwrite`"
)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index and seal it again, as a program that is wrong would."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(sealed(index)))


def replace_member(
    folder: Path, key: str, name: str, array: np.ndarray, size: int | None = None
) -> None:
    """Overwrite a member in place with a .npy file that is not larger, and update its checksum."""
    buffer = io.BytesIO()
    np.save(buffer, array)

    def change(index: dict[str, Any]) -> None:
        (sample,) = (sample for sample in index["samples"] if sample["key"] == key)
        place = sample["members"][name]
        data = buffer.getvalue()[:size]
        assert len(data) <= place[1]
        with (folder / sample["shard"]).open("r+b") as shard:
            shard.seek(place[0])
            shard.write(data)
        place[1:] = len(data), zlib.crc32(data)

    edit_index(folder, change)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_latents_and_text_come_back_bit_for_bit(
    clips: Path, codec: TinyCodec, tmp_path: Path, dtype: str
) -> None:
    """Catches a wrong offset, a transposed layout, and pixels scaled by something other than 255.

    Exact: what is stored is what the codec gave, rounded to the stored type and to nothing else.
    """
    out = tmp_path / "shards"
    pack_tiny(clips, out, codec, shard_size=5, dtype=dtype)
    reader = ShardReader(out)
    assert len(reader) == 12
    for number, path in enumerate(sorted(clips.glob("*.mp4"))):
        sample = reader[number]
        latents = codec.encode(read_video(path, 9)[None].float() / 255)[0]
        caption = path.with_suffix(".txt").read_text().strip()
        text = TinyText().encode([caption])[0]
        assert sample.key == path.stem
        assert sample.caption == caption
        assert torch.equal(sample.latents, latents.to(getattr(torch, dtype)).float())
        assert torch.equal(sample.text, text.to(getattr(torch, dtype)).float())
        assert sample.noise is None


def test_stored_text_has_no_padding(packed: Path) -> None:
    """Catches stored padding: UMT5's 512 tokens would double the size of a data set."""
    reader = ShardReader(packed)
    tokens = np.load(io.BytesIO(reader.members(0)["text.npy"]))
    assert tokens.shape == (3, 32)
    assert len(reader.captions[0].split()) == 3


def test_webdataset_reads_the_shards(packed: Path) -> None:
    """Catches storage that other tools do not read: same samples, same order, same arrays."""
    reader = ShardReader(packed)
    urls = [str(packed / shard.name) for shard in reader.index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [
        entry.key for entry in reader.index.samples
    ]
    for number, sample in enumerate(samples):
        assert torch.equal(torch.from_numpy(sample["latent.npy"]).float(), reader[number].latents)
        assert sample["json"]["caption"] == reader[number].caption
        assert sample["json"]["source"] == f"{sample['__key__']}.mp4"
        assert sample["json"]["codec"] == reader.index.fingerprints["codec"]


def test_a_reader_closes_its_files(packed: Path) -> None:
    """Catches a run that opens readers until the system refuses more files."""
    before = len(os.listdir("/dev/fd"))
    reader = ShardReader(packed)
    for number in range(len(reader)):
        reader[number]
    assert len(os.listdir("/dev/fd")) == before + 3
    del reader
    assert len(os.listdir("/dev/fd")) == before


def test_verify_accepts_what_was_packed(packed: Path) -> None:
    """Catches checksums of something other than the files."""
    ShardReader(packed).verify()


def test_index_hash_tells_folders_apart(packed: Path, own_shards: Path) -> None:
    """Catches a run that resumes on other data, or refuses a copy of the same."""
    assert ShardReader(own_shards).index_hash == ShardReader(packed).index_hash
    edit_index(own_shards, lambda index: index["samples"].reverse())
    assert ShardReader(own_shards).index_hash != ShardReader(packed).index_hash


def test_a_folder_without_index_is_named(tmp_path: Path) -> None:
    """Catches a bare FileNotFoundError for a folder of clips given in place of one of shards."""
    with pytest.raises(
        ShardError, match=rf"^{re.escape(str(tmp_path))}: no index\.json, .*{REMEDY}"
    ):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", r"KeyError: 'version'"),
        ('{"version": 2}', "format version 2, this program reads version 1"),
        ('{"version": 1, "samples": 3}', "TypeError"),
    ],
)
def test_an_index_that_cannot_be_read_is_named(
    own_shards: Path, content: str, problem: str
) -> None:
    """Catches a KeyError without the file's name, and a later format that is read as ours."""
    (own_shards / "index.json").write_text(content)
    with pytest.raises(
        ShardError,
        match=rf"index\.json: not an index this program can read \(.*{problem}.*\). {REMEDY}",
    ):
        ShardReader(own_shards)


def test_an_index_without_samples_is_refused(own_shards: Path) -> None:
    """Catches an IndexError at the first batch."""
    edit_index(own_shards, lambda index: index.update(samples=[]))
    with pytest.raises(ShardError, match="the index lists no samples"):
        ShardReader(own_shards)


def test_a_missing_shard_is_found_when_opening(own_shards: Path) -> None:
    """Catches a run that dies hours later, at the first sample of that shard."""
    size = (own_shards / "shard-000001.tar").stat().st_size
    (own_shards / "shard-000001.tar").unlink()
    with pytest.raises(
        ShardError, match=rf"shard-000001\.tar is missing, the index wants {size} bytes\. {REMEDY}"
    ):
        ShardReader(own_shards)


def test_truncated_shards_are_found_when_opening_and_all_named(own_shards: Path) -> None:
    """Catches a partial copy noticed hours later, and one that is repaired shard by shard."""
    sizes = []
    for name in ("shard-000000.tar", "shard-000002.tar"):
        data = (own_shards / name).read_bytes()
        (own_shards / name).write_bytes(data[:-700])
        sizes.append(len(data))
    wanted = [
        rf"shard-00000{n}\.tar has {size - 700} bytes, the index wants {size}"
        for n, size in zip((0, 2), sizes, strict=True)
    ]
    with pytest.raises(ShardError, match=rf"{wanted[0]}; {wanted[1]}\. {REMEDY}"):
        ShardReader(own_shards)


def test_an_index_of_other_clips_is_found_when_opening(
    own_shards: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches the index of other clips of the same shape.

    Sizes, keys and offsets are equal: only checksums tell.
    """
    world.write_clips(tmp_path / "others", 12, seed=1, level="short", num_frames=9)
    out = tmp_path / "other-shards"
    pack_tiny(tmp_path / "others", out, codec, shard_size=5)
    (own_shards / "index.json").write_bytes((out / "index.json").read_bytes())
    with pytest.raises(
        ShardError,
        match=rf"000000\.\S+ is not what the index describes \(CRC-32 differs\)\. {REMEDY}",
    ):
        ShardReader(own_shards)


def test_an_index_that_points_past_its_shard_is_found_when_opening(own_shards: Path) -> None:
    """Catches an empty read that numpy reports as a malformed file."""

    def move(index: dict[str, Any]) -> None:
        index["samples"][7]["members"]["latent.npy"][0] = 10**9

    edit_index(own_shards, move)
    with pytest.raises(
        ShardError,
        match=r"shard-000001\.tar: 000007\.latent\.npy would end at byte 10000\d+, past the end",
    ):
        ShardReader(own_shards)


def test_a_sample_without_noise_among_others_with_noise_is_refused(own_shards: Path) -> None:
    """Catches stored and fresh noise in one batch of `inversion` pairing."""

    def add(index: dict[str, Any]) -> None:
        index["samples"][3]["members"]["noise.npy"] = index["samples"][3]["members"]["latent.npy"]

    edit_index(own_shards, add)
    with pytest.raises(
        ShardError, match=r"000003\.\* has members .*noise\.npy.*, the first sample has"
    ):
        ShardReader(own_shards)


def test_a_changed_byte_is_found_when_it_is_read(own_shards: Path) -> None:
    """Catches bit rot that trains on."""
    reader = ShardReader(own_shards)
    member = reader.index.samples[11].members["latent.npy"]
    with (own_shards / "shard-000002.tar").open("r+b") as shard:
        shard.seek(member.offset + member.size - 1)
        last = shard.read(1)
        shard.seek(member.offset + member.size - 1)
        shard.write(bytes([last[0] ^ 1]))
    reader = ShardReader(own_shards)
    with pytest.raises(
        ShardError, match=rf"shard-000002\.tar: 000011\.latent\.npy is not what .*{REMEDY}"
    ):
        reader[11]
    with pytest.raises(ShardError, match=r"shard-000002\.tar: not as packed \(SHA-256 differs\)"):
        reader.verify()


def test_a_damaged_sample_is_reported_from_a_worker(own_shards: Path) -> None:
    """Catches a worker's error that loses its kind or the sample's name."""
    replace_member(own_shards, "000011", "latent.npy", np.zeros((1, 16, 8, 8), np.float16))
    reader = ShardReader(own_shards)
    with pytest.raises(ShardError, match=r"000011\.latent\.npy is \[1, 16, 8, 8\]"):
        list(batches(reader, SampleOrder(12, 0), [0], 12, num_workers=2))


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        (
            "latent.npy",
            np.zeros((2, 16, 8, 8), np.float16),
            r"is \[2, 16, 8, 8\], the index wants \[3, 16, 8, 8\]",
        ),
        (
            "latent.npy",
            np.zeros((16, 3, 8, 8), np.float16),
            r"is \[16, 3, 8, 8\], the index wants \[3, 16, 8, 8\]",
        ),
        (
            "latent.npy",
            np.zeros((3, 16, 8, 8), np.int16),
            r"has dtype int16, want float16 or float32",
        ),
        (
            "text.npy",
            np.zeros((3, 16), np.float16),
            r"is \[3, 16\], the index wants \[at most 12, 32\]",
        ),
        ("text.npy", np.zeros(4, np.float16), r"is \[4\], the index wants \[at most 12, 32\]"),
    ],
)
def test_a_member_of_another_shape_or_type_is_named(
    own_shards: Path, name: str, array: np.ndarray, problem: str
) -> None:
    """Catches latents that broadcast or reshape into something that trains."""
    replace_member(own_shards, "000006", name, array)
    reader = ShardReader(own_shards)
    with pytest.raises(
        ShardError, match=rf"shard-000001\.tar: 000006\.{re.escape(name)} {problem}\. {REMEDY}"
    ):
        reader[6]


def test_more_tokens_than_the_padded_length_are_refused(own_shards: Path) -> None:
    """Catches negative padding, which silently cuts the caption off."""
    edit_index(own_shards, lambda index: index.update(text_shape=[2, 32]))
    with pytest.raises(
        ShardError, match=r"000000\.text\.npy is \[3, 32\], the index wants \[at most 2, 32\]"
    ):
        ShardReader(own_shards)


def test_a_list_is_no_fingerprint(own_shards: Path) -> None:
    """Catches a list of numbers that is taken for names: one of them asked for the list's end."""
    edit_index(own_shards, lambda index: index.update(fingerprints=[2**62, 1]))
    with pytest.raises(ShardError, match=r"index\.json"):
        ShardReader(own_shards)


def test_a_shape_that_no_clip_can_have_is_refused(own_shards: Path) -> None:
    """Catches memory for 2^62 tokens being asked of the system."""
    edit_index(own_shards, lambda index: index.update(text_shape=[2**62, 32]))
    with pytest.raises(ShardError, match=r"text_shape is .*, want sizes up to 65,536"):
        ShardReader(own_shards)


@pytest.mark.parametrize("size", [0, 40, 200])
def test_a_member_that_is_no_array_is_named(own_shards: Path, size: int) -> None:
    """Catches numpy's own error, which does not name the sample.

    Sizes: nothing, half a header, half the data.
    """
    replace_member(own_shards, "000006", "text.npy", np.zeros((3, 32), np.float16), size=size)
    with pytest.raises(ShardError, match=r"000006\.text\.npy is no \.npy array \(.+\)"):
        ShardReader(own_shards)[6]


def test_folders_packed_before_there_was_a_manifest_are_read(own_shards: Path) -> None:
    """Catches a reader that asks every data set to be packed again."""
    path = own_shards / "index.json"
    index = json.loads(path.read_text())
    del index["about"], index["sha256"]
    path.write_text(json.dumps(index))
    reader = ShardReader(own_shards)
    assert (len(reader), reader.negative, reader.index.about) == (12, None, {})


@pytest.mark.parametrize("part", range(3))
def test_a_flipped_bit_in_the_index_changes_nothing_unseen(own_shards: Path, part: int) -> None:
    """Catches an index whose captions and offsets nothing protects: 2 of 90 flips changed them."""
    path = own_shards / "index.json"
    data = path.read_bytes()
    before = json.loads(data)
    for place in range(part, len(data), 37):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 7)
        path.write_bytes(changed)
        try:
            ShardReader(own_shards)
        except ShardError:
            continue
        assert json.loads(changed) == before, place


def test_a_caption_of_another_clip_is_found(own_shards: Path) -> None:
    """Catches a caption that was changed in the index, by hand or by a program that sealed it."""
    index = json.loads((own_shards / "index.json").read_text())
    index["samples"][3]["caption"] = "a cyan cross moves"
    (own_shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match=r"content is not what was written \(SHA-256 differs\)"):
        ShardReader(own_shards)
    (own_shards / "index.json").write_text(json.dumps(sealed(index)))
    with pytest.raises(ShardError, match=r"000003 was packed as '.*', but .* 'a cyan cross moves'"):
        ShardReader(own_shards).verify()


@pytest.mark.parametrize("name", ["latent.npy", "text.npy"])
def test_values_that_are_not_finite_are_named(own_shards: Path, name: str) -> None:
    """Catches NaN with valid checksums: `verify` said that all is well, and training named none."""
    reader = ShardReader(own_shards)
    sample = reader[0]
    array = (sample.latents if name == "latent.npy" else sample.text[:3]).numpy().astype("float16")
    array.flat[5] = np.nan
    replace_member(own_shards, "000000", name, array)
    reader = ShardReader(own_shards)
    with pytest.raises(NonFiniteSampleError, match=rf"000000\.{name} holds values .* not finite"):
        reader[0]
    shard = own_shards / "shard-000000.tar"

    def seal_shard(index: dict[str, Any]) -> None:
        index["shards"][0]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()

    edit_index(own_shards, seal_shard)
    with pytest.raises(ShardError, match=rf"000000\.{name} holds values that are not finite"):
        ShardReader(own_shards).verify()
    order = SampleOrder(12, 0, aside={0: 0})
    assert len(list(next(batches(reader, order, [0], 12)).keys)) == 12
