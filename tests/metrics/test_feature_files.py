"""Features in the command `evaluate`: prompts, other sets, nearest clips, the file of results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from clip_files import write_clip

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError
from selfforcing_dfd.metrics.diversity import diversity
from selfforcing_dfd.metrics.feature_files import encode_files, encoder_of, prompts_of
from selfforcing_dfd.metrics.features import pooled
from selfforcing_dfd.tiny.world import clip_number, render

FRAMES = 9


def write(folder: Path, numbers: range) -> list[Path]:
    """Short clips of the tiny world, by their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in numbers:
        factors, _ = clip_number(number, 0, "short")
        video = (255 * render(factors, FRAMES)[0]).round().to(torch.uint8)
        paths.append(folder / f"{number:03d}.mp4")
        write_clip(paths[-1], video)
    return paths


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `training`, `held_out`, and `videos`, of which three are copies of training clips."""
    root = tmp_path_factory.mktemp("clips")
    training = write(root / "training", range(7))
    write(root / "held_out", range(7, 14))
    videos = write(root / "videos", range(20, 23))
    for path in training[:3]:
        videos.append(root / "videos" / f"copy_{path.name}")
        shutil.copy(path, videos[-1])
    for number, path in enumerate(sorted(videos)):
        path.with_suffix(".txt").write_text(f"prompt {number % 2}\n")
    return root


def test_scores_go_to_the_file_with_what_made_them(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches features without their encoder, and copies of training clips that nobody hears of."""
    out = tmp_path / "e.json"
    others = [f"--{name}={clips / name.replace('-', '_')}" for name in ("training", "held-out")]
    command = ["evaluate", str(clips / "videos"), "--out", str(out), "--features", "pixels"]
    command += [*others, "--reference", str(clips / "held_out"), "--features=motion"]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert found["prompts"].items() >= {"from": "text", "different": 2}.items()
    assert len(found["prompts"]["sha256"]) == 64
    about = found["features"]["pixels"]
    assert about["clips"] == {"videos": 6, "reference": 7, "training": 7, "held_out": 7}
    assert about["encoder"] == {"backend": "pixels", "version": 1, "weights_sha256": None}
    assert about["places"] == 16
    files = sorted((clips / "videos").glob("*.mp4"))
    (encoded,) = encode_files(files, [encoder_of("pixels")], both=True)
    wanted = [diversity(pooled(encoded.frames)[first::2]) for first in (0, 1)]
    score = about["scores"]["diversity_mean"]
    assert score["value"] == pytest.approx(float(sum(wanted) / 2))
    assert score["n"] == 2
    assert about["scores"]["diversity_mean_standardised"]["value"] != score["value"]
    assert about["scores"]["memory_copies"]["value"] >= 0.5
    names = {each["file"]: each["features"]["pixels"] for each in found["videos"]}
    for number in range(3):
        near = names[f"copy_{number:03d}.mp4"]
        assert near["nearest_training"] == f"{number:03d}.mp4"
        assert near["distance"] == pytest.approx(0, abs=1e-5)
    assert "precision" in found["features"]["motion"]["scores"]
    printed = capsys.readouterr().out
    assert "memory_copies" in printed
    assert "motion, 6 videos" in printed


def test_prompts_are_beside_the_videos_or_in_the_names_of_folders(clips: Path, tmp_path: Path):
    """Catches seeds of one prompt that are compared with those of another."""
    files = sorted((clips / "videos").glob("*.mp4"))
    assert prompts_of(files) == (["prompt 0", "prompt 1"] * 3, "text")
    nested = [tmp_path / "one" / "a.mp4", tmp_path / "two" / "b.mp4"]
    assert prompts_of(nested) == (["one", "two"], "folder")
    with pytest.raises(UserError, match=r"no prompt in a\.txt"):
        prompts_of([*files, *nested])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "."], "add --features pixels"),
        (["--features", "pixels", "--training", "."], "go together"),
        (["--features", "pixels", "--features", "pixels"], "name each encoder once"),
        (["--features", "dinosaur"], "want pixels, motion"),
        (["--features", "pixels", "--reference", "FEW"], "too few to compare"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: list[str],
    message: str,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Catches a command that leaves out what was asked for."""
    few = str(clips / "held_out" / "007.mp4")
    given = [few if option == "FEW" else option for option in options]
    out = tmp_path / "e.json"
    assert main(["evaluate", few, "--out", str(out), *given]) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err
    assert not out.exists()
