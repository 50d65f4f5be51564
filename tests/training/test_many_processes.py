"""Two and four processes train as one does on the same samples: data, draws, losses, weights.

Networks have float64 weights here. What is summed over samples (gradients, metrics) is summed in
another order by another number of processes, which changes the last of 16 digits; AdamW divides by
the gradient's own size and passes that on, and five updates of a chain of a few hundred products
pass it on again. Measured: 2e-13 of the largest value of a tensor at most. TOLERANCE leaves a
factor of fifty; a wrong gradient differs by a hundredth or more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Trained, in_processes, in_turn, train_in_float64

from selfforcing_dfd.config import Config
from selfforcing_dfd.stages import load_config
from tests.training.conftest import arguments

TOLERANCE = 1e-11
FLOAT32 = 2e-6  # of what is float32 everywhere: the average of the student, and logged numbers
STAGES = {
    "teacher": ["run.stage=teacher", "teacher.first_chunk=0.5"],
    "causal": ["run.stage=causal"],
    "init": ["run.stage=init"],
    "regression": ["run.stage=regression", "regression.target=trajectory", "regression.steps=2"],
    "next_step": ["run.stage=regression", "regression.target=next_step", "rollout.noise=kept"],
    "clip": ["run.stage=regression", "regression.target=clip"],
    "dmd": ["run.stage=dmd"],
    "caption": ["dfd.pairing=caption", "dfd.granularity=micro"],
    "noised_real": ["dfd.pairing=noised_real", "score.regression_per_student=1"],
    "inversion": ["dfd.pairing=inversion", "dfd.granularity=update"],
    "noised_prefix": ["dfd.pairing=noised_prefix", "score.control_variate=true"],
}
BY_FOUR = {"caption": ["model.shard_ranks=2"], "causal": ["model.shard_ranks=1"]}


@pytest.fixture(scope="module")
def make(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """A config by the name of a stage, in a run folder of its own."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "config.yaml").write_text("run: {stage: dfd}\n")

    def config(stage: str, run: str, *overrides: str) -> Config:
        causal = f"weights.causal={world / 'teacher.safetensors'}"  # any network will do
        settings = [
            *arguments(world, folder),
            causal,
            *STAGES[stage],
            f"run.name={run}/{stage}",
            "run.student_updates=5",
            "batch.micro=1",
            "score.fake_per_student=1",
            "score.guidance=2",
            "checkpoint.every=100",
            *overrides,
        ]
        return load_config(str(folder / "config.yaml"), settings)

    return config


@pytest.fixture(scope="module")
def alone(make: Callable[..., Config]) -> Callable[[str], Trained]:
    """The run of one process, made once for each stage."""
    made: dict[str, Trained] = {}

    def train(stage: str) -> Trained:
        if stage not in made:
            made[stage] = train_in_float64(make(stage, "alone"))
        return made[stage]

    return train


def assert_equal(ranks: list[Trained], one: Trained) -> None:
    assert in_turn([each.seen for each in ranks]) == one.seen
    for rank, each in enumerate(ranks):
        assert each.values == one.values, f"rank {rank}"
        assert each.tensors.keys() == one.tensors.keys()
        for name, wanted in one.tensors.items():
            tolerance = FLOAT32 if name.startswith("ema") else TOLERANCE
            assert error(each.tensors[name], wanted) < tolerance, f"{name} on rank {rank}"
    assert_same_metrics(ranks[0].metrics, one.metrics)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in units of the tensor's largest value."""
    scale = float(wanted.abs().max())
    return float((got - wanted).abs().max()) / (scale or 1.0)


def assert_same_metrics(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(got) == len(wanted)
    for line, other in zip(got, wanted, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"seconds", "core_seconds", "kind"}:
            exact = name in ("loss", "grad_norm")
            tolerance = TOLERANCE if exact else FLOAT32
            assert line[name] == pytest.approx(other[name], rel=tolerance, abs=1e-9), name


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(
    stage: str, make: Callable[..., Config], alone: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Catches a rank that reads or draws what another does, and a gradient that misses a rank.

    Also one that counts ranks twice, a mean over one rank's samples, an average (EMA) or a
    parameter that differs between ranks. Gradients are compared as AdamW's exp_avg, which is the
    last gradient, as its beta1 is 0; and by their norm at each update.
    """
    two = in_processes(2, tmp_path / "two", lambda: train_in_float64(make(stage, "two")))
    assert_equal(two, alone(stage))


@pytest.mark.parametrize("stage", BY_FOUR)
def test_four_processes_train_as_one(
    stage: str, make: Callable[..., Config], alone: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Catches copies of the weights that do not hear of each other's gradients.

    Pairs of processes hold the weights together, or each of them holds all.
    """
    config = make(stage, "four", *BY_FOUR[stage])
    assert_equal(in_processes(4, tmp_path / "four", lambda: train_in_float64(config)), alone(stage))


def test_the_number_of_processes_may_change_on_resume(
    make: Callable[..., Config], alone: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Catches a checkpoint, a place in the data or a draw that belongs to a number of processes."""
    two = in_processes(
        2,
        tmp_path / "two",
        lambda: train_in_float64(make("caption", "resumed", "run.student_updates=2")),
    )
    one = train_in_float64(make("caption", "resumed", "run.student_updates=3"), resume=True)
    four = in_processes(
        4, tmp_path / "four", lambda: train_in_float64(make("caption", "resumed"), resume=True)
    )
    seen = in_turn([each.seen for each in two]) + one.seen + in_turn([each.seen for each in four])
    wanted = alone("caption")
    assert seen == wanted.seen
    for name, tensor in wanted.tensors.items():
        tolerance = FLOAT32 if name.startswith("ema") else TOLERANCE
        assert error(four[3].tensors[name], tensor) < tolerance, name
    assert_same_metrics(four[0].metrics, wanted.metrics)
