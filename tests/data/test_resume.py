"""Interrupted packing goes on to the same bytes; workers, parts and merging change nothing either."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pack import FailingCodec, pack_and_die, pack_tiny, stop_with
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.data.ahead import in_order
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.merge import merge
from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.shards import ShardError, ShardReader
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def mixed(clips: Path, tmp_path: Path) -> Path:
    """Clips 0 to 11, of which 1, 4, 5 and 11 cannot be used: before, between and after complete
    shards of 3.
    """
    folder = Path(shutil.copytree(clips, tmp_path / "mixed"))
    (folder / "000001.txt").unlink()
    (folder / "000004.mp4").write_bytes(b"no video")
    (folder / "000005.txt").write_text("")
    (folder / "000011.mp4").write_bytes(b"")
    return folder


@pytest.fixture
def whole(mixed: Path, codec: TinyCodec, tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    pack_tiny(mixed, tmp_path / "whole", codec, shard_size=3)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("num_clips", [0, 2, 3, 4, 7])
def test_a_killed_run_goes_on_to_the_same_bytes(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path, num_clips: int
) -> None:
    """Would catch clips lost or doubled at the seam, refusals forgotten or named twice, and shards
    cut elsewhere.
    """
    pack_and_die(num_clips, mixed, tmp_path / "shards", codec, shard_size=3, unfinished="keep")
    pack_tiny(mixed, tmp_path / "shards", codec, shard_size=3, unfinished="resume")
    assert contents(tmp_path / "shards") == whole
    assert not (tmp_path / "shards.partial").exists()


def test_a_run_may_be_interrupted_again_and_again(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path
) -> None:
    """Would catch a journal that a second interruption overwrites."""
    out = tmp_path / "shards"
    pack_and_die(4, mixed, out, codec, shard_size=3, unfinished="keep")
    with pytest.raises(KeyboardInterrupt):
        failing = FailingCodec(codec, 4, stop_with(KeyboardInterrupt()))
        pack_tiny(mixed, out, failing, shard_size=3, unfinished="resume")
    pack_tiny(mixed, out, codec, shard_size=3, unfinished="resume")
    assert contents(out) == whole


def test_complete_shards_are_not_encoded_again(
    mixed: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Would catch a resume that only looks like one. 8 clips can be used, 6 lie in complete shards,
    the black clip counts.
    """
    out = tmp_path / "shards"
    pack_and_die(7, mixed, out, codec, shard_size=3, unfinished="keep")
    counting = FailingCodec(codec, 100, stop_with(AssertionError()))
    pack_tiny(mixed, out, counting, shard_size=3, unfinished="resume")
    assert 101 - counting.left == 1 + 2


def test_a_journal_line_without_its_end_does_not_count(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path
) -> None:
    """A process may die while it writes the journal; its shard is then written again. Killed once
    more, so that would be caught a new line that goes on where the cut one ends.
    """
    pack_and_die(7, mixed, tmp_path / "shards", codec, shard_size=3, unfinished="keep")
    journal = tmp_path / "shards.partial" / "progress.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    pack_and_die(4, mixed, tmp_path / "shards", codec, shard_size=3, unfinished="resume")
    pack_tiny(mixed, tmp_path / "shards", codec, shard_size=3, unfinished="resume")
    assert contents(tmp_path / "shards") == whole


def test_a_kill_between_the_index_and_the_rename_loses_nothing(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path
) -> None:
    """Would catch a journal that is removed before the folder has its name: all work would be done
    again.
    """
    pack_and_die(7, mixed, tmp_path / "shards", codec, shard_size=3, unfinished="keep")
    (tmp_path / "shards.partial" / "index.json").write_text("left over")
    counting = FailingCodec(codec, 3, stop_with(AssertionError()))
    pack_tiny(mixed, tmp_path / "shards", counting, shard_size=3, unfinished="resume")
    assert contents(tmp_path / "shards") == whole


def test_resuming_what_is_finished_changes_nothing(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path
) -> None:
    """A script may give --resume always."""
    out = tmp_path / "whole"
    summary = pack_tiny(
        mixed,
        out,
        FailingCodec(codec, 0, stop_with(AssertionError())),
        shard_size=3,
        unfinished="resume",
    )
    assert (summary.num_samples, summary.num_shards, len(summary.refused)) == (8, 3, 4)
    assert contents(out) == whole
    with pytest.raises(PackError, match="whole exists; choose another folder"):
        pack_tiny(mixed, out, codec, shard_size=4, unfinished="resume")


