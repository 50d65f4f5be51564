"""Interrupted packing goes on to the same bytes, with any number of workers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tiny_pack import FailingCodec, contents, other_codec, pack_and_die, pack_tiny, stop_with
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.data.ahead import in_order
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.tiny.codec import TinyCodec


@pytest.fixture
def whole(mixed: Path, codec: TinyCodec, tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    pack_tiny(mixed, tmp_path / "whole", codec, shard_size=3)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("num_clips", [0, 2, 3, 4, 7])
def test_a_killed_run_goes_on_to_the_same_bytes(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path, num_clips: int
) -> None:
    """Catches clips lost or doubled at the seam, and refusals forgotten or named twice."""
    pack_and_die(num_clips, mixed, tmp_path / "shards", codec, shard_size=3, unfinished="keep")
    pack_tiny(mixed, tmp_path / "shards", codec, shard_size=3, unfinished="resume")
    assert contents(tmp_path / "shards") == whole
    assert not (tmp_path / "shards.partial").exists()


def test_a_run_may_be_interrupted_again_and_again(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches a journal that a second interruption overwrites."""
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
    """Catches a resume that only looks like one.

    8 clips can be used, 6 lie in complete shards, the black clip counts.
    """
    out = tmp_path / "shards"
    pack_and_die(7, mixed, out, codec, shard_size=3, unfinished="keep")
    counting = FailingCodec(codec, 100, stop_with(AssertionError()))
    pack_tiny(mixed, out, counting, shard_size=3, unfinished="resume")
    assert 101 - counting.left == 1 + 2


def test_a_journal_line_without_its_end_does_not_count(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches a new line of the journal that goes on where a cut one ends.

    A process may die while it writes the journal; its shard is then written again.
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
    """Catches a journal that is removed before the folder has its name.

    All work would be done again.
    """
    pack_and_die(7, mixed, tmp_path / "shards", codec, shard_size=3, unfinished="keep")
    (tmp_path / "shards.partial" / "index.json").write_text("left over")
    counting = FailingCodec(codec, 3, stop_with(AssertionError()))
    pack_tiny(mixed, tmp_path / "shards", counting, shard_size=3, unfinished="resume")
    assert contents(tmp_path / "shards") == whole


def test_resuming_what_is_finished_changes_nothing(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches an error or new work for a script that always gives --resume."""
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
    """Catches an index that says what a file no longer holds."""
    pack_and_die(7, mixed, tmp_path / "shards", codec, shard_size=3, unfinished="keep")
    with (tmp_path / "shards.partial" / "shard-000001.tar").open("ab") as shard:
        shard.write(b"more")
    with pytest.raises(PackError, match=r"shard-000001\.tar has changed since it was written"):
        pack_tiny(mixed, tmp_path / "shards", codec, shard_size=3, unfinished="resume")


def test_complete_shards_are_thrown_away_only_on_request(
    mixed: Path, whole: dict[str, bytes], codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches hours of encoding lost to a command repeated without --resume."""
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
    """Catches a traceback and no word about --resume."""
    arguments = ["pack", str(mixed), "--codec", "tiny", "--frames", "9", "--shard-size", "3"]
    assert main([*arguments, "--out", str(tmp_path / "once")]) == 0
    encode = TinyCodec.encode
    left = [8]

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
    """Catches samples in the order in which threads finish, and workers in the index."""
    pack_tiny(mixed, tmp_path / "shards", codec, shard_size=3, num_workers=num_workers)
    assert contents(tmp_path / "shards") == whole


def test_workers_keep_only_a_few_clips_in_memory() -> None:
    """Catches workers that decode the whole folder ahead of the encoder.

    A clip of Wan's size is 97 MB as pixels.
    """
    taken: list[int] = []
    inputs = (taken.append(number) or number for number in range(100))
    results = in_order(lambda number: -number, inputs, num_workers=2)
    assert next(results) == 0
    assert len(taken) == 5
    assert list(results) == [-number for number in range(1, 100)]


def test_strict_stops_at_the_first(mixed: Path, codec: TinyCodec, tmp_path: Path) -> None:
    """Catches --strict that reports the second bad clip, or goes on."""
    with pytest.raises(
        PackError,
        match=r"000001\.mp4: no caption; write one into 000001\.txt beside it\. Repair it",
    ):
        pack_tiny(mixed, tmp_path / "shards", codec, strict=True, num_workers=2)
    assert not (tmp_path / "shards").exists()
