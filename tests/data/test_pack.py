"""Packing: what is left out and why, and that a folder of shards is complete or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import write_clip
from tiny_pack import FailingCodec, pack_and_die, pack_tiny, stop_with
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.pack import PackOptions, check_early, pack
from selfforcing_dfd.data.shards import ShardError, ShardReader
from selfforcing_dfd.data.source import Item
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText


def test_packing_twice_gives_the_same_bytes(
    clips: Path, packed: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches time stamps in the tars and an order by directory listing.

    Resume refuses another index.
    """
    pack_tiny(clips, tmp_path / "again", codec, shard_size=5)
    for path in packed.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_summary_and_shards_count_the_same(
    packed: Path, clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches samples lost where one shard ends and the next begins."""
    summary = pack_tiny(clips, tmp_path / "shards", codec, shard_size=4)
    reader = ShardReader(summary.folder)
    assert (summary.num_samples, summary.num_shards, summary.refused) == (12, 3, ())
    assert [entry.shard for entry in reader.index.samples] == [
        f"shard-{n:06d}.tar" for n in range(3) for _ in range(4)
    ]
    assert [entry.key for entry in reader.index.samples] == [f"{n:06d}" for n in range(12)]


def damage(clips: Path, frames: Tensor, kind: str) -> None:
    """Make clip 000002 unusable in one way."""
    clip = clips / "000002.mp4"
    caption = clips / "000002.txt"
    match kind:
        case "no caption":
            caption.unlink()
        case "empty caption":
            caption.write_text(" \n")
        case "caption in another encoding":
            caption.write_bytes("größer".encode("latin-1"))
        case "long caption":
            caption.write_text(
                "one two three four five six seven eight nine ten eleven twelve thirteen"
            )
        case "short":
            write_clip(clip, frames[:8], fps=16)
        case "unreadable":
            clip.write_bytes(b"not a video")
        case "size":
            write_clip(clip, frames[:, :48], fps=16)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no caption", "no caption; write one into 000002.txt beside it"),
        ("empty caption", "the caption in 000002.txt is empty; write one"),
        ("caption in another encoding", "000002.txt is not UTF-8"),
        ("long caption", "caption has 13 words, 12 fit"),
        ("short", "has 8 video frames, want 9"),
        ("unreadable", "cannot be read as video"),
        ("size", "is 48x64 (height x width), want 64x64; ffmpeg"),
    ],
)
def test_a_clip_that_cannot_be_used_is_left_out_by_name(
    own_clips: Path, codec: TinyCodec, frames: Tensor, kind: str, reason: str, tmp_path: Path
) -> None:
    """Catches one bad file of ten thousand stopping the packer, or vanishing without a word."""
    damage(own_clips, frames, kind)
    summary = pack_tiny(own_clips, tmp_path / "shards", codec)
    (refusal,) = summary.refused
    assert refusal.file == "000002.mp4"
    assert refusal.reason.startswith(reason)
    reader = ShardReader(tmp_path / "shards")
    assert [entry.key for entry in reader.index.samples] == ["000000", "000001", "000003"]
    assert refusal.damaged == (kind == "unreadable")
    assert reader.index.refused == (refusal.to_fields(),)


def test_nothing_left_is_an_error_that_says_why(
    own_clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches an empty shard folder, which training finds out about much later."""
    for path in own_clips.glob("*.txt"):
        path.unlink()
    with pytest.raises(
        PackError, match=r"none of its 4 clips can be used; .*\n  000000\.mp4: no caption"
    ):
        pack_tiny(own_clips, tmp_path / "shards", codec)
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


@pytest.mark.parametrize(
    ("make", "message"), [(False, "no such folder"), (True, "no videos in it")]
)
def test_a_folder_without_clips_is_named(
    tmp_path: Path, codec: TinyCodec, make: bool, message: str
) -> None:
    """Catches an error about an empty list for a mistyped path."""
    if make:
        (tmp_path / "clips").mkdir()
    with pytest.raises(PackError, match=rf"clips: {message}; want .*a caption file beside each"):
        pack_tiny(tmp_path / "clips", tmp_path / "shards", codec)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10, (64, 64)), r"10 video frames are not 1 \+ 4 n; use 9 or 13"),
        ((9, (64, 60)), r"64 x 60; height and width must be multiples of 8"),
    ],
)
def test_a_length_or_size_that_the_codec_cannot_take_fails_at_once(
    clips: Path, codec: TinyCodec, tmp_path: Path, shape: Any, message: str
) -> None:
    """Catches a whole folder refused clip by clip for a mistake in the command."""
    with pytest.raises(ValueError, match=message):
        pack(FileSource(clips, *shape), tmp_path / "shards", codec, TinyText())
    assert list(tmp_path.iterdir()) == []