def other_codec(codec: TinyCodec) -> TinyCodec:
    return TinyCodec(codec.first, codec.rest, 2 * codec.scale)


def edit_caption(clips: Path) -> None:
    (clips / "000009.txt").write_text("another caption")


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ("codec", {}, "fingerprints.codec was tiny-codec-"),
        ("captions", {}, "about.source.sha256 was"),
        ("list", {}, "about.source.num_clips was 12, is 11"),
        ("", {"dtype": "float32"}, "about.settings.dtype was float16, is float32"),
        ("", {"shard_size": 4}, "about.settings.shard_size was 3, is 4"),
        ("", {"resize": "cover"}, "about.settings.resize was none, is cover"),
        ("", {"fps": Fraction(8)}, "about.settings.fps was None, is 8"),
        ("", {"negative_prompt": "grey"}, "about.negative was None"),
        (
            "",
            {"settings": {"codec_dtype": "bfloat16"}},
            "about.settings.codec_dtype was None, is bfloat16",
        ),
    ],
)
def test_what_does_not_match_is_not_continued(
    mixed: Path,
    codec: TinyCodec,
    tmp_path: Path,
    change: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    """Catches a data set whose first half was made otherwise than its second."""
    out = tmp_path / "shards"
    pack_and_die(7, mixed, out, codec, shard_size=3, unfinished="keep")
    before = contents(tmp_path / "shards.partial")
    if change == "captions":
        edit_caption(mixed)
    if change == "list":
        (mixed / "000010.mp4").unlink()
    used = other_codec(codec) if change == "codec" else codec
    with pytest.raises(
        PackError, match=rf"other settings or clips: .*{message}.*start again with --overwrite"
    ):
        pack_tiny(mixed, out, used, unfinished="resume", **{"shard_size": 3, **settings})
    assert contents(tmp_path / "shards.partial") == before


def test_a_shard_that_changed_since_is_not_continued(
    mixed: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Would catch an index that says what a file no longer holds."""
    pack_and_die(7, mixed, tmp_path / "shards", codec, shard_size=3, unfinished="keep")
    with (tmp_path / "shards.partial" / "shard-000001.tar").open("ab") as shard:
        shard.write(b"more")
    with pytest.raises(PackError, match=r"shard-000001\.tar has changed since it was written"):
        pack_tiny(mixed, tmp_path / "shards", codec, shard_size=3, unfinished="resume")


def test_complete_shards_are_thrown_away_only_on_request(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path
) -> None:
    """Would catch hours of encoding lost to a command repeated without --resume."""
    pack_and_die(7, mixed, tmp_path / "shards", codec, shard_size=3, unfinished="keep")
    with pytest.raises(
        PackError,
        match=r"holds 2 complete shards of an interrupted run; go on with them with --resume",
    ):
        pack_tiny(mixed, tmp_path / "shards", codec, shard_size=3, unfinished="keep")
    pack_tiny(mixed, tmp_path / "shards", codec, shard_size=3, unfinished="keep", overwrite=True)
    assert contents(tmp_path / "shards") == whole


def test_control_c_says_how_to_go_on(
    mixed: Path,
    codec: TinyCodec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Would catch a traceback and no word about --resume."""
    arguments = ["pack", str(mixed), "--codec", "tiny", "--frames", "9", "--shard-size", "3"]
    assert main([*arguments, "--out", str(tmp_path / "once")]) == 0
    encode, left = TinyCodec.encode, [8]

    def interrupted(self: TinyCodec, videos: Tensor) -> Tensor:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return encode(self, videos)

    monkeypatch.setattr(TinyCodec, "encode", interrupted)
    assert main([*arguments, "--out", str(tmp_path / "twice")]) == 130
    assert "--resume goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*arguments, "--out", str(tmp_path / "twice"), "--resume"]) == 0
    assert "8 samples, 3 shards, codec.safetensors, 4 clips left out" in capsys.readouterr().out
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_no_byte(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path, num_workers: int
) -> None:
    """Would catch samples or refusals in the order in which threads finish, and the number of
    workers in the index.
    """
    pack_tiny(mixed, tmp_path / "shards", codec, shard_size=3, num_workers=num_workers)
    assert contents(tmp_path / "shards") == whole


def test_workers_keep_only_a_few_clips_in_memory() -> None:
    """A clip of Wan's size is 97 MB as pixels: would catch workers that decode the whole folder
    ahead of the encoder.
    """
    taken: list[int] = []
    inputs = (taken.append(number) or number for number in range(100))
    results = in_order(lambda number: -number, inputs, num_workers=2)
    assert next(results) == 0
    assert len(taken) == 5
    assert list(results) == [-number for number in range(1, 100)]


def test_strict_stops_at_the_first(mixed: Path, codec: TinyCodec, tmp_path: Path) -> None:
    """Would catch --strict that reports the second bad clip, or goes on."""
    with pytest.raises(
        PackError,
        match=r"000001\.mp4: no caption; write one into 000001\.txt beside it\. Repair it",
    ):
        pack_tiny(mixed, tmp_path / "shards", codec, strict=True, num_workers=2)
    assert not (tmp_path / "shards").exists()


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
    """Would catch clips between two parts, keys that depend on the part, and offsets of another
    shard.
    """
    parts = pack_parts(
        mixed, tmp_path / "part", codec, 3, attach=lambda to: codec.save(to / "codec.safetensors")
    )
    merge([parts[2], parts[0], parts[1]], tmp_path / "merged")
    for folder in parts:
        shutil.rmtree(folder)
    pack_tiny(mixed, tmp_path / "one", codec, negative_prompt="grey")
    merged, one = ShardReader(tmp_path / "merged"), ShardReader(tmp_path / "one")
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
    """Part 12 of 12 is one clip that cannot be read; would catch a merge that then waits for it
    forever.
    """
    parts = pack_parts(mixed, tmp_path / "part", codec, 12)
    assert merge(parts, tmp_path / "merged").num_samples == 8


def test_parts_that_do_not_belong_together_are_refused(
    mixed: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Would catch half a data set under the name of a whole one, and one of two kinds of latents."""
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
    """Would catch part 0 of 2, which packs nothing or everything."""
    for part in ((0, 2), (3, 2)):
        with pytest.raises(PackError, match=rf"part {part[0]}/2 does not exist; want 1/2 to 2/2"):
            pack_tiny(clips, tmp_path / "shards", codec, part=part)


@pytest.mark.parametrize(("prompt", "num_rows"), [("a red disc", 3), ("", 0)])
def test_the_negative_prompt_comes_back(
    clips: Path, codec: TinyCodec, tmp_path: Path, prompt: str, num_rows: int
) -> None:
    """Training must need no text encoder. Would catch padding stored, or missing where it is read.
    Rounded to half once.
    """
    pack_tiny(clips, tmp_path / "shards", codec, negative_prompt=prompt)
    reader = ShardReader(tmp_path / "shards")
    assert reader.negative is not None and reader.negative.equal(
        TinyText().encode([prompt])[0].half().float()
    )
    assert load_file(tmp_path / "shards" / "negative.safetensors")["text"].shape == (num_rows, 32)
    assert reader.index.about["negative"]["prompt"] == prompt
    store_noise(tmp_path / "shards", lambda latents, text: latents)
    again = ShardReader(tmp_path / "shards").negative
    assert again is not None and torch.equal(again, reader.negative)


def test_no_negative_prompt_is_none(packed: Path) -> None:
    """Would catch a file that is read although nobody packed it."""
    assert ShardReader(packed).negative is None


@pytest.mark.parametrize(("damage", "message"), [(b"other", "not as packed"), (None, "missing")])
def test_a_negative_prompt_that_changed_is_not_used(
    clips: Path, codec: TinyCodec, tmp_path: Path, damage: bytes | None, message: str
) -> None:
    """Guidance with another data set's negative prompt would go unnoticed."""
    pack_tiny(clips, tmp_path / "shards", codec, negative_prompt="grey")
    path = tmp_path / "shards" / "negative.safetensors"
    path.unlink()
    if damage:
        path.write_bytes(damage)
    with pytest.raises(ShardError, match=rf"negative\.safetensors: {message}"):
        ShardReader(tmp_path / "shards").verify()


def test_folders_packed_before_there_was_a_manifest_are_read(own_shards: Path) -> None:
    """Would catch a reader that asks every data set to be packed again."""
    path = own_shards / "index.json"
    index = json.loads(path.read_text())
    del index["about"]
    path.write_text(json.dumps(index))
    reader = ShardReader(own_shards)
    assert (len(reader), reader.negative, reader.index.about) == (12, None, {})
