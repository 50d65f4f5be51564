"""The tiny image-to-video recipes, one after the other, and a stream from their student."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from safetensors.torch import load_file

from selfforcing_dfd import rng
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import UserError
from selfforcing_dfd.config import Config
from selfforcing_dfd.evaluation.report import sample_videos
from selfforcing_dfd.stages import arms_of, load_config
from selfforcing_dfd.streaming.load import load_stream_model
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.tracking import read_metrics
from selfforcing_dfd.weights.read import describe

STUDENT = "student.safetensors"


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Teacher, causal teacher, DMD student and an arm of data forcing, a few updates each."""
    out = tmp_path_factory.mktemp("given")
    start = world / "teacher.safetensors"
    done: dict[str, Config] = {}

    def train(name: str, arm: str = "", **weights: Path) -> Path:
        small = [
            f"data.shards={world / 'shards'}",
            f"run.out={out}",
            "run.student_updates=1",
            "batch.size=4",
            "batch.micro=4",
            "model.compute=float32",
            "model.compile=false",
            "checkpoint.export=float32",
            "report.clips=0",
            *(f"weights.{role}={path}" for role, path in weights.items()),
        ]
        config = load_config(f"tiny/{name}.yaml", small)
        if arm:
            (config,) = (run for run in arms_of(config) if run.run.name.endswith(arm))
        run(config)
        done[name] = config
        return run_folder(config)

    teacher = train("teacher_i2v", student=start) / STUDENT
    causal = train("causal_i2v", student=start) / STUDENT
    dmd = train("dmd_i2v", student=causal, teacher=teacher)
    fake = dmd / "fake.safetensors"
    train("dfd_i2v", "caption", student=dmd / STUDENT, fake=fake, teacher=teacher)
    return done


def test_the_recipes_lead_from_one_to_the_next(runs: dict[str, Config]):
    """Catches a recipe that forgets what is given, or loses it on the way into the file."""
    assert [config.run.stage for config in runs.values()] == ["teacher", "causal", "dmd", "dfd"]
    for config in runs.values():
        assert config.rollout.given == 1
        lines = read_metrics(run_folder(config) / "metrics.jsonl")
        assert all(line["loss"] > 0 for line in lines)
    before = load_file(run_folder(runs["dmd_i2v"]) / STUDENT)
    after = load_file(run_folder(runs["dfd_i2v"]) / STUDENT)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    recipe = describe(run_folder(runs["dfd_i2v"]) / STUDENT).recipe
    assert recipe is not None
    assert (recipe.given, recipe.noise) == (1, "kept")


def test_the_student_streams_from_a_picture_which_is_shown_first(
    runs: dict[str, Config], tmp_path: Path
):
    """Catches a command that streams such a student as one of text-to-video."""
    folder = run_folder(runs["dfd_i2v"])
    picture = (255 * rng.uniform((64, 64, 3), 0, "picture")).to(torch.uint8)
    imageio.imwrite(tmp_path / "picture.png", picture.numpy())
    out = tmp_path / "out.y4m"
    image = ["--image", str(tmp_path / "picture.png")]
    command = ["stream", "--run", str(folder), "--chunks", "2", "--out", str(out)]
    assert main([*command, *image]) == 0
    assert out.read_bytes().count(b"FRAME\n") == 9 + 12  # the picture is the first of nine
    assert main([*command, "--overwrite"]) == 2
    assert load_stream_model(run=folder).given == 1


def test_a_report_shows_clips_that_begin_with_real_frames(runs: dict[str, Config]):
    """Catches a caption that is asked for alone, which no student of such a run can show."""
    folder = run_folder(runs["dfd_i2v"])
    with pytest.raises(UserError, match=r"clips of this run begin with given frames"):
        sample_videos(folder, ["a disc moves"])