def test_captions_of_another_granularity(own_clips: Path, codec: TinyCodec, tmp_path: Path) -> None:
    """Catches the short caption packed in place of the long one.

    A folder of clips may carry several captions each.
    """
    for path in list(own_clips.glob("*.mp4")):
        path.with_name(f"{path.stem}.long.txt").write_text(f"long  words\nabout {path.stem}\n")
    pack_tiny(own_clips, tmp_path / "shards", codec, caption_suffix=".long.txt")
    assert ShardReader(tmp_path / "shards").captions == [
        f"long words about 00000{n}" for n in range(4)
    ]


def test_file_names_that_webdataset_would_split_get_keys_that_it_does_not(
    own_clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches `a.1` and `a.2` becoming one sample: webdataset ends a key at the first dot."""
    names = ["a.1", "a 1", "große Katze", "k" * 120]
    for number, name in enumerate(names):
        for ending in (".mp4", ".txt"):
            (own_clips / f"{number:06d}{ending}").rename(own_clips / f"{name}{ending}")
    pack_tiny(own_clips, tmp_path / "shards", codec)
    keys = [entry.key for entry in ShardReader(tmp_path / "shards").index.samples]
    assert keys == ["a_1", "a_1_2", "gro_e_Katze", "k" * 64]


def test_a_percent_sign_in_the_path_is_only_a_percent_sign(
    own_clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches a folder `50%d` taken for a format string, which ShardWriter's file name is."""
    pack_tiny(own_clips, tmp_path / "50%d", codec)
    assert len(ShardReader(tmp_path / "50%d")) == 4


def test_values_that_do_not_fit_stop_the_packer(
    own_clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches infinities in half precision, which reach the loss as NaN much later."""
    huge = TinyCodec(codec.first, codec.rest, codec.scale * 1e6)
    with pytest.raises(
        PackError, match=r"000000\.mp4: NaN, infinity or too large for float16; .*store float32"
    ):
        pack_tiny(own_clips, tmp_path / "shards", huge)
    assert pack_tiny(own_clips, tmp_path / "shards", huge, dtype="float32").num_samples == 4


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), KeyboardInterrupt(), OSError(28, "No space left")]
)
def test_an_interrupted_pack_leaves_nothing(
    clips: Path, codec: TinyCodec, tmp_path: Path, error: BaseException
) -> None:
    """Catches half a data set that opens, and gigabytes left on a full disk."""
    with pytest.raises(type(error)):
        pack_tiny(
            clips, tmp_path / "shards", FailingCodec(codec, 7, stop_with(error)), shard_size=3
        )
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_leaves_the_earlier_shards(
    clips: Path, codec: TinyCodec, own_shards: Path
) -> None:
    """Catches shards deleted before the new ones are complete."""
    before = ShardReader(own_shards).index_hash
    with pytest.raises(RuntimeError):
        failing = FailingCodec(codec, 7, stop_with(RuntimeError()))
        pack_tiny(clips, own_shards, failing, shard_size=3, overwrite=True)
    reader = ShardReader(own_shards)
    reader.verify()
    assert reader.index_hash == before
    assert [path.name for path in own_shards.parent.iterdir()] == [own_shards.name]


def test_a_killed_pack_leaves_nothing_readable_and_does_not_stop_the_next(
    clips: Path, packed: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches an unfinished folder that opens, or stands in the way of the next run.

    kill -9 runs no clean-up.
    """
    out = tmp_path / "shards"
    pack_and_die(7, clips, out, codec, shard_size=3)
    assert [path.name for path in tmp_path.iterdir()] == ["shards.partial"]
    with pytest.raises(ShardError, match=r"no index\.json"):
        ShardReader(tmp_path / "shards.partial")
    pack_tiny(clips, out, codec, shard_size=5)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert ShardReader(out).index_hash == ShardReader(packed).index_hash


def test_a_kill_between_the_two_renames_loses_nothing(
    clips: Path, codec: TinyCodec, own_shards: Path
) -> None:
    """Catches a pack that fails on what a kill left.

    While one folder replaces another there is a moment with neither in place.
    """
    replaced = own_shards.with_name(".old-shards")
    own_shards.rename(replaced)
    ShardReader(replaced).verify()
    pack_tiny(clips, own_shards, codec, shard_size=5)
    shutil.copytree(own_shards, replaced)
    pack_tiny(clips, own_shards, codec, shard_size=5, overwrite=True)
    assert [path.name for path in own_shards.parent.iterdir()] == [own_shards.name]


def test_existing_shards_are_replaced_only_on_request(
    own_clips: Path, codec: TinyCodec, own_shards: Path
) -> None:
    """Catches a day of encoding overwritten by a repeated command."""
    before = ShardReader(own_shards).index_hash
    with pytest.raises(
        PackError, match=r"shards exists; choose another folder, or replace it with .*--overwrite"
    ):
        pack_tiny(own_clips, own_shards, codec)
    assert ShardReader(own_shards).index_hash == before
    pack_tiny(own_clips, own_shards, codec, overwrite=True)
    assert len(ShardReader(own_shards)) == 4


def test_a_folder_with_other_things_in_it_is_never_replaced(
    own_clips: Path, codec: TinyCodec
) -> None:
    """Catches files of a user deleted by `--out . --overwrite`."""
    before = sorted(path.name for path in own_clips.iterdir())
    with pytest.raises(
        PackError, match=r"clips holds 000000\.mp4, 000000\.txt, 000001\.mp4, not only shards"
    ):
        pack_tiny(own_clips, own_clips, codec, overwrite=True)
    assert sorted(path.name for path in own_clips.iterdir()) == before


def test_the_index_is_plain_json_with_the_documented_fields(packed: Path) -> None:
    """Catches a field renamed by a refactoring. Other tools read the index."""
    index = json.loads((packed / "index.json").read_text())
    assert index["version"] == 1
    assert index["latent_shape"] == [3, 16, 8, 8]
    assert index["text_shape"] == [12, 32]
    assert set(index["fingerprints"]) == {"codec", "text"}
    assert set(index["shards"][0]) == {"name", "bytes", "sha256"}
    assert set(index["samples"][0]) == {"key", "shard", "caption", "members"}
    assert set(index["samples"][0]["members"]) == {"latent.npy", "text.npy", "json"}
    assert index["refused"] == []


def test_zeros_inside_a_caption_are_not_cut_off(
    own_clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches a zero vector between two words taken for padding, which comes only at the end."""

    class Holes(TinyText):
        def encode(self, captions: list[str]) -> Tensor:
            text = super().encode(captions)
            text[:, 1] = 0
            return text

    source = FileSource(own_clips, 9, (64, 64))
    pack(source, tmp_path / "shards", codec, Holes(), PackOptions(dtype="float32"))
    reader = ShardReader(tmp_path / "shards")
    for number in range(len(reader)):
        assert torch.equal(reader[number].text, Holes().encode([reader.captions[number]])[0])


def test_random_latents_survive_every_rounding(own_clips: Path, tmp_path: Path) -> None:
    """Catches a dtype that loses what another codec's latents contain.

    The tiny codec's latents are tame.
    """

    class Wild:
        fingerprint = "wild"

        def num_latent_frames(self, num_video_frames: int) -> int:
            return 3

        def encode(self, video: Tensor) -> Tensor:
            return rng.normal((1, 3, 16, 8, 8), 0, "wild") * 1e5

    pack_tiny(own_clips, tmp_path / "shards", Wild(), dtype="float32")
    assert torch.equal(
        ShardReader(tmp_path / "shards")[2].latents, Wild().encode(torch.zeros(1))[0]
    )


def test_what_cannot_be_used_is_refused_before_encoders_are_loaded(
    own_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches minutes spent on reading UMT5 for a folder of clips that are all too short.

    Without --model an encoder that is asked for is an error, so this shows what comes first.
    """
    command = ["pack", str(own_clips), "--codec", "wan", "--size", "64x64"]
    out = tmp_path / "shards"
    assert main([*command, "--out", str(out)]) != 0
    assert "none of its 4 clips can be used" in capsys.readouterr().err
    out.mkdir()
    assert main([*command, "--frames", "9", "--out", str(out)]) != 0
    assert "shards exists" in capsys.readouterr().err
    out.rmdir()
    assert main([*command, "--frames", "9", "--out", str(out)]) != 0
    assert "--codec wan needs --model DIR" in capsys.readouterr().err


def test_one_clip_that_can_be_used_is_enough(own_clips: Path, tmp_path: Path) -> None:
    """Catches a folder refused for its first clip, and a check that decodes all of them."""
    (own_clips / "000000.txt").unlink()
    read: list[int] = []

    class Counting(FileSource):
        def read(self, number: int) -> Item:
            read.append(number)
            return super().read(number)

    check_early(Counting(own_clips, 9, (64, 64)), tmp_path / "shards", PackOptions())
    assert read == [0, 1]


def test_files_of_other_kinds_are_counted_and_named(
    own_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches files that are left out without a word.

    Captions, lists and hidden files are not meant to be clips.
    """
    (own_clips / "000001.mp4").rename(own_clips / "film.MOV.part")
    for name in ("song.flac", "notes.txt", "list.csv", ".DS_Store"):
        (own_clips / name).write_bytes(b"")
    command = ["pack", str(own_clips), "--codec", "tiny", "--frames", "9"]
    assert main([*command, "--out", str(tmp_path / "shards")]) == 0
    said = capsys.readouterr().out
    assert "skipped 2 files that are no videos by their endings: film.MOV.part, song.flac" in said
    assert len(ShardReader(tmp_path / "shards")) == 3


def test_a_caption_that_cannot_be_opened_is_one_clip_lost(
    own_clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches a folder in the place of a caption that ends the whole run."""
    (own_clips / "000002.txt").unlink()
    (own_clips / "000002.txt").mkdir()
    (refusal,) = pack_tiny(own_clips, tmp_path / "shards", codec).refused
    assert refusal.file == "000002.mp4"
    assert refusal.reason.startswith("its caption 000002.txt cannot be read")
