"""The whole way from a folder of videos to shards, by commands."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from clip_files import write_clip
from in_processes import run_until_killed
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.config import ConfigError
from selfforcing_dfd.curate.assemble import RECORD
from selfforcing_dfd.curate.folder import Embedded
from selfforcing_dfd.curate.settings import Settings, load_settings
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.world import clip_number, render


def run(*words: object) -> None:
    assert main(["curate", *map(str, words)]) == 0


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_of_videos_becomes_a_set(
    tiny_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches steps that do not find each other's files, and bytes that differ the second time."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text((tiny_clips / "000003.long.txt").read_text())
    local = ("--processes", 1)
    for name, elsewhere in (("one", ()), ("two", local)):
        folder = tiny_clips.parent / f"{tmp_path.name}-{name}"
        run("embed", tiny_clips, "--frames", 9, "--out", folder, *local)
        run("cluster", folder, "--clusters", 4)
        run("pick", folder, "--candidates", 6, "--pictures", 2, "--auto", 3, *local)
        ways = ("--levels", "short,medium,long", "--prompts", prompts, "--quota", 14)
        run(
            "pack",
            folder,
            "--codec",
            "tiny",
            *ways,
            "--duplicate",
            1,
            "--out",
            tmp_path / name,
            *elsewhere,
        )
    said = capsys.readouterr().out
    assert "25 offered = 24 embedded + 1 left out" in said
    assert "left out bad.mp4: cannot be read as video" in said
    assert "1 clips may not be in the set: equal to an evaluation prompt" in said
    assert "14 offered = 14 packed + 0 refused + 0 damaged" in said
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    reader = ShardReader(tmp_path / "one", "medium")
    record = json.loads((tmp_path / "one" / RECORD).read_text())
    chosen = [one["clip"] for one in record["chosen"]]
    assert len(reader.captions) == len(chosen) == 14
    assert "000003.mp4" not in chosen
    words = [(tiny_clips / name).with_suffix(".medium.txt").read_text().strip() for name in chosen]
    assert reader.captions == words
    assert reader.index.about["settings"]["curation"] == record["sha256"]


def pack_until_killed(folder: Path, out: Path) -> None:
    whole = TinyCodec.encode
    encoded = 0

    def dying(self: TinyCodec, videos: Tensor) -> Tensor:
        nonlocal encoded
        encoded += 1
        if encoded == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, videos)

    TinyCodec.encode = dying  # type: ignore[method-assign]
    pack_set(folder, out)


def pack_set(folder: Path, out: Path) -> None:
    run("pack", folder, "--codec", "tiny", "--levels", "long", "--shard-size", 2, "--out", out)


def test_the_same_command_goes_on_after_a_kill(curation: Embedded, tmp_path: Path) -> None:
    """Catches the one step that has to be told to go on, and shards that are packed twice."""
    pack_set(curation.folder, tmp_path / "whole")
    out = tmp_path / "killed"
    run_until_killed(pack_until_killed, curation.folder, out)
    assert len(list((tmp_path / "killed.partial").glob("*.tar"))) == 3
    assert not out.exists()
    pack_set(curation.folder, out)
    assert shards(out) == shards(tmp_path / "whole")
    pack_set(curation.folder, out)


def test_windows_are_captioned_curated_and_packed_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches windows of a long file that share its caption, or that get each other's."""
    films = tmp_path / "films"
    films.mkdir()
    parts = [render(clip_number(number, 0, "long")[0], 9)[0] for number in range(3)]
    write_clip(films / "film.mp4", (255 * torch.cat(parts)).round().to(torch.uint8))
    table = tmp_path / "films-captions.jsonl"
    cut = ("--frames", 9, "--cut", "windows")
    run("caption", films, "--model", "tiny", *cut)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert [row["video"] for row in rows] == ["film.mp4#0", "film.mp4#9", "film.mp4#18"]
    wanted = [clip_number(number, 0, "long")[1] for number in range(3)]
    assert [row["long"] for row in rows] == wanted
    packing = ["pack", str(films), "--codec", "tiny", "--captions", str(table)]
    assert main([*packing, *map(str, cut), "--out", str(tmp_path / "all")]) == 0
    reader = ShardReader(tmp_path / "all", "long")
    assert reader.captions == wanted
    run("embed", films, *cut, "--processes", 1)
    folder = tmp_path / "films-curation"
    run("cluster", folder, "--clusters", 1)
    run("pick", folder, "--auto", 2, "--processes", 1)
    run("pack", folder, "--codec", "tiny", "--captions", table)
    record = json.loads((tmp_path / "films-curation-shards" / RECORD).read_text())
    of_some = ShardReader(tmp_path / "films-curation-shards", "long")
    numbers = [one["row"] for one in record["chosen"]]
    assert of_some.captions == [wanted[number] for number in numbers]
    for place, number in enumerate(numbers):
        assert of_some[place].latents.equal(reader[number].latents)
    capsys.readouterr()
    assert main([*packing, "--frames", "9", "--out", str(tmp_path / "whole")]) == 2
    assert "its captions are those of windows; pack with --cut" in capsys.readouterr().err


def test_the_papers_sets_are_settings() -> None:
    """Catches a recipe that is not the paper's, and a slip in a file that is read as a default."""
    mix = load_settings("mix")
    assert (mix.cluster.clusters, mix.cluster.iterations, mix.embed.pictures) == (1000, 50, 3)
    assert (mix.pick.candidates, mix.pick.pictures, mix.pack.quota) == (40, 5, 30000)
    assert load_settings("animation").pack.quota == 20000
    assert load_settings("") == Settings()
    with pytest.raises(ConfigError, match="there is no set films; use one of animation, mix"):
        load_settings("films")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pack: {quote: 3}", "quote"),
        ("cluster: {clusters: 0}", "cluster.clusters is 0; it must be at least 1"),
        ("pack: {near: 0}", "pack.near is 0.0; it must be above 0"),
        ("[1]", "the file holds a list; a set has sections"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    """Catches a misspelt setting that changes nothing."""
    path = tmp_path / "set.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_settings(str(path))
    assert message in str(raised.value)
