"""The command `evaluate`: videos as files, and the file of results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clip_files import write_clip
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR, sha256_of
from selfforcing_dfd.metrics.files import frames_of, measure_file
from selfforcing_dfd.metrics.video import measure
from selfforcing_dfd.tiny.world import clip_number, render

ROOT = Path(__file__).parents[2]


def video(number: int, frames: int = 33) -> Tensor:
    """uint8 [T, H, W, 3] of the tiny world."""
    return (255 * render(clip_number(number, 0, "short")[0], frames)[0]).round().to(torch.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos, and one of a single frame."""
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "a.mp4", video(0))
    write_clip(clips / "b.mp4", video(1))
    write_clip(clips / "one.mp4", video(2)[:1])
    return clips


def test_every_number_is_in_the_file_with_what_made_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches numbers that cannot be repeated, and NaN in a file that is no JSON then."""
    out = tmp_path / "evaluation.json"
    assert main(["evaluate", str(folder), "--out", str(out), "--chunk", "12"]) == 0
    found = json.loads(out.read_text())
    assert [each["file"] for each in found["videos"]] == ["a.mp4", "b.mp4", "one.mp4"]
    first, second, one = found["videos"]
    assert first["sha256"] == sha256_of(folder / "a.mp4")
    assert (first["frames"], first["fps"], first["size"]) == (33, 16.0, [64, 64])
    wanted = measure(frames_of(folder / "a.mp4"), 16.0, chunk=12)
    assert first["numbers"] == pytest.approx(wanted)
    assert one["numbers"]["difference"] is None
    both = (first["numbers"]["flow"] + second["numbers"]["flow"]) / 2
    assert found["means"]["flow"] == pytest.approx(both)
    assert found["settings"]["chunk"] == 12
    assert found["software"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "mean of 3" in printed
    assert "times the speed of playing" in printed
    assert str(out) in printed


def test_a_damaged_video_is_refused_or_left_out_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches a mean over fewer videos than were given, without a word."""
    damaged = bytearray((folder / "b.mp4").read_bytes())
    data = damaged.index(b"mdat") + 1000
    damaged[data::7] = bytes(len(damaged[data::7]))
    (folder / "b.mp4").write_bytes(damaged)
    (folder / "empty.mp4").write_bytes(b"")
    command = ["evaluate", str(folder), "--out", str(tmp_path / "e.json")]
    assert main(command) == EXIT_USER_ERROR
    assert "b.mp4" in capsys.readouterr().err
    assert not (tmp_path / "e.json").exists()
    assert main([*command, "--keep-going"]) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert [each["file"] for each in found["videos"]] == ["a.mp4", "one.mp4"]
    assert len(found["settings"]["refused"]) == 2
    assert "left out: empty.mp4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"), [("nowhere.mp4", "does not exist"), ("no_videos", "holds no video")]
)
def test_paths_without_videos_are_refused(
    path: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches an empty table."""
    (tmp_path / "no_videos").mkdir()
    assert main(["evaluate", str(tmp_path / path)]) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_another_rate_changes_what_a_second_is(folder: Path):
    """Catches --fps that is not passed on: flows are taken an eighth of a second apart."""
    usual = measure_file(folder / "a.mp4").numbers
    slower = measure_file(folder / "a.mp4", fps=8.0).numbers
    assert usual["flow"] > 1.1 * slower["flow"] > 0
    assert usual["saturation"] == slower["saturation"]


def test_the_script_is_the_command(folder: Path, tmp_path: Path):
    """Catches a script that has lost its way to the package."""
    found = subprocess.run(
        [sys.executable, ROOT / "inference/evaluate.py", folder / "a.mp4", "--out", "e.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads((tmp_path / "e.json").read_text())["schema"] == 1
