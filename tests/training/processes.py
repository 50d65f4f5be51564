"""Runs in several processes, down to their last bits.

Networks have float64 weights here. What is summed over samples (gradients, metrics) is summed in
another order by another number of processes, which changes the last of 16 digits. AdamW divides by
the gradient's own size and passes that on, and so do five updates of a chain of a few hundred
products. TOLERANCE allows for a loss of five digits. A wrong gradient differs in the first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfforcing_dfd.config import Config
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages.base import StageLoss, TrainingStage
from selfforcing_dfd.training import build
from selfforcing_dfd.training.build import build_trainer
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.one_run import build_guards
from selfforcing_dfd.training.state import flatten, unfold
from selfforcing_dfd.training.tracking import read_metrics
from selfforcing_dfd.weights.tensors import whole
from tests.training.conftest import config_in

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
    "gan": [
        *("run.stage=dmd", "gan.weight=0.3", "gan.inner=8", "gan.depths=[1.0]"),
        "model.activation_checkpointing=full",
    ],
    "dp_dmd": ["run.stage=dp_dmd", "rollout.noise=kept", "anchor.steps=2"],
    "caption": ["dfd.pairing=caption", "dfd.granularity=micro"],
    "noised_real": ["dfd.pairing=noised_real", "score.regression_per_student=1"],
    "inversion": ["dfd.pairing=inversion", "dfd.granularity=update"],
    "noised_prefix": ["dfd.pairing=noised_prefix", "score.control_variate=true"],
}


@dataclass(slots=True)
class Trained:
    """A run that has been made. seen: what each loss was asked for, in order, by this process."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    seen: list[tuple[Any, ...]] = field(default_factory=list)


def config_of(folder: Path, world: Path, stage: str, run: str, *overrides: str) -> Config:
    """Five updates of a stage by its name, in a run folder of its own."""
    settings = [
        f"weights.causal={world / 'teacher.safetensors'}",  # any network will do
        *STAGES[stage],
        f"run.name={run}/{stage}",
        "run.student_updates=5",
        "batch.micro=1",
        "score.fake_per_student=1",
        "score.guidance=2",
        "checkpoint.every=100",
        *overrides,
    ]
    return config_in(folder, world, *settings)


def trained_once(make: Callable[..., Config]) -> Callable[[str], Trained]:
    """The run of one process, made once for each stage. make: see `config_of`."""
    return cache(lambda stage: train_in_float64(make(stage, "alone")))


def train_in_float64(config: Config, resume: bool = False) -> Trained:
    """One run whose networks have float64 weights, so that sums in another order hardly differ."""
    plain = build.build_networks

    def in_float64(
        config: Config, device: torch.device, late: bool = False
    ) -> Mapping[str, nn.Module]:
        networks = plain(config, device, late)
        return {role: nn.Module.to(each, torch.float64) for role, each in networks.items()}

    found = Trained()
    build.build_networks = in_float64  # type: ignore[assignment]
    build.DTYPES["float32"] = torch.float64
    try:
        trainer = build_trainer(config, build_guards(config), resume)
    finally:
        build.build_networks = plain
        build.DTYPES["float32"] = torch.float32
    trainer.stage = Listening(trainer.stage, found.seen)  # type: ignore[assignment]
    trainer.run()
    tensors, found.values = flatten(unfold(trainer.state()))
    found.tensors = {name: whole(tensor) for name, tensor in tensors.items()}
    if trainer.world.is_first:
        trainer.tracker.close()
        found.metrics = read_metrics(run_folder(config) / "metrics.jsonl")
    return found


class Listening:
    """A stage that writes down which samples and draws its losses are of."""

    def __init__(self, stage: TrainingStage, seen: list[tuple[Any, ...]]) -> None:
        self.stage = stage
        self.seen = seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        coins = [draw.coin("a coin", by).tolist() for by in ("update", "micro", "sample")]
        exits = [draw.in_turn("exit", 4, student_updates), draw.choice("exit", 4)]
        self.seen.append((turn, student_updates, batch.keys, draw.positions, coins, exits))
        loss = self.stage.loss(turn, batch, draw, student_updates)
        if loss.generated is None:
            return loss
        return replace(loss, generated=loss.generated.float())  # guards know float32 alone


def in_turn(ranks: list[list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    """What all ranks have seen, in the order in which one process sees it."""
    return [seen for at_once in zip(*ranks, strict=True) for seen in at_once]


def assert_equal(ranks: list[Trained], one: Trained, sequence_ranks: int = 1) -> None:
    """All ranks have what one process has; neighbours that share sequences saw the same."""
    for n in range(sequence_ranks):
        assert in_turn([each.seen for each in ranks[n::sequence_ranks]]) == one.seen
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
