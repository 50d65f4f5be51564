"""Faults of one of two processes: named, ended or healed, and afterwards as if they had never been.

Two processes each time, as torchrun starts them. What is compared is every bit of the exports and
every line of metrics, but for the seconds.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launcher import launch, said
from test_faults import RESULTS, flip_newest, metrics_of
from test_healing import Spoiler, events, record_of, spoilt_shards

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.config import Config
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.processes import failure
from selfforcing_dfd.processes.world import World, find_world
from selfforcing_dfd.training import checkpoint
from selfforcing_dfd.training.build import build_trainer
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.loop import Trainer
from tests.training.conftest import config_in

Settings = Callable[..., Config]
FEW = (
    *("run.stage=dmd", "score.fake_per_student=1", "run.student_updates=4", "checkpoint.every=1"),
    "batch.micro=2",
)


@pytest.fixture(scope="module")
def unharmed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("unharmed")
    config = config_in(folder, world, *FEW)
    assert_trained(folder, config, resume=False)
    return run_folder(config)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that look for each other more often than in a real run."""
    monkeypatch.setattr(failure, "POLL_S", 0.2)
    monkeypatch.setattr(failure, "GRACE_S", 0.6)
    monkeypatch.setattr(failure, "LEAVE_S", 2.0)


def train(
    folder: Path, config: Config, resume: bool = True, timeout_s: float = 60
) -> list[tuple[int, str]]:
    """How both processes end, with what they say."""

    def work(world: World) -> None:
        run(config, resume)

    return launch(2, folder, work, timeout_s)


def assert_trained(folder: Path, config: Config, resume: bool = True) -> None:
    ends = train(folder, config, resume)
    assert [code for code, _ in ends] == [0, 0], ends


def assert_as_unharmed(config: Config, unharmed: Path) -> None:
    folder = run_folder(config)
    for name in RESULTS:
        assert (folder / name).read_bytes() == (unharmed / name).read_bytes()
    assert metrics_of(folder) == metrics_of(unharmed)


class Harm:
    """Happens once, to one rank, before a method of the program does its work."""

    def __init__(self, rank: int, harm: Callable[[], Any], when: Callable[..., bool]) -> None:
        self.rank = rank
        self.harm = harm
        self.when = when
        self.is_done = False

    def before(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def harmed(*arguments: Any, **named: Any) -> Any:
            is_here = find_world("cpu").rank == self.rank and self.when(*arguments)
            if is_here and not self.is_done:
                self.is_done = True
                self.harm()
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, harmed)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_update_3(trainer: Trainer, *_: Any) -> bool:
    return trainer.clock.student_updates == 2


def in_checkpoint_2(partial: Path, *_: Any) -> bool:
    return partial.name.endswith("2")


DEATHS = {
    "in an update": (1, Trainer, "backward", in_update_3),
    "in a save, before its part is written": (1, checkpoint, "save_tensors", in_checkpoint_2),
    "in a save, before it counts": (0, checkpoint, "replace_folder", in_checkpoint_2),
    "in a load": (1, checkpoint, "load_tensors", lambda *_: True),
}


def kill_a_rank(
    folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch, place: str
) -> list[tuple[int, str]]:
    """How both end when one dies there; the message must name it."""
    rank, owner, name, when = DEATHS[place]
    with monkeypatch.context() as patch:
        Harm(rank, die, when).before(patch, owner, name)
        ends = train(folder, config)
    assert ends[rank][0] == -signal.SIGKILL
    assert 0 not in [code for code, _ in ends]
    (line,) = said(ends)
    assert f"rank {rank} ended without a word: killed, or out of memory" in line
    return ends


