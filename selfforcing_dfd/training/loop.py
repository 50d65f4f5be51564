"""The training loop: turns, accumulation, EMA, checkpoints. It knows no method and no config."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from selfforcing_dfd.common import Interrupted
from selfforcing_dfd.data.shards import Batch, SampleOrder, ShardReader, batches
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages.base import StageLoss, TrainingStage
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.clock import Clock, Turn
from selfforcing_dfd.training.ema import EMA
from selfforcing_dfd.training.finite import check_finite
from selfforcing_dfd.training.optimizer_state import optimizer_state
from selfforcing_dfd.training.tracking import Tracker

SIGMA_BINS = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)
NUM_WATCHED = 16
"""Clips of an update that are compared with the data; more would cost memory and say little."""


class Watch(Protocol):
    """Looks at the student's clips beside real ones of the same captions, both [B, F, C, H, W]."""

    def __call__(self, generated: Tensor, real: Tensor) -> dict[str, float]:
        """Numbers to log."""
        ...

    def pictures(self, generated: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Images [N, H, W, 3] uint8 by name; none where latents cannot be shown."""
        ...


@dataclass(frozen=True, slots=True)
class World:
    """This process among all that train together."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class Learner:
    """One trained network with its optimizers."""

    network: nn.Module
    optimizers: tuple[Optimizer, ...]
    lr: Callable[[int], float]  # learning rate by the number of student updates before the turn
    clip: float  # largest gradient norm


@dataclass(slots=True)
class Trainer:
    """Runs a stage from where its clock stands to `student_updates`.

    batch_size: samples of one update over all processes; micro: samples of one forward pass of one
    process.
    """

    stage: TrainingStage
    learners: Mapping[str, Learner]
    ema: EMA
    reader: ShardReader
    order: SampleOrder
    batch_size: int
    micro: int
    seed: int
    student_updates: int
    checkpoints: CheckpointManager
    checkpoint_every: int
    tracker: Tracker
    num_workers: int = 0
    watch: Watch | None = None
    world: World = field(default_factory=World)
    clock: Clock = field(default_factory=Clock)
    stop_requested: bool = False

    def run(self, description: str = "train") -> None:
        """Train to the end.

        Raises Interrupted, after saving, on SIGTERM or Ctrl-C; NonFiniteError before a bad step.
        """
        start = self.clock.student_updates
        bar = tqdm(
            total=self.student_updates,
            initial=start,
            desc=description,
            unit="update",
            dynamic_ncols=True,
        )
        stream = self.stream()
        with self.stop_on_signals(), bar:
            while self.clock.student_updates < self.student_updates:
                turn = self.clock.next_turn(
                    self.stage.fake_per_student, self.stage.regression_per_student
                )
                started = time.perf_counter()
                cores_started = time.process_time()
                values = self.take_turn(turn, stream)
                values["seconds"] = time.perf_counter() - started
                values["core_seconds"] = time.process_time() - cores_started
                fake_belongs_to_next = int(turn != "student")
                self.tracker.log(turn, self.clock.student_updates + fake_belongs_to_next, values)
                if turn == "student":
                    bar.set_postfix(loss=f"{values['loss']:.3g}", refresh=False)
                    bar.update()
                    self.save_when_due()
                if self.stop_requested:
                    self.save()
                    raise Interrupted(
                        f"stopped and saved at student update {self.clock.student_updates} "
                        f"of {self.student_updates}; go on with the same command and --resume"
                    )

    def take_turn(self, turn: Turn, stream: Iterator[Batch]) -> dict[str, float]:
        """One update of one network: all micro-batches, then the optimizer step, then the clock."""
        learner = self.learners[turn]
        learner.network.requires_grad_(True)
        for optimizer in learner.optimizers:
            optimizer.zero_grad(set_to_none=True)
        parts = [self.backward(turn, next(stream), draw) for draw in self.draws()]
        mean_loss = torch.stack([part.loss.detach() for part in parts]).mean()
        grad_norm = check_finite(mean_loss, gradients(learner.network), self.where(turn))
        nn.utils.clip_grad_norm_(learner.network.parameters(), learner.clip)
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learner.lr(self.clock.student_updates)
            optimizer.step()
        learner.network.requires_grad_(False)
        self.clock.advance(turn, self.batch_size)
        if turn == "student":
            self.ema.update(learner.network, self.clock.student_updates)
        return {"loss": float(mean_loss), "grad_norm": float(grad_norm)} | self.summary(parts)

    def backward(self, turn: str, batch: Batch, draw: Draw) -> StageLoss:
        """Loss and gradient of one micro-batch; all samples of an update weigh the same."""
        batch = to_device(batch, self.world.device)
        part = self.stage.loss(turn, batch, draw, self.clock.student_updates)
        (part.loss * (len(draw.positions) * self.world.size / self.batch_size)).backward()
        return part

    def stream(self) -> Iterator[Batch]:
        """This process's micro-batches from where the clock stands, without end."""
        stride = self.micro * self.world.size
        first = self.clock.samples + self.world.rank * self.micro
        return batches(
            self.reader, self.order, itertools.count(first, stride), self.micro, self.num_workers
        )

    def draws(self) -> Iterator[Draw]:
        """The randomness of this process's micro-batches of the coming update."""
        start = self.clock.samples
        stride = self.micro * self.world.size
        for micro in range(start, start + self.batch_size, stride):
            first = micro + self.world.rank * self.micro
            positions = tuple(range(first, first + self.micro))
            yield Draw(self.seed, start, self.batch_size, micro, positions)

    def where(self, turn: str) -> str:
        clock = self.clock
        return (
            f"{turn} update after student update {clock.student_updates} "
            f"(seed {self.seed}, samples from {clock.samples})"
        )

    def summary(self, parts: list[StageLoss]) -> dict[str, float]:
        """What is logged of a turn: means by branch and by sigma bin, and what the guards see."""
        values = {
            name: torch.cat([part.values[name] for part in parts]).float().cpu()
            for name in parts[0].values
        }
        return summarise(values) | self.look_at(parts)

    def look_at(self, parts: list[StageLoss]) -> dict[str, float]:
        """Numbers of the guards, over the first NUM_WATCHED clips of this process's micro-batches.

        Where a checkpoint is due, pictures of them go to the trackers.
        """
        generated = [part.generated for part in parts if part.generated is not None]
        real = [part.real for part in parts if part.real is not None]
        if self.watch is None or not generated or not real:
            return {}
        ours = torch.cat(generated)[:NUM_WATCHED]
        data = torch.cat(real)[:NUM_WATCHED]
        if self.tracker.takes_pictures and self.is_due():
            self.tracker.log_pictures(self.clock.student_updates, self.watch.pictures(ours, data))
        return self.watch(ours, data)

    def is_due(self) -> bool:
        """Whether a checkpoint follows the update that was just made."""
        done = self.clock.student_updates == self.student_updates
        return done or self.clock.student_updates % self.checkpoint_every == 0

    def save_when_due(self) -> None:
        if self.is_due():
            self.save()

    def save(self) -> None:
        """Write a checkpoint now."""
        self.checkpoints.save(self.clock.student_updates, self.state())

    def state(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as live objects.

        Randomness needs nothing: it follows from the clock.
        """
        state: dict[str, Any] = {"clock": self.clock, "ema": self.ema}
        for turn, learner in self.learners.items():
            if turn != "regression":  # which trains the student
                state[turn] = learner.network
            for optimizer in learner.optimizers:
                name = f"{turn}_{type(optimizer).__name__.lower()}"
                state[name] = optimizer_state(learner.network, optimizer)
        return state

    @contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask the loop to save and leave after the current turn.

        A second one ends at once.
        """

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            name = signal.Signals(number).name
            tqdm.write(f"{name}: finishing this update, then saving; again to leave at once")

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def to_device(batch: Batch, device: torch.device) -> Batch:
    noise = batch.noise.to(device) if batch.noise is not None else None
    return replace(batch, latents=batch.latents.to(device), text=batch.text.to(device), noise=noise)


def gradients(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and gradients of what is trained."""
    return ((name, p.grad) for name, p in network.named_parameters() if p.grad is not None)


def summarise(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of per-sample values [B].

    Also by branch, where `dfd` marks rows, and by sigma bin, where sigma is known.
    """
    some = next(iter(values.values()))
    masks = {"": torch.ones(some.shape, dtype=torch.bool)}
    if "dfd" in values:
        masks |= {"/dfd": values["dfd"] > 0, "/dmd": values["dmd"] > 0}
    if "sigma" in values:
        for low, high in itertools.pairwise(SIGMA_BINS):
            masks[f"/sigma<={high:g}"] = (values["sigma"] > low) & (values["sigma"] <= high)
    means = {}
    for suffix, mask in masks.items():
        for name, value in values.items():
            splits_itself = suffix and name in ("dfd", "dmd", "sigma")
            if mask.any() and not splits_itself:
                means[f"{name}{suffix}"] = float(value[mask].mean())
    return means
