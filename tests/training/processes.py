"""Functions in several processes of one gloo group, and runs in them, down to their last bits."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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

TIMEOUT_S = 300  # a busy machine takes twenty times as long as a free one


def in_processes(size: int, folder: Path, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns in each of `size` processes, which are forks of this one.

    folder: an empty one, for their messages. Raises the first error with its rank.
    """
    folder.mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=_child, args=(rank, size, folder, work)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    for rank, process in enumerate(processes):
        error = folder / f"error{rank}"
        if process.is_alive():
            process.kill()
            process.join()
        if error.exists():
            raise AssertionError(f"rank {rank}: {error.read_text()}")
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(size)]


def _child(rank: int, size: int, folder: Path, work: Callable[[], Any]) -> None:
    warnings.simplefilter("ignore")
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        torch.save(work(), folder / f"result{rank}")
        dist.barrier()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


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
