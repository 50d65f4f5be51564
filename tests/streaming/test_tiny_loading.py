"""From a run, a weights file or nothing to a stream of the tiny world."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.hub import HubError
from selfforcing_dfd.models.identity import Identity, Recipe, TrainingData, recipe_of
from selfforcing_dfd.streaming.load import load_settings, load_stream_model
from selfforcing_dfd.streaming.parts import LoadError
from selfforcing_dfd.streaming.random_model import random_stream_model
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.world import draw_factors, render
from selfforcing_dfd.weights.read import describe
from selfforcing_dfd.weights.stored import WeightsError
from selfforcing_dfd.weights.write import file_metadata
from tests.run_files import finish

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "assets" / "tiny"
STUDENT = ASSETS / "student.safetensors"
FORBIDDEN = ("training", "stages", "cli", "evaluation", "live", "benchmark", "data")
IMPORTS = """
import sys
import selfforcing_dfd.streaming.load, selfforcing_dfd.streaming.pipeline
import selfforcing_dfd.streaming.random_model
print(" ".join(name for name in sys.modules if name.startswith("selfforcing_dfd.")))
"""


def test_playing_a_video_imports_no_trainer():
    """Catches training, data packing or a command line that streaming pulls in on any way."""
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rooms = {name.split(".")[1] for name in done.stdout.split()}
    assert "streaming" in rooms
    assert rooms.isdisjoint(FORBIDDEN)


def save_student(path: Path, **identity: Any) -> Path:
    """The shipped student with another recipe or other data in its metadata."""
    about = describe(STUDENT)
    stated = {"role": about.role, "recipe": about.recipe, "data": about.data, **identity}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(load_file(STUDENT), path, file_metadata(about.sizes, Identity(**stated)))
    return path


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """The folder of a finished run with two arms; only the first one's chunks are of one frame."""
    run = tmp_path / "compare"
    recipe = describe(STUDENT).recipe
    assert recipe is not None
    first = dataclasses.replace(recipe, chunk_frames=1)
    save_student(run / "control" / "student.safetensors", recipe=first)
    save_student(run / "prefix" / "student.safetensors")
    for arm in ("control", "prefix"):
        finish(run / arm, config="run: {stage: dfd}")
    (run / "config.yaml").write_text("arms: {control: [run.stage=dmd], prefix: []}\n")
    return run


def test_a_run_streams_its_own_student(comparison, caplog):
    """Catches a comparison whose arm is chosen without a word, and the wrong arm."""
    assert load_stream_model(comparison / "control").chunk_frames == 1
    assert caplog.messages == []
    assert load_stream_model(comparison).chunk_frames == 3
    (message,) = caplog.messages
    assert "compares control, prefix; prefix is taken" in message


def test_a_folder_without_a_run_is_explained(comparison, tmp_path):
    """Catches a traceback for the folder above the runs, and for a run that is not finished."""
    with pytest.raises(
        WeightsError, match=f"has no config.yaml; name one of its arms: {comparison}"
    ):
        load_stream_model(tmp_path)
    (comparison / "prefix" / "student.safetensors").unlink()
    with pytest.raises(
        WeightsError, match=r"prefix/student\.safetensors does not exist; train first"
    ):
        load_stream_model(comparison)


def test_the_codec_beside_the_weights_is_used(tmp_path):
    """Catches a picture of another basis: the run's data were packed with a codec of their own."""
    codec = TinyCodec.fit(render(draw_factors(32, torch.Generator().manual_seed(5))))
    data = TrainingData(codec.fingerprint, "tiny-text-32x12", (8, 8))
    path = save_student(tmp_path / "run" / "student.safetensors", data=data)
    with pytest.raises(LoadError, match=r"copy codec\.safetensors of its training shards beside"):
        load_stream_model(tmp_path / "run")
    codec.save(tmp_path / "run" / "codec.safetensors")
    model: Any = load_stream_model(checkpoint=str(path))
    assert model.codec.fingerprint == codec.fingerprint


def test_a_student_of_real_wan_is_not_of_the_tiny_world(tmp_path):
    """Catches a run on Wan's latents whose frames the tiny codec would turn into noise."""
    data = TrainingData("wan-vae-0123", "umt5-0123", (60, 104))
    path = save_student(tmp_path / "student.safetensors", data=data)
    with pytest.raises(LoadError, match="Wan's latents, not on the tiny world's; real Wan needs"):
        load_stream_model(checkpoint=str(path))