def test_a_rank_meets_nan_and_another_is_killed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path
) -> None:
    """Catches a run that one sample of one rank ends, as only that rank knows of it.

    Also a message about a disk instead of the rank that died in a save, and a resume after all that
    to another place in the data. One process, which leaves out the same sample, says what is right.
    """
    few = (*FEW, "run.student_updates=2")
    plain = build_trainer(settings(*few, "run.name=plain"))
    bad = plain.order.sample_at(6)  # of the second turn, and of the second rank
    shards = spoilt_shards(world, tmp_path / "spoilt", float("nan"), bad)
    key = ShardReader(shards).index.samples[bad].key
    alone = settings(*few, f"data.shards={shards}", "run.name=alone")
    run(alone)
    config = settings(*few, f"data.shards={shards}", "run.name=two")
    kill_a_rank(tmp_path, config, monkeypatch, "in a save, before it counts")
    assert events(config)[:4] == ["training", "not finite", "went back", "training"]
    assert_trained(tmp_path, config)
    assert record_of(config).aside == record_of(alone).aside == {key: 4}
    assert record_of(config).retries == 1
    losses = [[line["loss"] for line in metrics_of(run_folder(each))] for each in (config, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("place", DEATHS)
def test_a_rank_that_is_killed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unharmed: Path, place: str
) -> None:
    """Catches ranks that wait for a dead one, and a resume after it to other weights."""
    config = settings(*FEW)
    if place == "in a load":
        assert_trained(tmp_path, settings(*FEW, "run.student_updates=2"), resume=False)
    kill_a_rank(tmp_path, config, monkeypatch, place)
    assert_trained(tmp_path, config)
    assert_as_unharmed(config, unharmed)


@pytest.mark.soak
def test_a_rank_that_hangs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unharmed: Path
) -> None:
    """Catches a run that waits for ever, a message that names no rank, and a lost update."""
    config = settings(*FEW)
    with monkeypatch.context() as patch:
        Harm(1, lambda: time.sleep(600), in_update_3).before(patch, Trainer, "backward")
        ends = train(tmp_path, config, timeout_s=10)
    assert 0 not in [code for code, _ in ends]
    (line,) = said(ends)
    assert "waited too long for other ranks: rank 1 is in <lambda>" in line
    assert_trained(tmp_path, config)
    assert_as_unharmed(config, unharmed)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_save(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    unharmed: Path,
    number: signal.Signals,
) -> None:
    """Catches a save that a signal to one rank breaks off, and ranks that stop at other turns."""
    config = settings(*FEW)
    with monkeypatch.context() as patch:
        harm = Harm(1, lambda: os.kill(os.getpid(), number), in_checkpoint_2)
        harm.before(patch, checkpoint, "save_tensors")
        ends = train(tmp_path, config)
    assert [code for code, _ in ends] == [130, 130]
    assert "stopped and saved at student update 2 of 4" in "".join(said(ends))
    newest = CheckpointManager(run_folder(config) / "checkpoints").latest()
    assert newest is not None and newest.name == "student_update=000002"
    assert_trained(tmp_path, config)
    assert_as_unharmed(config, unharmed)


@pytest.mark.soak
def test_a_damaged_newest_checkpoint(settings: Settings, tmp_path: Path, unharmed: Path) -> None:
    """Catches ranks of which one goes on from another checkpoint, and a resume that needs help."""
    config = settings(*FEW)
    assert_trained(tmp_path, settings(*FEW, "run.student_updates=2"), resume=False)
    flip_newest(run_folder(config))
    assert_trained(tmp_path, config)
    aside = run_folder(config) / "checkpoints" / "damaged-student_update=000002"
    assert aside.is_dir()
    assert_as_unharmed(config, unharmed)


@pytest.mark.soak
@pytest.mark.parametrize("what", ["loss", "weights"])
def test_one_rank_s_loss_is_not_finite(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """Catches ranks that go back to different places, and ones that try again without end."""
    config = settings(*FEW, "run.retries=2")

    def bad(draw: Any) -> bool:
        return find_world("cpu").rank == 1 and draw.update_start >= 20

    with monkeypatch.context() as patch:
        Spoiler(patch, what, bad)
        ends = train(tmp_path, config)
    assert 0 not in [code for code, _ in ends]
    errors = "".join(text for _, text in ends)
    assert "Training went back to a checkpoint 2 times (run.retries is 2)" in errors
    assert what == "weights" or "loss of rank 1 is nan" in errors
    record = record_of(config)
    assert (record.retries, len(record.aside)) == (2, 8)
    assert_trained(tmp_path, config)
    assert record_of(config).state == "finished"
    kinds = [(line["kind"], line["count"]) for line in metrics_of(run_folder(config))]
    assert kinds == [(kind, count) for count in range(1, 5) for kind in ("fake", "student")]
