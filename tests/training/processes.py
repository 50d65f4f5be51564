"""Runs in several processes, down to their last bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

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


@dataclass(slots=True)
class Trained:
    """A run that has been made. seen: what each loss was asked for, in order, by this process."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    seen: list[tuple[Any, ...]] = field(default_factory=list)


def train_in_float64(config: Config, resume: bool = False) -> Trained:
    """One run whose networks have float64 weights, so that sums in another order hardly differ."""
    plain = build.build_networks

    def in_float64(config: Config, device: torch.device) -> Mapping[str, nn.Module]:
        networks = plain(config, device)
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
