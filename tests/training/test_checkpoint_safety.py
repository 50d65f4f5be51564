"""Reading a checkpoint runs no code, and any number of processes can read what others wrote."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import in_processes
from test_checkpoint import TENSORS, small_state
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import sealed
from selfforcing_dfd.config import Config
from selfforcing_dfd.training.build import run_folder
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.weights.checkpoint_files import CheckpointError, read_training_checkpoint


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, harm: Path) -> None:
        self.harm = harm

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.harm),)


def plant(path: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint, with a matching entry in meta.json and a matching seal."""
    (path / name).write_bytes(content)
    meta = json.loads((path / "meta.json").read_text())
    sha256 = hashlib.sha256(content).hexdigest()
    meta["files"][name] = {"size_bytes": len(content), "sha256": sha256}
    (path / "meta.json").write_text(json.dumps(sealed(meta)))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "x.pt", TENSORS])
def test_a_planted_pickle_is_never_run(tmp_path: Path, name: str) -> None:
    """Catches a reader that unpickles what somebody else wrote.

    Hashes in the same folder prove nothing.
    """
    manager = CheckpointManager(tmp_path / "checkpoints")
    path = manager.save(1, small_state(1))
    plant(path, name, pickle.dumps(Payload(tmp_path / "harm")))
    with pytest.raises(CheckpointError, match=r"no complete checkpoint|no safetensors file"):
        manager.load(path, small_state(0))
    assert not (tmp_path / "harm").exists()


def test_resume_of_a_shared_run_folder_runs_no_code(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    """Catches the same through `train.py --resume`, by which a shared folder is opened."""
    few = ["run.stage=dmd", "score.fake_per_student=1"]
    config = settings(*few, "run.student_updates=1")
    run(config)
    (run_folder(config) / "student.safetensors").unlink()
    path = run_folder(config) / "checkpoints" / "student_update=000001"
    plant(path, ".metadata", pickle.dumps(Payload(tmp_path / "harm")))
    with pytest.raises(CheckpointError, match=r"names \.metadata, which is no safetensors file"):
        run(settings(*few, "run.student_updates=2"), resume=True)
    assert not (tmp_path / "harm").exists()


LOAD_WITHOUT_PICKLE = """
import sys, torch
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.weights.checkpoint_files import read_training_checkpoint

def refuse(event, arguments):
    if event.startswith("pickle."):
        raise AssertionError(f"{event} {arguments}")

manager = CheckpointManager(sys.argv[1])
path = manager.latest()
state = {"student": {"w": torch.zeros(1000)}, "step": 0}
sys.addaudithook(refuse)
manager.load(path, state)
models, _ = read_training_checkpoint(path)
assert torch.equal(models["student"]["w"].read(), state["student"]["w"])
print(state["step"])
"""


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """Catches any pickle on the way, by Python's own audit of it, in both uses of the reader."""
    state = {"student": {"w": torch.ones(1000)}, "step": 7}
    CheckpointManager(tmp_path).save(1, state)
    command = [sys.executable, "-c", LOAD_WITHOUT_PICKLE, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"7\n"


def test_only_damaged_checkpoints_do_not_start_a_run_again(tmp_path: Path) -> None:
    """Catches a resume that trains from scratch because it can read none of what is there."""
    manager = CheckpointManager(tmp_path)
    for path in [manager.save(step, small_state(step)) for step in (1, 2)]:
        (path / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* is complete"):
        manager.latest()


def test_a_checkpoint_of_an_older_version_is_named(tmp_path: Path) -> None:
    """Catches an old run whose resume fails without saying why, or starts again from the start."""
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, small_state(1))
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"format_version": 1}))
    (path / ".metadata").write_bytes(b"")
    latest = manager.latest()
    assert latest == path
    with pytest.raises(CheckpointError, match=r"has format 1, .* held a pickle.* finish that run"):
        manager.load(latest, small_state(0))


@pytest.mark.parametrize("field", ["values", "config_yaml", "files", "format_version"])
def test_a_foreign_meta_file_is_explained(tmp_path: Path, field: str) -> None:
    """Catches a KeyError from the middle of a resume."""
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, small_state(1))
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {field: [1]}))
    with pytest.raises(CheckpointError, match=f"meta.json has no {field}"):
        manager.load(path, small_state(0))


ROWS = torch.arange(15.0).view(5, 3)


def sharded_state(content: torch.Tensor, step: int) -> dict[str, Any]:
    """Five rows that the processes of this group share, and a whole tensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(content.clone(), mesh, [Shard(0)])
    return {"student": {"w": weight, "plain": content[0].clone()}, "step": step}


def save_rows(manager: CheckpointManager) -> None:
    manager.save(7, sharded_state(ROWS, 7))


def load_rows(manager: CheckpointManager) -> None:
    found = sharded_state(torch.zeros(5, 3), 0)
    latest = manager.latest()
    assert latest is not None
    manager.load(latest, found)
    assert torch.equal(found["student"]["w"].full_tensor(), ROWS)
    assert torch.equal(found["student"]["plain"], ROWS[0])
    assert found["step"] == 7


def in_ranks(folder: Path, size: int, act: Callable[[CheckpointManager], None]) -> Path:
    """Save or load one checkpoint with `size` processes; its path."""
    manager = CheckpointManager(folder / "checkpoints")
    in_processes(size, folder / f"{act.__name__} by {size}", lambda: act(manager))
    return folder / "checkpoints" / "student_update=000007"


def test_any_number_of_processes_reads_what_another_number_wrote(tmp_path: Path) -> None:
    """Catches shards at wrong rows, and a rank without rows: 5 rows over 4 ranks leave one none."""
    in_ranks(tmp_path, 4, save_rows)
    in_ranks(tmp_path, 1, load_rows)
    path = in_ranks(tmp_path, 2, load_rows)
    state: dict[str, Any] = {"student": {"w": ROWS * 0, "plain": ROWS[0] * 0}, "step": 0}
    CheckpointManager(path.parent).load(path, state)
    assert torch.equal(state["student"]["w"], ROWS)
    models, _ = read_training_checkpoint(path)
    assert torch.equal(models["student"]["w"].read(), ROWS)


def test_a_missing_piece_is_found(tmp_path: Path) -> None:
    """Catches a tensor of which one process's rows were never written: memory would fill them."""
    path = in_ranks(tmp_path, 2, save_rows)
    meta = json.loads((path / "meta.json").read_text())
    del meta["files"][TENSORS]
    (path / "meta.json").write_text(json.dumps(sealed(meta)))
    (path / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"student\.w has 6 of 15 values"):
        read_training_checkpoint(path)


def test_large_checkpoints_are_split_into_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a whole checkpoint put together in memory beside the run that it is of."""
    monkeypatch.setattr("selfforcing_dfd.weights.checkpoint_files.FILE_BYTES", 5000)
    manager = CheckpointManager(tmp_path)
    content = {str(i): torch.full((1000,), float(i)) for i in range(4)}
    path = manager.save(1, {"weights": content})
    assert len(list(path.glob("*.safetensors"))) == 4
    state = {"weights": {str(i): torch.zeros(1000) for i in range(4)}}
    manager.load(path, state)
    assert all(torch.equal(state["weights"][name], content[name]) for name in content)