@pytest.mark.parametrize("name", ["teacher", "fake"])
def test_other_networks_are_no_students(name):
    """Catches a bidirectional network streamed chunk by chunk: its names and sizes fit."""
    with pytest.raises(HubError, match="no causal student"):
        load_stream_model(checkpoint=str(ASSETS / f"{name}.safetensors"))


def test_flags_replace_the_recipe_of_the_file(caplog):
    """Catches --ladder and --chunk-frames that are ignored where the file states a recipe."""
    with caplog.at_level(logging.WARNING):
        model = load_stream_model(recipe={"ladder": (1000.0, 500.0), "chunk_frames": 1})
    assert len(model.ladder) == 2
    assert model.chunk_frames == 1
    stated = recipe_of(model.student.config)
    assert stated is not None and stated.chunk_frames == 1, "exports say what was used"
    assert "used: ladder 1000,500, chunk-frames 1" in caplog.text


def test_fewer_passes_come_from_the_file_and_from_flags(tmp_path, caplog):
    """Catches a student that streams its first chunk, or its past, otherwise than it was trained.

    And files without these settings that are no longer as they always were.
    """
    recipe = describe(STUDENT).recipe
    assert recipe is not None
    assert "context" not in Identity("causal_student", recipe).notes()["recipe"]
    changed = {"ladder": (1000.0, 500.0), "first_ladder": (1000.0,), "context": "last_step"}
    two = dataclasses.replace(recipe, **changed)
    path = save_student(tmp_path / "student.safetensors", recipe=two)
    model = load_stream_model(checkpoint=str(path))
    assert (len(model.ladder), model.first_ladder, model.commits) == (2, (1.0,), False)
    assert recipe_of(model.student.config) == two
    with caplog.at_level(logging.WARNING):
        asked = load_stream_model(recipe=changed)
    assert (asked.ladder, asked.first_ladder, asked.commits) == (model.ladder, (1.0,), False)
    assert "used: ladder 1000,500, first-ladder 1000, context last_step" in caplog.text
    with pytest.raises(UserError, match="context is 'noisy'; use clean or last_step"):
        load_stream_model(recipe={"context": "noisy"})


WINDOWED = Recipe((1000.0, 500.0), 5.0, chunk_frames=3, frames=21, sink=0, window=12)


def test_a_student_looks_as_far_back_as_in_training(caplog):
    """Catches a student with a window that streams with another one; named settings win aloud."""
    settings = load_settings(default="tiny", recipe=WINDOWED)
    assert (settings.sink_frames, settings.window_frames) == (0, 12)
    whole = dataclasses.replace(WINDOWED, window=0)
    assert load_settings(default="tiny", recipe=whole) == load_settings("tiny")
    assert caplog.messages == []
    assert load_settings(default="tiny", recipe=WINDOWED, window_frames=9).window_frames == 9
    assert caplog.messages == ["the student was trained with window_frames 12; used: 9"]
    assert load_settings("tiny", recipe=WINDOWED) == load_settings("tiny")


def test_random_models_have_the_sizes_that_weights_state():
    """Catches a tiny size that is typed in, and an unknown size."""
    model = random_stream_model("tiny", "cpu")
    sizes = describe(STUDENT).sizes
    assert all(model.student.config[name] == value for name, value in sizes.items())
    assert model.video_size == load_stream_model(device="cpu").video_size
    with pytest.raises(LoadError, match="use one of tiny, wan"):
        random_stream_model("wan5b")


def test_a_copied_run_streams_anywhere(comparison, tmp_path):
    """Catches a run that needs the shards or the checkout that it was trained with."""
    moved = shutil.copytree(comparison / "prefix", tmp_path / "elsewhere")
    assert load_stream_model(moved).chunk_frames == 3


def test_the_shipped_students_keep_their_noise_or_do_not():
    """Catches a stream that adds fresh noise for a student which never saw any."""
    assert load_stream_model().keeps_noise  # `stable`, which is shown unless another is named
    assert not load_stream_model(checkpoint="assets/tiny/student.safetensors").keeps_noise
