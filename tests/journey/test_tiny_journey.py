"""One command from a .pt file and a folder of mp4s to an export, in the tiny world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_INTERRUPTED, EXIT_USER_ERROR
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.streaming.load import TINY_DMD_STUDENT, load_stream_model
from selfforcing_dfd.tiny.world import write_clips
from selfforcing_dfd.weights.read import describe
from selfforcing_dfd.weights.write import convert

SMALL = ("--samples", "2", "--device", "cpu", "run.student_updates=1")
SMALL += ("batch.size=1", "batch.micro=1", "checkpoint.every=1")
STEPS = ("pack", "student", "evaluate", "export")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student in Self-Forcing's format, and videos with captions."""
    folder = tmp_path_factory.mktemp("journey")
    convert(TINY_DMD_STUDENT, folder / "my_student.pt", "self-forcing")
    write_clips(folder / "my_videos", 3, 7)
    return folder


def distil(place: Path, *more: str) -> int:
    out = ("--out", str(place / "out"))
    return main(["distil", str(place / "my_student.pt"), str(place / "my_videos"), *out, *more])


@pytest.fixture(scope="module")
def stopped(place: Path) -> int:
    """A journey that is stopped when training begins; when its clips were packed, in ns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfforcing_dfd.cli.train.train_or_make", stop)
        assert distil(place, *SMALL) == EXIT_INTERRUPTED
    index = place / "out" / "shards" / "index.json"
    assert len(ShardReader(index.parent)) == 3
    return index.stat().st_mtime_ns


@pytest.fixture(scope="module")
def made(place: Path, stopped: int) -> Path:
    """The same command again."""
    assert distil(place, *SMALL) == 0
    return place / "out"


def stop(*given: Any) -> None:
    raise KeyboardInterrupt


def test_a_stop_while_training_keeps_what_is_packed(stopped, made):
    """Catches a journey that packs once more after a kill."""
    assert (made / "shards" / "index.json").stat().st_mtime_ns == stopped
    assert (made / "student" / "student.safetensors").is_file()


def test_a_dry_run_prints_the_whole_budget_and_writes_nothing(place, capsys):
    """Catches a budget that leaves a step out, and a plan that already works."""
    assert distil(place, "--out", str(place / "dry"), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "my_student.pt: causal student, 1.6 million parameters, torch file" in printed
    assert "arm stable of dfd_ar" in printed
    assert "3 files with 99 frames: at most 3 clips of 33 frames of 64x64" in printed
    rows = [line.split()[0] for line in printed.splitlines() if line]
    assert [name for name in rows if name in STEPS] == list(STEPS)
    assert "in all" in printed
    assert not (place / "dry").exists()


def test_the_journey_ends_in_a_true_card(made):
    """Catches a number in the card that is not in evaluation.json, and one of another student."""
    content = json.loads((made / "evaluation.json").read_text())
    card = (made / "export" / "README.md").read_text()
    record = json.loads((made / "student" / "run.json").read_text())
    student = record["results"]["student.safetensors"]["sha256"]
    assert content["settings"]["student_sha256"] == student
    assert content["settings"]["prompts"]["count"] == len(content["videos"]) == 2
    value = content["means"]["contrast"]
    data = content["beside"]["data"]["means"]["contrast"]
    before = content["beside"]["before"]["means"]["contrast"]
    assert value not in (data, before)
    assert f"| contrast | {value:.3g}; data {data:.3g}; before {before:.3g} |" in card
    valid = content["scores"]["valid"]["value"]
    assert f"| counted exactly: valid | {valid:.3g};" in card
    assert "Trained for 64 x 64 pixels" in card
    assert "| run.student_updates | `1` |" in card
    assert "it was trained without guidance" in card
    assert "score.guidance" not in card, "recipe `stable` has no guidance"
    assert "Nothing yet" not in card


@pytest.mark.usefixtures("modules_cache")
def test_diffusers_opens_the_export(made):
    """Catches an export that only the journey's own code can read."""
    pipe: Any = DiffusionPipeline.from_pretrained(
        made / "export", custom_pipeline="tiny_pipeline", trust_remote_code=True
    )
    assert pipe("a disc moves", num_frames=9).frames.shape == (1, 9, 64, 64, 3)
    described = describe(made / "export" / "transformer")
    assert described.recipe is not None
    assert described.recipe.keeps_noise
    assert load_stream_model(made / "student", device="cpu").keeps_noise


def test_the_same_command_does_nothing_again(place, made, capsys):
    """Catches a step that is done twice: hours of packing or training."""
    files = [path for path in made.rglob("*.*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files if path.parent.name != "configs"}
    assert distil(place, *SMALL) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.endswith("already done")] == [
        f"{step}: already done" for step in STEPS
    ]
    changed = [path for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert [path.name for path in changed] == [".lock"]


def test_a_lost_result_is_made_again_alone(place, made, capsys):
    """Catches an export that is believed to be there."""
    (made / "export" / "README.md").unlink()
    assert distil(place, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "evaluate: already done" in printed
    assert "export: again, since export/README.md is missing or changed" in printed
    assert (made / "export" / "README.md").is_file()


def test_other_videos_are_refused(place, made, capsys):
    """Catches a student of the videos before, under the name of these."""
    caption = place / "my_videos" / "000001.txt"
    said = caption.read_text()
    caption.write_text("a square moves\n" if "disc" in said else "a disc moves\n")
    assert distil(place, *SMALL) == EXIT_USER_ERROR
    caption.write_text(said)
    assert "videos and captions changed; use another --out" in capsys.readouterr().err
