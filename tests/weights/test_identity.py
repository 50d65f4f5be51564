"""What weights say about themselves: sizes, role and recipe, in every file and for every reader."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, save_network, tiny_network
from wan_files import HEAD_DIM, same, wan_state

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.cli.stream_commands import stream
from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.identity import (
    ROLES,
    SELF_FORCING,
    Identity,
    Recipe,
    TrainingData,
    identity_of,
    mark,
    recipe_of_rollout,
)
from selfforcing_dfd.weights.read import WeightsError, describe, load_network, read_weights
from selfforcing_dfd.weights.recipes import asked_by, asked_settings, settle_recipe
from selfforcing_dfd.weights.write import convert, file_metadata

ASSETS = Path(__file__).parents[2] / "assets" / "tiny"
RECIPE = Recipe(ladder=(1000.0, 500.0), shift=3.0, chunk_frames=2, frames=6, sink=2, window=4)


@pytest.mark.parametrize(
    ("name", "role"),
    [("teacher", "teacher"), ("student", "causal_student"), ("fake", "fake_score")],
)
def test_the_shipped_weights_say_what_they_are(name, role, tmp_path):
    """Catches shipped files that the package's own reader and converter refuse."""
    path = ASSETS / f"{name}.safetensors"
    about = describe(path)
    assert about.role == role
    assert about.sizes["num_attention_heads"] * about.sizes["attention_head_dim"] == 128
    network = load_network(path)
    assert about.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    assert main(["convert", str(path), str(tmp_path / "x.pt"), "--to", "self-forcing"]) == 0
    again = describe(tmp_path / "x.pt")
    assert (again.role, again.recipe, again.sizes) == (role, about.recipe, about.sizes)


def test_the_shipped_student_has_the_recipe_that_trained_it():
    """Catches metadata that was typed in and differs from the recipe in configs/tiny/dmd.yaml."""
    from selfforcing_dfd.stages import load_config

    rollout = dataclasses.asdict(load_config("tiny/dmd.yaml").rollout)
    assert describe(ASSETS / "student.safetensors").recipe == recipe_of_rollout(rollout)


def test_a_config_gives_back_what_it_was_told():
    """Catches a setting that gets lost between an identity and its JSON."""
    recipe = dataclasses.replace(RECIPE, first_ladder=(1000.0, 750.0))
    data = TrainingData("tiny-codec-1", "tiny-text-2", (4, 6))
    for role in ROLES:
        is_student = role.endswith("student")
        identity = Identity(role, recipe if is_student else None, data)
        assert identity_of(json.loads(json.dumps(identity.notes()))) == identity
    with pytest.raises(UserError, match="only students have a recipe"):
        Identity("teacher", recipe).notes()
    with pytest.raises(UserError, match="'role' is 'boss'; use one of teacher"):
        identity_of({"role": "boss"})


def test_configs_from_before_are_read():
    """Catches students of earlier versions that lose their recipe, and teachers taken for them."""
    old = {"timesteps": [1000, 500], "shift": 3.0, "chunk_frames": 2, "num_frames": 6}
    assert identity_of({"causal": True, "student": old}) == Identity(
        "causal_student", dataclasses.replace(RECIPE, sink=0, window=0)
    )
    assert identity_of({"causal": False}).role == "teacher"
    assert identity_of({"_class_name": "CausalWanModel"}).role == "causal_student"
    assert identity_of({"_class_name": "WanTransformer"}) == Identity()


def test_a_recipe_of_a_run_takes_nothing_else(tmp_path):
    """Catches settings of a rollout section that a recipe does not know, and missing ones."""
    rollout: dict[str, Any] = {**dataclasses.asdict(RECIPE), "something": 1}
    assert recipe_of_rollout(rollout) == RECIPE
    del rollout["shift"]
    with pytest.raises(UserError, match="a recipe lacks shift"):
        recipe_of_rollout(rollout)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_one_loader_takes_everything_from_the_file(dtype, tmp_path):
    """Catches sizes, role or recipe that a caller has to know beside the file."""
    network = tiny_network(dtype=torch.float32)
    identity = Identity("causal_student", RECIPE, TrainingData("c", "t", (4, 6)))
    metadata = file_metadata(network.config, identity)
    save_file(network.state_dict(), tmp_path / "w.safetensors", metadata)
    loaded = load_network(tmp_path / "w.safetensors", dtype=dtype)
    assert loaded.dtype == (dtype or torch.float32)
    assert identity_of(loaded.config) == identity
    assert all(loaded.config[name] == value for name, value in TINY.items())
    same(loaded)


def test_a_description_refuses_other_sizes(tmp_path):
    """Catches a mismatch that is found by a matrix product, deep inside."""
    save_network(tmp_path / "w.safetensors", tiny_network(dtype=torch.float32))
    about = describe(tmp_path / "w.safetensors")
    about.require("the data", text_dim=12, in_channels=4)
    with pytest.raises(WeightsError, match=r"text_dim 12 instead of 32, as data\.shards wants"):
        about.require("data.shards", text_dim=32, in_channels=4)


