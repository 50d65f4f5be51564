"""Processes that share sequences train as one process does on the same samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from gloo import in_processes
from processes import (
    FLOAT32,
    TOLERANCE,
    Trained,
    assert_equal,
    assert_same_metrics,
    config_of,
    error,
    in_turn,
    train_in_float64,
    trained_once,
)
from tiny_models import fill_weights, save_network

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.config import Config, ConfigError, NetworkConfig
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.processes.world import World
from selfforcing_dfd.training.build import build_further, build_network, build_trainer, check_batch
from selfforcing_dfd.training.sequences import describe_grid, in_groups, share_sequences
from tests.training.conftest import MODEL as SMALL

SHARED = ("teacher", "causal", "regression", "next_step", "dmd", "noised_real", "noised_prefix")
"""Every pass that a stage makes; the other stages make no more."""
BIG = NetworkConfig(num_heads=4, head_dim=8, num_layers=2, ffn_dim=48, freq_dim=16)


@pytest.fixture(scope="module")
def make(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """A config by the name of a stage; its teacher is larger than its student and fake score."""
    folder = tmp_path_factory.mktemp("configs")
    teacher = build_network(BIG)
    fill_weights(teacher, seed=2)
    save_network(folder / "big.safetensors", teacher)
    small = world / "teacher.safetensors"
    return partial(
        with_teacher, partial(config_of, folder, world), folder / "big.safetensors", small
    )


def with_teacher(
    make: Callable[..., Config], teacher: Path, student: Path, stage: str, name: str, *more: str
) -> Config:
    weights = [
        f"weights.teacher={teacher}",
        f"weights.student={student}",
        f"weights.fake={student}",
    ]
    return make(stage, name, *weights, "run.student_updates=2", "batch.size=2", *more)


@pytest.fixture(scope="module")
def alone(make: Callable[..., Config]) -> Callable[[str], Trained]:
    return trained_once(make)


def test_two_processes_share_every_sequence(
    make: Callable[..., Config], alone: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Catches a loss or a gradient that counts twice, and processes that draw different noise."""

    def work() -> dict[str, Trained]:
        shared = ["model.sequence_ranks=2", "model.activation_checkpointing=full"]
        return {stage: train_in_float64(make(stage, "two", *shared)) for stage in SHARED}

    ranks = in_processes(2, tmp_path / "two", work)
    for stage in SHARED:
        assert_equal([each[stage] for each in ranks], alone(stage), sequence_ranks=2)


def test_groups_of_processes_go_on_with_a_run(make: Callable[..., Config], tmp_path: Path) -> None:
    """Catches samples or draws that depend on groups, and gradients that groups do not share.

    One pair of processes makes the first update, one process the second, and two pairs the third.
    Weights are held by each pair together.
    """

    def go_on(updates: int, *more: str, resume: bool = True) -> Trained:
        run_so_far = make("noised_prefix", "resumed", *more, f"run.student_updates={updates}")
        return train_in_float64(run_so_far, resume)

    pair = "model.sequence_ranks=2"
    two = in_processes(2, tmp_path / "two", lambda: go_on(1, pair, resume=False))
    one = go_on(2)
    four = in_processes(4, tmp_path / "four", lambda: go_on(3, pair, "model.shard_ranks=2"))
    wanted = train_in_float64(make("noised_prefix", "whole", "run.student_updates=3"))
    assert [each.seen for each in four[::2]] == [each.seen for each in four[1::2]]
    later = in_turn([each.seen for each in four[::2]])
    seen = two[0].seen + one.seen + later
    assert seen == wanted.seen
    for name, tensor in wanted.tensors.items():
        tolerance = FLOAT32 if name.startswith("ema") else TOLERANCE
        assert all(error(each.tensors[name], tensor) < tolerance for each in four), name
    assert_same_metrics(four[0].metrics, wanted.metrics)


def test_pairs_are_those_of_one_process(make: Callable[..., Config], tmp_path: Path) -> None:
    """Catches a teacher that waits for tokens of processes that make other pairs."""

    def write(name: str, *more: str) -> Path:
        out = tmp_path / name
        pairs = ["run.stage=pairs", "pairs.steps=2", "pairs.num=3", f"pairs.out={out}", *more]
        run(make("dmd", name, *pairs))
        return out

    wanted = ShardReader(write("one"))
    in_processes(4, tmp_path / "ranks", lambda: write("four", "model.sequence_ranks=2"))
    got = ShardReader(tmp_path / "four")
    for number in range(3):
        made = got[number].latents
        torch.testing.assert_close(made, wanted[number].latents, rtol=2e-3, atol=1e-4)  # float16


def test_what_cannot_be_shared_is_refused(make: Callable[..., Config]) -> None:
    """Catches processes left over, heads and tokens that do not divide, and samples left out."""
    with pytest.raises(ConfigError, match=r"sequence_ranks is 3, but 4 .* use one of 1, 2, 4"):
        in_groups(World(0, 4), 3)
    with pytest.raises(ConfigError, match="sequence_ranks is 2, but 1 process would train"):
        build_trainer(make("dmd", "refused", "model.sequence_ranks=2"))
    networks = {"student": build_network(SMALL), "teacher": build_network(BIG)}
    four = in_groups(World(0, 8), 4)
    with pytest.raises(ConfigError, match=r"\(student 2, teacher 4\); use one of 1, 2$"):
        share_sequences(four, networks, (8, 8), 60)
    with pytest.raises(ConfigError, match="10 x 14 has 35 tokens in the student"):
        share_sequences(in_groups(World(0, 2), 2), networks, (10, 14), 60)
    with pytest.raises(ConfigError, match="the discriminator sees whole sequences"):
        build_further(make("dmd", "refused", "gan.weight=1"), four, networks)
    three_a_time = make("dmd", "refused", "batch.size=3")
    with pytest.raises(ConfigError, match=r"2 groups of 4 processes .* use batch\.size=4"):
        check_batch(three_a_time, four)


def test_the_grid_is_told() -> None:
    """Catches a plan that leaves open what the processes share."""
    assert describe_grid(8, 2, 0) == ("4 x 2: samples over 4, each sequence over 2, weights over 8")
