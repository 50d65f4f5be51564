"""Checkpoints that a thread writes while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gloo import in_processes
from safetensors.torch import load_file
from test_checkpoint import assert_same, names, small_state
from test_faults import RESULTS, metrics_of
from torch.distributed import ProcessGroup

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import PARTIAL, Interrupted
from selfforcing_dfd.config import Config
from selfforcing_dfd.training.build import build_trainer
from selfforcing_dfd.training.checkpoint import CheckpointManager, Snapshot
from selfforcing_dfd.training.folders import CHECKPOINTS, run_folder
from selfforcing_dfd.training.loop import Trainer
from selfforcing_dfd.training.saving import Saver
from selfforcing_dfd.training.state import State
from selfforcing_dfd.weights.checkpoint_files import CheckpointError
from tests.training.conftest import config_in

LIMIT_S = 60.0
KINDS = {"dmd": ["run.stage=dmd"], "bfloat16": ["run.stage=dmd", "model.compute=bfloat16"]}
EVERY = ["checkpoint.every=1", "checkpoint.keep=2", "optim.student.kind=muon"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_and_the_same_is_stored(
    kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a save that training waits for, one that sees later weights, and two at once."""
    folders = {}
    for where in ("never", "always"):
        (tmp_path / where).mkdir()
        settings = [*KINDS[kind], *EVERY, f"checkpoint.background={where}"]
        config = config_in(tmp_path / where, world, *settings)
        if where == "always":
            monkeypatch.setattr(CheckpointManager, "write", after_another_update(monkeypatch))
        run(config)
        folders[where] = run_folder(config)
    for name in RESULTS:
        assert (folders["always"] / name).read_bytes() == (folders["never"] / name).read_bytes()
    assert names(folders["always"] / CHECKPOINTS) == names(folders["never"] / CHECKPOINTS)
    stored = sorted((folders["always"] / CHECKPOINTS).glob("*/*.safetensors"))
    assert len(stored) == 2
    for path in stored:
        assert_same(
            load_file(path), load_file(folders["never"] / path.relative_to(folders["always"]))
        )
    assert metrics_of(folders["always"]) == metrics_of(folders["never"])


def after_another_update(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A `write` that begins when the next update was made; the last one begins at once."""
    went_on = threading.Event()
    only_one = threading.Lock()
    step = Trainer.step
    write = CheckpointManager.write

    def stepping(trainer: Trainer, *args: object) -> None:
        step(trainer, *args)  # type: ignore[arg-type]
        if args[1] == "student":
            went_on.set()

    def late(
        manager: CheckpointManager, snapshot: Snapshot, group: ProcessGroup | None = None
    ) -> Path:
        assert only_one.acquire(blocking=False)
        with_more_to_come = not snapshot.path.name.endswith("4")
        assert not with_more_to_come or went_on.wait(LIMIT_S), "training waits for the save"
        went_on.clear()
        path = write(manager, snapshot, group)
        only_one.release()
        return path

    monkeypatch.setattr(Trainer, "step", stepping)
    return late


def test_a_copy_is_stored(tmp_path: Path) -> None:
    """Catches weights that change after `save` has returned and before they are written."""
    manager = CheckpointManager(tmp_path)
    saver = Saver(Gated(manager), in_background=True)
    state = small_state(1)
    path = saver.save(1, state)
    state["weights"]["w"].fill_(9.0)
    assert not path.exists()
    Gated.gate.set()
    saver.wait()
    found = small_state(0)
    manager.load(path, found)
    assert found["step"] == 1
    assert torch.equal(found["weights"]["w"], small_state(1)["weights"]["w"])


class Gated(CheckpointManager):
    """Writes when the gate is open."""

    gate = threading.Event()

    def __init__(self, of: CheckpointManager) -> None:
        super().__init__(of.folder, of.keep)

    def write(self, snapshot: Snapshot, group: ProcessGroup | None = None) -> Path:
        assert self.gate.wait(LIMIT_S)
        return super().write(snapshot, group)


def failing_save(folder: Path) -> Saver:
    """A save in the background that cannot succeed: a file lies where its folder has to be."""
    saver = Saver(CheckpointManager(folder / CHECKPOINTS), in_background=True)
    (folder / CHECKPOINTS).write_text("in the way")
    saver.save(1, small_state(1))
    return saver


def test_a_failed_save_is_said_once(tmp_path: Path) -> None:
    """Catches a run that goes on for days while none of its saves succeeds."""
    saver = failing_save(tmp_path)
    with pytest.raises(CheckpointError, match=r"could not save in .*untouched"):
        saver.save(2, small_state(2))
    (tmp_path / CHECKPOINTS).unlink()
    saver.save(2, small_state(2))
    saver.wait()
    assert names(tmp_path / CHECKPOINTS) == ["student_update=000002"]


def test_a_failed_save_at_the_end_and_beside_another_error(tmp_path: Path) -> None:
    """Catches a last save that fails without a word, and one that hides why training ended."""
    saver = failing_save(tmp_path)
    with pytest.raises(CheckpointError, match="could not save"), saver.completed():
        pass
    saver = Saver(saver.checkpoints, in_background=True)
    saver.save(1, small_state(1))
    with pytest.raises(ZeroDivisionError) as caught, saver.completed():
        raise ZeroDivisionError
    assert "could not save" in caught.value.__notes__[0]


def test_a_stop_says_saved_after_the_save(settings: Callable[..., Config]) -> None:
    """Catches `stopped and saved` of a checkpoint that is still being written, or that failed."""
    config = settings("run.stage=dmd", "checkpoint.background=always")
    trainer = build_trainer(config)
    trainer.stop_requested = True
    with pytest.raises(Interrupted, match="stopped and saved at student update 0"):
        trainer.run()
    folder = run_folder(config) / CHECKPOINTS
    assert names(folder) == ["student_update=000000"]
    trainer.saver.checkpoints.folder = folder / "student_update=000000" / "meta.json"
    with pytest.raises(CheckpointError, match="could not save"):
        trainer.run()


def test_a_save_that_fails_on_one_of_two_ranks(tmp_path: Path) -> None:
    """Catches a rank that goes on after the other's thread has met an error, and a deadlock."""

    def work() -> list[str]:
        saver = Saver(Unwritable(tmp_path), in_background=True)
        said = []
        for update in (1, 2):
            saver.save(update, small_state(update))
            try:
                saver.wait()
            except CheckpointError as error:
                said.append(str(error))
        return said

    first, second = in_processes(2, tmp_path / "two", work)
    assert first == second
    assert len(first) == 1
    assert names(tmp_path) == ["student_update=000002", "two"]
    assert not list(tmp_path.glob(f"{PARTIAL}*"))


class Unwritable(CheckpointManager):
    """Its first checkpoint cannot be completed."""

    def _describe(self, student_update: int, values: State) -> State:
        if student_update == 1:
            raise OSError("no space")
        return super()._describe(student_update, values)
