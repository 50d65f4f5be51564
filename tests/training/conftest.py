"""A shard folder of tiny-world clips and starting weights, made once for all training tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import shipped
from selfforcing_dfd.config import Config, NetworkConfig
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.sources.tiny import make_tiny_shards
from selfforcing_dfd.ode import invert
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.training.build import build_network
from tests.tiny_models import fill_weights, save_network

MODEL = NetworkConfig(num_heads=2, head_dim=8, num_layers=1, ffn_dim=32, freq_dim=16)
SMALL = [f"network.{name}={value}" for name, value in asdict(MODEL).items()]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards/ (24 clips with noise) and teacher.safetensors.

    The teacher is a one-layer network.
    """
    folder = tmp_path_factory.mktemp("world")
    teacher = build_network(MODEL)
    fill_weights(teacher, seed=1)
    save_network(folder / "teacher.safetensors", teacher)
    basis = shipped("assets/tiny/codec.safetensors")
    make_tiny_shards(folder / "shards", 24, 0, "short", 9, basis)
    store_noise(
        folder / "shards",
        lambda x, text, noise: invert(teacher, x, noise, Conditioning(text), 2, 3.0),
        noise_fingerprint="t",
    )
    return folder


@pytest.fixture
def settings(world: Path, tmp_path: Path) -> Callable[..., Config]:
    """A config of the small network on the shared shards, in its own run folder.

    Overrides come on top.
    """

    return lambda *overrides: config_in(tmp_path, world, *overrides)


def config_in(folder: Path, world: Path, *overrides: str) -> Config:
    """That config, with its run below `folder`."""
    recipe = folder / "config.yaml"
    recipe.write_text("run: {stage: dfd}\n")
    return load_config(str(recipe), [*arguments(world, folder), *overrides])


def finished_run(folder: Path, world: Path, *overrides: str) -> Config:
    """That config, and the run has been done."""
    config = config_in(folder, world, *overrides)
    run(config)
    return config


def arguments(world: Path, out: Path) -> list[str]:
    """The same as dotlist overrides, for runs in a process of their own."""
    return [
        *SMALL,
        f"weights.teacher={world / 'teacher.safetensors'}",
        f"data.shards={world / 'shards'}",
        f"run.out={out / 'runs'}",
        "run.student_updates=4",
        "batch.size=4",
        "batch.micro=4",
        "score.fake_per_student=2",
        "optim.student.lr=1e-3",
        "optim.fake.lr=1e-3",
        "checkpoint.every=2",
    ]
