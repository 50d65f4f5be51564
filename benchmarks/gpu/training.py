"""Stages `train` and `train-compile`: one micro-batch of data-forcing distillation, turn by turn.

The networks are those of `configs/wan1.3b/dfd_ar.yaml` with random weights: student and fake score
as float32 masters that compute in bfloat16 with activation checkpointing, a frozen teacher. Peak
memory stands beside what `--dry-run` estimates for the same passes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import count
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.record import Machine, Record
from benchmarks.gpu.timing import forget_peak, peak_gb, wait
from selfforcing_dfd.config import BatchConfig, Config, NetworkConfig
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.processes.world import World
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.training.build import (
    ask_in,
    build_learners,
    build_network,
    train_in,
    training_stage_of,
)
from selfforcing_dfd.training.estimate import Clip, Estimate, clip_of
from selfforcing_dfd.training.memory import Spread
from selfforcing_dfd.training.sharding import Sharding, expect_backward, keep_gathered, release

CONFIG = "wan1.3b/dfd_ar.yaml"
WAN = NetworkConfig(num_heads=12, head_dim=128, num_layers=30, ffn_dim=8960, text_dim=4096)
SMALL = NetworkConfig(num_heads=2, head_dim=32, num_layers=2, ffn_dim=64, text_dim=16, freq_dim=16)
TRAINED = ("student", "fake")


def measure(record: Record) -> None:
    run_turns(record, compiled=False)


def measure_compiled(record: Record) -> None:
    run_turns(record, compiled=True)


def run_turns(record: Record, compiled: bool) -> None:
    """A row for each turn. The networks are built once, in the first one."""
    run = MicroBatches(record.machine, compiled)
    for turn in ("fake", "student"):
        record.row(f"{turn} turn", partial(run.turn, turn))


def config_of_one_clip() -> Config:
    """The recipe with one clip an update, which a GPU alone makes in one pass."""
    return replace(load_config(CONFIG), arms={}, batch=BatchConfig(size=1, micro=1))


def estimate_of(config: Config, small: bool) -> tuple[Estimate, Clip]:
    """What `--dry-run` says of it at 480x832."""
    size = SMALL if small else WAN
    clip = clip_of(config, (4, 6), 8) if small else clip_of(config, (60, 104), 512)
    return Estimate(config, clip, dict.fromkeys((*TRAINED, "teacher"), size)), clip


def draw_of(number: int) -> Draw:
    """Of an update of one sample."""
    return Draw(0, number, 1, number, (number,))


class MicroBatches:
    """The networks and optimizers of one run, and its updates of one clip."""

    def __init__(self, machine: Machine, compiled: bool) -> None:
        self.machine = machine
        self.compiled = compiled
        self.config = config_of_one_clip()
        self.estimate, self.clip = estimate_of(self.config, machine.small)
        self.stage: Any = None

    def build(self) -> None:
        forget_peak(self.machine.device)
        networks: dict[str, Any] = {}
        sharding = Sharding(World(device=self.machine.device), 0, torch.bfloat16)
        for role, size in self.estimate.sizes.items():
            with self.machine.device:  # the host would take longer than all of the updates
                network = build_network(size, self.machine.device)
            network.init_weights(torch.Generator(self.machine.device).manual_seed(0))
            if role in TRAINED:
                train_in(self.config.model, network)
            else:
                torch.nn.Module.to(network, torch.bfloat16)
                ask_in(self.config.model, network).requires_grad_(False)
            if self.compiled:
                network.compile_blocks(**self.machine.compiler())
            sharding.apply(network, is_trained=role in TRAINED)
            networks[role] = network
        self.stage = training_stage_of(self.config).build(self.config, networks, None)
        self.learners = build_learners(self.config, self.stage)
        keep_gathered(self.learners["student"].network)

    def turn(self, turn: str) -> dict[str, Any]:
        """Seconds of a micro-batch and of the optimizer's step, rates, and memory.

        Means over updates that train each step of the ladder once: how long a rollout is depends on
        that step, and the operations are those of a mean one. An update before them warms up and
        makes the optimizer's moments.
        """
        if self.stage is None:
            self.build()
        device = self.machine.device
        numbers = self.numbers(turn)
        forget_peak(device)
        self.update(turn, numbers[0])
        times = [self.update(turn, number) for number in numbers]
        seconds = mean(passes for passes, _ in times)
        return {
            "micro-batch, s": seconds,
            "micro-batch by exit step, s": [passes for passes, _ in times],
            "optimizer step, s": mean(step for _, step in times),
            **self.rates(turn, seconds),
            **self.memory(turn),
        }

    def rates(self, turn: str, seconds: float) -> dict[str, float]:
        flops = sum(self.estimate.turn_flops(turn).values())
        once = sum(self.estimate.turn_flops(turn, again=False).values())
        return {
            "TFLOP, with what is made again": flops / 1e12,
            "TFLOP/s, with what is made again": flops / seconds / 1e12,
            "TFLOP/s, each operation once": once / seconds / 1e12,
        }

    def memory(self, turn: str) -> dict[str, float | None]:
        estimated = self.estimated_gb(turn)
        measured = peak_gb(self.machine.device)
        return {
            "peak GB": measured,
            "peak GB by --dry-run": estimated,
            "measured over estimated": measured / estimated if measured else None,
        }

    def numbers(self, turn: str) -> list[int]:
        """Numbers of updates that train the first step of the ladder, the second, and so on."""
        steps = range(len(self.stage.ladder))
        return [self.first_number(turn, step) for step in steps]

    def first_number(self, turn: str, step: int) -> int:
        return next(number for number in count() if self.exit_step(turn, number) == step)

    def exit_step(self, turn: str, number: int) -> int:
        """As `MatchingStage.exits` has it."""
        options = len(self.stage.ladder)
        draw = draw_of(number)
        if turn == "student":
            return draw.in_turn("exit", options, number)
        return draw.choice("exit", options)

    def update(self, turn: str, number: int) -> tuple[float, float]:
        """One update of one clip: seconds of its passes, and of the optimizer's step."""
        device = self.machine.device
        learner = self.learners[turn]
        batch = self.batch()
        wait(device)
        started = time.perf_counter()
        expect_backward(learner.network, is_last=True)
        self.stage.loss(turn, batch, draw_of(number), number).loss.backward()
        for each in self.learners.values():
            release(each.network)
        wait(device)
        between = time.perf_counter()
        for optimizer in learner.optimizers:
            optimizer.step()
        wait(device)
        ended = time.perf_counter()
        return between - started, ended - between

    def batch(self) -> Batch:
        size = self.estimate.sizes["student"]
        frames = sum(self.clip.chunks)
        return Batch(
            latents=self.random(1, frames, size.channels, *self.clip.latent_size),
            text=self.random(1, self.clip.text_tokens, size.text_dim),
            captions=("",),
            keys=("0",),
            noise=None,
        )

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.machine.device)

    def estimated_gb(self, turn: str) -> float:
        """What lasts, and the largest phase of this turn."""
        spread = Spread(self.estimate, 1)
        phases = spread.turn(turn, self.estimate.passes[turn]).values()
        return (sum(spread.lasting().values()) + max(sum(each.values()) for each in phases)) / 1e9