def fastgen_file(path: Path, form: str) -> Path:
    """A checkpoint as FastGen writes it, of a tiny network with diffusers' names."""
    student = tiny_network(0, torch.float32).state_dict()
    fake = tiny_network(1, torch.float32).state_dict()
    net = {f"transformer.{name}": tensor for name, tensor in student.items()}
    critic = {f"transformer.{name}": tensor for name, tensor in fake.items()}
    model: dict[str, Any] = {"net": net}
    if form == "flat":
        model = {f"net.{name}": tensor for name, tensor in net.items()}
    elif form == "with fake score":
        model |= {"fake_score": critic}
    elif form == "flat with fake score":
        model = {f"net.{name}": tensor for name, tensor in net.items()}
        model |= {f"fake_score.{name}": tensor for name, tensor in critic.items()}
    torch.save({"model": model, "iteration": 5000}, path)
    return path


@pytest.mark.parametrize("form", ["nested", "flat", "with fake score", "flat with fake score"])
def test_checkpoints_of_fastgen_load(form, tmp_path):
    """Catches FastGen's two more levels, which were refused as `a dict of model, iteration`."""
    path = fastgen_file(tmp_path / "0005000.pth", form)
    same(load_network(path, head_dim=HEAD_DIM))
    assert read_weights(path).role is None, "FastGen has causal and bidirectional students"
    if "fake" in form:
        same(load_network(path, "fake_score", head_dim=HEAD_DIM), wan_state(1))
        assert read_weights(path, "fake_score").role == "fake_score"


def test_an_unknown_recipe_is_assumed_aloud(caplog):
    """Catches a frame-wise student that runs with chunks of three without a word."""
    with caplog.at_level(logging.WARNING):
        recipe = settle_recipe(None, {"chunk_frames": 1}, "causal_student", "theirs.pt")
    assert recipe == dataclasses.replace(SELF_FORCING, chunk_frames=1)
    (message,) = caplog.messages
    assert "theirs.pt does not state its recipe; assumed Self-Forcing's recipe: " in message
    assert "ladder 1000,750,500,250, shift 5" in message
    assert "--chunk-frames/--ladder" in message
    assert "chunk-frames 1" not in message, "that was asked for"


def test_asked_settings_win_over_stated_ones_aloud(caplog):
    """Catches a flag that is ignored, and one that overrides the file's recipe without a word."""
    with caplog.at_level(logging.WARNING):
        assert settle_recipe(RECIPE, {}, "causal_student", "mine") == RECIPE
        assert caplog.messages == []
        asked = asked_settings("1000,750", shift=None, chunk_frames=2)
        recipe = settle_recipe(RECIPE, asked, "causal_student", "mine")
    assert recipe == dataclasses.replace(RECIPE, ladder=(1000.0, 750.0))
    assert caplog.messages == [
        "mine states the recipe ladder 1000,500; asked for and used: ladder 1000,750"
    ]
    with pytest.raises(UserError, match="want timesteps such as 1000,750,500,250"):
        asked_settings("1000;500")


def test_a_stream_asks_for_all_that_its_options_say():
    """Catches an option of the recipe that `stream`, its --dry-run or `benchmark` leaves out."""
    words = "--ladder 1000,500 --first-ladder 1000 --shift 3 --chunk-frames 2 --context last_step"
    parser = argparse.ArgumentParser()
    stream(parser)
    assert asked_by(parser.parse_args([])) == {}
    assert asked_by(parser.parse_args(words.split())) == {
        "ladder": (1000.0, 500.0),
        "first_ladder": (1000.0,),
        "shift": 3.0,
        "chunk_frames": 2,
        "context": "last_step",
    }


def test_convert_writes_the_recipe_that_was_asked_for(tmp_path, capsys):
    """Catches flags of the command that do not arrive in the file."""
    torch.save({"generator": wan_state()}, tmp_path / "theirs.pt")
    command = ["convert", str(tmp_path / "theirs.pt"), str(tmp_path / "w"), "--to", "single-file"]
    recipe = ["--ladder", "1000,500", "--shift", "3", "--chunk-frames", "2", "--frames", "6"]
    past = ["--sink", "2", "--window", "4"]
    command += ["--head-dim", str(HEAD_DIM)]
    assert main(command + recipe + past) == 0
    assert describe(tmp_path / "w").recipe == RECIPE


def test_a_recipe_needs_a_student(tmp_path):
    """Catches a recipe noted for a teacher, or for weights of which nothing is known."""
    with pytest.raises(WeightsError, match="role is teacher; only students have one"):
        convert(ASSETS / "teacher.safetensors", tmp_path / "x", "diffusers", recipe={"shift": 3.0})


def test_other_notes_of_a_file_are_kept(tmp_path):
    """Catches the run's name lost when a file is converted into itself."""
    path = tmp_path / "w.safetensors"
    network = tiny_network(dtype=torch.float32)
    mark(network, "teacher")
    metadata = file_metadata(network.config, identity_of(network.config)) | {"run": "tiny/x"}
    save_file(network.state_dict(), path, metadata)
    before = load_file(path)
    convert(path, path, "single-file", overwrite=True)
    assert read_weights(path).about == {"run": "tiny/x"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(path).items())
