"""A run continues bit for bit from its newest complete checkpoint."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfforcing_dfd import common, rng
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.clock import Clock
from selfforcing_dfd.training.ema import EMA
from selfforcing_dfd.training.optimizer_state import optimizer_state
from selfforcing_dfd.training.same_run import config_fingerprint
from selfforcing_dfd.weights.checkpoint_files import CheckpointError, read_meta
from selfforcing_dfd.weights.tensors import model_fingerprint

FAKE_PER_STUDENT = 2
TENSORS = "shard-00001-model-00001-of-00001.safetensors"


class Run:
    """Two real networks that train in turns, with all the state that a distillation has."""

    def __init__(self, width: int = 8) -> None:
        self.networks = {turn: make_network(turn, width) for turn in ("student", "fake")}
        self.optimizers = {
            turn: torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.0, 0.999))
            for turn, network in self.networks.items()
        }
        self.ema = EMA(self.networks["student"], decay=0.9)
        self.clock = Clock()

    def train(self, student_updates: int, stop_at_fake: int | None = None) -> None:
        while (
            self.clock.student_updates < student_updates and self.clock.fake_updates != stop_at_fake
        ):
            turn = self.clock.next_turn(FAKE_PER_STUDENT)
            self.optimizers[turn].zero_grad()
            x = rng.normal((4, 3), 0, "data", self.clock.samples)
            output = self.networks["student"](x)
            loss = (
                (self.networks["fake"](output if turn == "student" else output.detach()) - x)
                .square()
                .mean()
            )
            loss.backward()
            self.optimizers[turn].step()
            self.clock.advance(turn, samples=4)
            if turn == "student":
                self.ema.update(self.networks["student"], self.clock.student_updates)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"clock": self.clock, "ema": self.ema, "note": "a", "rate": 0.1}
        for turn, network in self.networks.items():
            state[turn] = network.state_dict()
            state[f"{turn}_optimizer"] = optimizer_state(network, self.optimizers[turn])
        return state

    def bits(self) -> dict[str, Tensor]:
        found = {f"ema.{name}": tensor for name, tensor in self.ema.shadow.items()}
        for turn, network in self.networks.items():
            found |= {f"{turn}.{name}": tensor for name, tensor in network.state_dict().items()}
            for name, tensors in optimizer_state(network, self.optimizers[turn]).items():
                found |= {
                    f"{turn}_optimizer.{name}.{key}": tensor for key, tensor in tensors.items()
                }
        return {name: tensor.clone() for name, tensor in found.items()}


def make_network(name: str, width: int) -> nn.Module:
    network = nn.Sequential(
        nn.Linear(3, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 3)
    )
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            parameter.copy_(0.5 * rng.normal(tuple(parameter.shape), 0, f"{name} {key}"))
    return network


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    differing = [
        name
        for name in got
        if got[name].dtype != wanted[name].dtype or not torch.equal(got[name], wanted[name])
    ]
    assert not differing


def small_state(step: int) -> dict[str, Any]:
    return {"weights": {"w": torch.full((1000,), float(step))}, "step": step}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stop_at_fake", [None, 7])
def test_six_updates_equal_three_and_three_resumed(
    tmp_path: Path, stop_at_fake: int | None
) -> None:
    """Catches any state that a checkpoint leaves out.

    Moments, step counts, EMA, clock, the place in the cycle.
    """
    whole = Run()
    whole.train(6)
    before = Run()
    before.train(6 if stop_at_fake else 3, stop_at_fake)
    assert before.clock.student_updates == 3
    manager = CheckpointManager(tmp_path)
    manager.save(3, before.state())
    after = Run()
    latest = manager.latest()
    assert latest is not None
    manager.load(latest, after.state())
    assert_same(after.bits(), before.bits())
    assert after.clock == before.clock
    after.train(6)
    assert_same(after.bits(), whole.bits())
    assert after.clock == whole.clock


def test_resume_from_before_the_first_update(tmp_path: Path) -> None:
    """Catches optimizers whose state is empty at update 0.

    Nothing to save, or one step too many on load.
    """
    whole = Run()
    saved = Run()
    resumed = Run()
    whole.train(3)
    manager = CheckpointManager(tmp_path)
    path = manager.save(0, saved.state())
    saved.train(3)
    assert_same(saved.bits(), whole.bits())
    resumed.train(1)
    manager.load(path, resumed.state())
    resumed.train(3)
    assert_same(resumed.bits(), whole.bits())


def test_loading_replaces_what_was_trained_since(tmp_path: Path) -> None:
    """Catches a load that only fills what is missing.

    Going back must be possible in a running process.
    """
    run = Run()
    run.train(2)
    manager = CheckpointManager(tmp_path)
    path = manager.save(2, run.state())
    before = run.bits()
    run.train(5)
    manager.load(path, run.state())
    assert_same(run.bits(), before)
    assert run.clock.student_updates == 2


def test_plain_values_come_back_exactly(tmp_path: Path) -> None:
    """Catches numbers that a text format rounds, and top-level values that are not loaded."""
    values = {
        "tiny": 5e-324,
        "third": 1 / 3,
        "big": 2**63,
        "minus": -0.0,
        "yes": True,
        "text": "é\n",
        "none": None,
    }
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, {"nested": {"deep": dict(values)}, "empty": {}, **values})
    state: dict[str, Any] = {
        name: value if value is None else type(value)() for name, value in values.items()
    }
    nested = {"deep": dict(state)}
    state |= {"nested": nested, "empty": {}}
    manager.load(path, state)
    assert nested["deep"] == values
    assert {name: state[name] for name in values} == values
    assert str(state["minus"]) == "-0.0"


def test_it_says_where_it_came_from(tmp_path: Path) -> None:
    """Catches a checkpoint that does not name its config, model and libraries."""
    config = {"run": {"seed": 3}, "optim": {"betas": (0.0, 0.999)}}
    manager = CheckpointManager(
        tmp_path, config=config, models={"teacher": model_fingerprint(make_network("t", 4))}
    )
    meta = read_meta(manager.save(40, small_state(40)))
    assert meta["student_update"] == 40
    assert meta["config_fingerprint"] == config_fingerprint(
        {"optim": {"betas": [0.0, 0.999]}, "run": {"seed": 3}}
    )
    assert meta["config_yaml"] == "run:\n  seed: 3\noptim:\n  betas:\n  - 0.0\n  - 0.999\n"
    assert meta["versions"]["torch"] == torch.__version__
    assert meta["values"] == {"step": 40}
    assert set(meta["files"]) == {TENSORS}


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    """Catches text order (999999 after 1000000), keeping all, and keeping too few."""
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (0, 9, 10, 999999, 1000000):
        manager.save(step, small_state(step))
        assert manager.latest() == tmp_path / f"student_update={step:06d}"
    assert names(tmp_path) == ["student_update=1000000", "student_update=999999"]
    with pytest.raises(ValueError, match="keep is 0; at least 1"):
        CheckpointManager(tmp_path, keep=0)


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """Catches keep counting names.

    A whole checkpoint would be deleted in favour of a truncated one.
    """
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (1, 2):
        manager.save(step, small_state(step))
    (tmp_path / "student_update=000002" / TENSORS).write_bytes(b"")
    manager.save(3, small_state(3))
    assert "student_update=000001" in names(tmp_path)


def test_the_same_update_can_be_saved_again(tmp_path: Path) -> None:
    """Catches a failing rename when a run stops between two student updates."""
    manager = CheckpointManager(tmp_path)
    run = Run()
    run.train(1)
    manager.save(1, run.state())
    run.train(2, stop_at_fake=3)
    path = manager.save(1, run.state())
    resumed = Run()
    manager.load(path, resumed.state())
    assert resumed.clock == run.clock == Clock(1, 3, samples=16)
    assert names(tmp_path) == ["student_update=000001"]


def test_killed_while_replacing_the_old_one_is_found(tmp_path: Path) -> None:
    """Catches the moment between two renames, at which the newest checkpoint has no name."""
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, small_state(1))
    path.rename(path.with_name(f".old-{path.name}"))
    latest = manager.latest()
    assert latest is not None
    state = small_state(0)
    manager.load(latest, state)
    assert state["step"] == 1
    manager.save(1, small_state(1))
    assert names(tmp_path) == ["student_update=000001"]


def test_killed_after_replacing_the_old_one_the_new_one_counts(tmp_path: Path) -> None:
    """Catches the stale one taken for the newest when a kill comes before it could be deleted."""
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, {"turns": 1})
    shutil.copytree(path, path.with_name(f".old-{path.name}"))
    manager.save(1, {"turns": 2})
    shutil.copytree(path, path.with_name(f".old-{path.name}"))
    assert manager.latest() == path
    state = {"turns": 0}
    manager.load(path, state)
    assert state["turns"] == 2


def test_a_failed_replacement_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches deleting the one of the same update before the new one has its name.

    On a file system that cannot exchange two names, and where the old name cannot be given back.
    """
    monkeypatch.setattr(common, "exchange", lambda one, other: False)
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, small_state(1))

    def rename(source: Path, target: Path) -> Path:
        if target == path:
            raise OSError(errno.EIO, "Input/output error")
        os.rename(source, target)
        return target

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(
        CheckpointError, match=r"earlier checkpoints are untouched: OSError: .* Input/output error"
    ):
        manager.save(1, small_state(1))
    latest = manager.latest()
    assert latest is not None
    manager.load(latest, small_state(0))


def test_saving_before_a_later_checkpoint_is_refused(tmp_path: Path) -> None:
    """Catches a new run in a used folder, where `latest` would return the other run's."""
    manager = CheckpointManager(tmp_path)
    manager.save(40, small_state(40))
    with pytest.raises(
        CheckpointError,
        match=r"student_update=000040 is beyond student update 30 .* another run folder",
    ):
        manager.save(30, small_state(30))
    assert names(tmp_path) == ["student_update=000040"]
