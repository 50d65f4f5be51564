"""The journey with Wan's own classes at small size: VAE, text encoder, files and names are real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import write_clip
from diffusers import DiffusionPipeline
from tiny_models import fill_weights
from tiny_wan import HEIGHT, RECIPE, SIZES, WIDTH, save_wan_folder, tiny_student

from selfforcing_dfd import rng
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.weights.read import describe, load_network

SIZE = f"{HEIGHT}x{WIDTH}"
CLIP_FRAMES = 21
SMALL = ("--size", SIZE, "--samples", "2", "--device", "cpu", "--causal-updates", "1")
SMALL += ("--fake-updates", "1", "run.student_updates=1", "batch.size=1", "batch.micro=1")
SMALL += ("checkpoint.every=1", "data.workers=0", "rollout.frames=6")
CHANNELS = {"in_channels": 16, "out_channels": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Wan, a student, and one video of two scenes and 50 frames."""
    folder = tmp_path_factory.mktemp("wan journey")
    save_wan_folder(folder / "wan")
    tiny_student().save_pretrained(folder / "student")
    (folder / "videos").mkdir()
    scenes = [
        rng.uniform((1, 4, 6, 3), number, "scene").expand(25, -1, -1, -1).clone()
        for number in range(2)
    ]
    frames = torch.cat(scenes).repeat_interleave(16, 1).repeat_interleave(16, 2)
    moving = torch.stack([frame.roll(n, 1) for n, frame in enumerate(frames)])
    write_clip(folder / "videos" / "film.mp4", (moving * 255).to(torch.uint8), 16)
    (folder / "videos" / "film.txt").write_text("colours that move\n")
    return folder


def distil(place: Path, checkpoint: str, out: str, *more: str) -> Path:
    given = ["distil", str(place / checkpoint), str(place / "videos")]
    given += ["--model", str(place / "wan"), "--out", str(place / out)]
    assert main([*given, *SMALL, *more]) == 0
    return place / out


@pytest.mark.usefixtures("modules_cache")
def test_a_student_is_forced_with_data_and_exported(place, capsys):
    """Catches a warm-up that moves the student, clips across a cut, and an export of half a model.

    Data forcing goes on from the student's own weights; VAE, text cache and card are Wan's.
    """
    out = distil(place, "student", "forced", "--recipe", "noised_real")
    printed = capsys.readouterr().out
    assert "1 files with 50 frames: at most 2 clips of 21 frames of 32x48" in printed
    assert "2 offered = 2 packed + 0 refused + 0 damaged" in printed
    index = json.loads((out / "shards" / "index.json").read_text())
    assert [entry["key"] for entry in index["samples"]] == ["film_000000", "film_000025"]
    assert list((out / "text").rglob("*.safetensors")), "captions' embeddings are kept"
    before = tiny_student().state_dict()
    after_warm_up = load_network(out / "fake" / "student.safetensors").state_dict()
    for name, value in before.items():
        assert torch.equal(value, after_warm_up[name].to(value)), name
    warmed = load_network(out / "fake" / "fake.safetensors").state_dict()
    teacher = load_network(place / "wan").state_dict()
    assert any(not torch.equal(value, warmed[name]) for name, value in teacher.items())
    card = (out / "export" / "README.md").read_text()
    assert f"Trained for {WIDTH} x {HEIGHT} pixels" in card
    assert "guidance was distilled into the weights" in card
    pipe: Any = DiffusionPipeline.from_pretrained(
        out / "export", custom_pipeline="pipeline", trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe("colours", num_frames=9).frames.shape == (1, 9, HEIGHT, WIDTH, 3)


@pytest.mark.soak
def test_from_a_bidirectional_teacher_to_a_student(place):
    """Catches a causal teacher that is made and not used."""
    teacher = WanTransformer(**SIZES)
    fill_weights(teacher, 3)
    teacher.register_to_config(role="teacher")
    teacher.save_pretrained(place / "teacher")
    out = distil(place, "teacher", "stable")
    assert describe(out / "causal" / "student.safetensors").role == "causal_teacher"
    made = describe(out / "student" / "student.safetensors")
    assert made.recipe is not None
    assert made.recipe.keeps_noise
    content = json.loads((out / "evaluation.json").read_text())
    assert list(content["beside"]) == ["data"], "a teacher makes no clips in few steps"
    assert RECIPE.frames == 6
