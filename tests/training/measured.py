"""The most memory that a process has had while it trains, by the operating system's account."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.common import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
from selfforcing_dfd.config import Config
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.training.build import build_trainer
from selfforcing_dfd.training.loop import Learner, Trainer
from selfforcing_dfd.training.sharding import keep_gathered
from tests.tiny_models import TINY, fill_weights

RETURN_BYTES = 64 << 10
"""Larger blocks go back to the system as soon as they are free, so that it counts live bytes."""


def count_exactly() -> None:
    """From now on this process's resident memory is what is alive, whatever was freed before.

    `common.tune_allocator` does the opposite: the heap keeps what is freed, for speed.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, RETURN_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, RETURN_BYTES)
    libc.malloc_trim(0)  # a fork has what its parent freed, and would use it again


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10


def forget_peak() -> None:
    """The highest resident memory becomes that of now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def use_everything_once() -> None:
    """What the first update imports and allocates for good belongs to no network."""
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    torch.optim.AdamW([parameter]).step()
    network = WanTransformer(**TINY)
    fill_weights(network, 0)
    text = Conditioning(torch.ones(1, 5, 12))
    network(torch.ones(1, 2, 4, 4, 4), torch.ones(1), text).flow.sum().backward()


def peaks_of_turns(config: Config) -> dict[str, int]:
    """The most bytes of one update of each network, those of the networks included.

    The optimizers' moments are there from the beginning, as they are from the second update on.
    """
    count_exactly()
    use_everything_once()
    before = status("VmRSS")
    trainer = build_trainer(config)
    for learner in trainer.learners.values():
        make_moments(learner)
    keep_gathered(trainer.learners["student"].network)
    return {turn: peak_of(trainer, turn) - before for turn in ("fake", "student")}


def peak_of(trainer: Trainer, turn: Any) -> int:
    forget_peak()
    trainer.take_turn(turn, trainer.stream())
    return status("VmHWM")


def make_moments(learner: Learner) -> None:
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
