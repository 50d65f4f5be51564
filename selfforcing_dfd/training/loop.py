"""The training loop: turns, accumulation, EMA, checkpoints. It knows no method and no config."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from selfforcing_dfd.common import Interrupted
from selfforcing_dfd.data.order import SampleOrder, batches
from selfforcing_dfd.data.shards import Batch, NonFiniteSampleError, ShardReader
from selfforcing_dfd.processes.failure import another_failed
from selfforcing_dfd.processes.ranks import add_up, gather, on_first_rank, raise_together
from selfforcing_dfd.processes.world import World
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages.base import StageLoss, TrainingStage
from selfforcing_dfd.training.agreement import AGREE_EVERY, norms_of, require_agreement
from selfforcing_dfd.training.clock import Clock, Turn
from selfforcing_dfd.training.ema import EMA
from selfforcing_dfd.training.finite import check_finite, check_losses, check_weights
from selfforcing_dfd.training.metrics import Watch, summarise, values_of_all, watched_clips
from selfforcing_dfd.training.neighbours import Neighbours
from selfforcing_dfd.training.optimizer_state import optimizer_state
from selfforcing_dfd.training.saving import Saver
from selfforcing_dfd.training.sharding import expect_backward, keep_gathered, release
from selfforcing_dfd.training.tracking import Tracker
from selfforcing_dfd.training.utilisation import Utilisation

SAME_SIGNAL_S = 1.0
"""torchrun passes on a Ctrl-C that its processes also got themselves."""


Look = Callable[[int, Path, Tracker], None]
"""Looks at a checkpoint that was written: its student update, its folder, the run's tracker."""


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
    process. look: called by the first process after a checkpoint that was due.
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
    saver: Saver
    checkpoint_every: int
    tracker: Tracker
    num_workers: int = 0
    watch: Watch | None = None
    utilisation: Utilisation | None = None
    neighbours: Neighbours | None = None
    look: Look | None = None
    world: World = field(default_factory=World)
    clock: Clock = field(default_factory=Clock)
    stop_requested: bool = False

    def run(self, description: str = "train") -> None:
        """Train to the end.

        Raises Interrupted, after saving, on SIGTERM or Ctrl-C; NonFiniteError before values that
        are not finite are stored.
        Several processes stop after the same turn, whichever of them was asked.
        """
        bar = tqdm(
            total=self.student_updates,
            initial=self.clock.student_updates,
            desc=description,
            unit="update",
            dynamic_ncols=True,
            disable=not self.world.is_first,
        )
        stream = self.stream()
        keep_gathered(self.learners["student"].network)
        self.check_agreement()
        with self.stop_on_signals(), self.saver.completed(), bar:
            while self.clock.student_updates < self.student_updates:
                turn = self.clock.next_turn(
                    self.stage.fake_per_student, self.stage.regression_per_student
                )
                started = time.perf_counter()
                cores_started = time.process_time()
                values = self.take_turn(turn, stream)
                values["seconds"] = time.perf_counter() - started
                (values["core_seconds"],) = add_up([time.process_time() - cores_started])
                values |= self.utilised(turn, values["seconds"])
                self.log(turn, values)
                if turn == "student":
                    bar.set_postfix(loss=f"{values['loss']:.3g}", refresh=False)
                    bar.update()
                    self.save_when_due()
                    if self.clock.student_updates % AGREE_EVERY == 0:
                        self.check_agreement()
                (num_asked_to_stop,) = add_up([self.stop_requested])
                if num_asked_to_stop:
                    self.save()
                    self.saver.wait()
                    raise Interrupted(
                        f"stopped and saved at student update {self.clock.student_updates} "
                        f"of {self.student_updates}; go on with the same command and --resume"
                    )

    def utilised(self, turn: Turn, seconds: float) -> dict[str, float]:
        """MFU of a turn, where the GPU's peak is known."""
        if self.utilisation is None:
            return {}
        return {"mfu": self.utilisation.mfu(turn, self.batch_size / self.world.size, seconds)}

    def check_agreement(self) -> None:
        """DisagreementError where a rank is elsewhere in the run, or has other draws or weights."""
        if self.world.size == 1:
            return
        draw = Draw(self.seed, self.clock.samples, self.batch_size, self.clock.samples, (0,))
        networks = {turn: learner.network for turn, learner in self.learners.items()}
        require_agreement(
            {
                "clock": self.clock,
                "exit steps": draw.in_turn("exit", 1000, self.clock.student_updates),
                "noise": draw.normal("noise", (4,), torch.zeros(())).tolist(),
                **norms_of(networks),
            }
        )

    def log(self, turn: Turn, values: Mapping[str, float]) -> None:
        if self.world.is_first:
            fake_belongs_to_next = int(turn != "student")
            update = self.clock.student_updates + fake_belongs_to_next
            self.tracker.log(turn, update, values, self.clock.count(turn))
            if self.neighbours:
                self.neighbours.look()

    def take_turn(self, turn: Turn, stream: Iterator[Batch]) -> dict[str, float]:
        """One update: all micro-batches, then the optimizers' steps, then the clock."""
        learners = [self.learners[name] for name in self.stage.learners_of(turn)]
        for learner in learners:
            for optimizer in learner.optimizers:
                optimizer.zero_grad(set_to_none=True)
        draws = list(self.draws())
        parts = []
        for draw, batch in zip(draws, self.coming(stream, len(draws)), strict=True):
            for learner in learners:
                expect_backward(learner.network, is_last=draw is draws[-1])
            parts.append(self.backward(turn, batch, draw))
        for each in self.learners.values():
            release(each.network)
        losses = gather(torch.stack([part.loss.detach() for part in parts]))
        mean_loss = check_losses(losses, self.where(turn))
        grad_norms = [
            check_finite(mean_loss, gradients(learner.network), self.where(turn))
            for learner in learners
        ]
        for learner in learners:
            self.step(learner, turn)
        self.clock.advance(turn, self.batch_size)
        if turn == "student":
            self.ema.update(learners[0].network, self.clock.student_updates)
        values = summarise(values_of_all(parts, self.world))
        return (
            {"loss": float(mean_loss), "grad_norm": float(grad_norms[0])}
            | values
            | self.look_at(parts)
        )

    def step(self, learner: Learner, turn: Turn) -> None:
        """Clip the gradients, take the optimizers' steps and look at the weights."""
        nn.utils.clip_grad_norm_(learner.network.parameters(), learner.clip)
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learner.lr(self.clock.student_updates)
            optimizer.step()
        check_weights(learner.network.named_parameters(), self.where(turn))

    def backward(self, turn: str, batch: Batch, draw: Draw) -> StageLoss:
        """Loss and gradient of one micro-batch; all samples of an update weigh the same.

        Sharded gradients are means over processes, so each process counts for `world.size`. Of a
        sequence on several processes, each has the gradient of its own tokens: their sum counts
        the loss once.
        """
        batch = to_device(batch, self.world.device)
        part = self.stage.loss(turn, batch, draw, self.clock.student_updates)
        (part.loss * (len(draw.positions) * self.world.size / self.batch_size)).backward()
        return part

    def stream(self) -> Iterator[Batch]:
        """This process's micro-batches from where the clock stands, without end."""
        stride = self.micro * self.world.data_size
        first = self.clock.samples + self.world.data_rank * self.micro
        return batches(
            self.reader, self.order, itertools.count(first, stride), self.micro, self.num_workers
        )

    def coming(self, stream: Iterator[Batch], number: int) -> Iterable[Batch]:
        """This process's next micro-batches.

        NonFiniteSampleError for a sample that is not finite. Several processes read all of a turn
        before it begins and raise the error together. Amid the turn only one would, and the others
        would wait for it.
        """
        micros = itertools.islice(stream, number)
        if self.world.size == 1:
            return micros
        return raise_together(lambda: list(micros), NonFiniteSampleError)

    def draws(self) -> Iterator[Draw]:
        """The randomness of this process's micro-batches of the coming update."""
        start = self.clock.samples
        stride = self.micro * self.world.data_size
        for micro in range(start, start + self.batch_size, stride):
            first = micro + self.world.data_rank * self.micro
            positions = tuple(range(first, first + self.micro))
            yield Draw(self.seed, start, self.batch_size, first, positions)

    def where(self, turn: str) -> str:
        clock = self.clock
        return (
            f"{turn} update after student update {clock.student_updates} "
            f"(seed {self.seed}, samples from {clock.samples})"
        )

    def look_at(self, parts: list[StageLoss]) -> dict[str, float]:
        """Numbers of the guards, over the first NUM_WATCHED clips of the update; first rank only.

        Where a checkpoint is due, pictures of them go to the trackers.
        """
        if self.watch is None:
            return {}
        clips = watched_clips(parts, self.world)
        if clips is None:
            return {}
        ours, data = clips
        if self.tracker.takes_pictures and self.is_due():
            self.tracker.log_pictures(self.clock.student_updates, self.watch.pictures(ours, data))
        return self.watch(ours, data)

    def is_due(self) -> bool:
        """Whether a checkpoint follows the update that was just made."""
        done = self.clock.student_updates == self.student_updates
        return done or self.clock.student_updates % self.checkpoint_every == 0

    def save_when_due(self) -> None:
        if not self.is_due():
            return
        path = self.save()
        look = self.look
        if look is not None:
            self.saver.wait()
            on_first_rank(lambda: look(self.clock.student_updates, path, self.tracker))

    def save(self) -> Path:
        """Save a checkpoint; where it will be.

        NonFiniteError, with nothing written, for values not finite.
        """
        return self.saver.save(self.clock.student_updates, self.state())

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
        asked_at = -math.inf

        def ask(number: int, frame: FrameType | None) -> None:
            nonlocal asked_at
            is_copy = self.world.size > 1 and time.monotonic() - asked_at < SAME_SIGNAL_S
            if is_copy or another_failed():
                return  # torchrun stops all when one has failed
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            asked_at = time.monotonic()
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
    picture = batch.picture.to(device) if batch.picture is not None else None
    latents = batch.latents.to(device)
    return replace(batch, latents=latents, text=batch.text.to(device), noise=noise, picture=picture)


def gradients(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and gradients of what is trained."""
    return ((name, p.grad) for name, p in network.named_parameters() if p.grad is not None)
