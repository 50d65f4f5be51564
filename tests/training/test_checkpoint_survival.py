"""Checkpoints against other settings, full disks, interruptions and kill -9."""

import gc
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_script
from test_checkpoint import make_network, names, small_state

from selfforcing_dfd import rng
from selfforcing_dfd.config import EMAConfig
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.same_run import check_config
from selfforcing_dfd.weights.checkpoint_files import CheckpointError


def test_other_settings_are_listed(tmp_path: Path) -> None:
    """Catches a resume that goes on with another learning rate than before, without a word."""
    config = {
        "optim": {"student": {"lr": 1e-5, "betas": (0.0, 0.999)}},
        "run": {"out": "a", "updates": 40},
    }
    path = CheckpointManager(tmp_path, config=config).save(1, small_state(1))
    check_config(
        path, {**config, "run": {"out": "b", "updates": 80}}, allowed={"run.out", "run.updates"}
    )
    check_config(path, {**config, "run": {"out": "b", "updates": 80}}, allowed={"run"})
    changed = {
        "optim": {"student": {"lr": 2e-5, "betas": (0.0, 0.999)}},
        "run": {"out": "b"},
        "ema": {"decay": 0.7},  # which was the default before, as it is not in the checkpoint
    }
    with pytest.raises(CheckpointError) as error:
        check_config(path, changed, allowed={"run.out"})
    lines = str(error.value).split("\n")
    assert [line.strip() for line in lines[1:-1]] == [
        "optim.student.lr: checkpoint 1e-05, now 2e-05",
        "run.updates: checkpoint 40, now absent",
        f"ema.decay: checkpoint {EMAConfig().decay}, now 0.7",
    ]
    assert "start a new run in another folder from exported weights" in lines[-1]
    assert lines[-1].endswith("May change on resume: run.out")


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    """Catches a pickled optimizer or numpy scalar in a checkpoint for later versions."""
    manager = CheckpointManager(tmp_path)
    model = make_network("a", 4)
    with pytest.raises(
        CheckpointError,
        match=r"optimizer.param_groups is a list; .*optimizer_state\(model, optimizer\)",
    ):
        manager.save(1, {"optimizer": torch.optim.AdamW(model.parameters())})
    with pytest.raises(CheckpointError, match=r"two entries are called a.b"):
        manager.save(1, {"a": {"b": 1}, "a.b": 2})
    assert names(tmp_path) == []


def test_an_interrupted_save_leaves_nothing_behind(tmp_path: Path) -> None:
    """Catches Ctrl-C swallowed by DCP's wrapper, and gigabytes left under a hidden name."""
    manager = CheckpointManager(tmp_path)
    manager.save(1, small_state(1))

    class Interrupting(dict[str, Any]):
        def __len__(self) -> int:
            raise KeyboardInterrupt

    manager.config = {"run": 1}
    manager.models = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        manager.save(2, small_state(2))
    assert names(tmp_path) == ["student_update=000001"]


SAVE_UNTIL_FULL = """
import json, resource, signal, sys, torch
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.weights.checkpoint_files import CheckpointError
folder, limit = sys.argv[1:]
manager = CheckpointManager(folder, keep=2)
def state(size):
    return {"weights": {str(i): torch.full((size,), 1.0) for i in range(20)}, "step": 7}
manager.save(1, state(1000))
if limit == "file size":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
notes = {"notes": {str(i): "x" * 100 for i in range(20_000)}}  # fills meta.json, written last
for too_big in (state(30_000), notes):
    try:
        manager.save(2, too_big)
    except CheckpointError as error:
        left = sorted(path.name for path in manager.folder.iterdir())
        print(json.dumps([str(error), str(manager.latest()), left]))
manager.load(manager.latest(), state(1000))
manager.save(3, state(1000))
"""


def may_mount() -> bool:
    """Whether this user may mount a small disk of its own, seen by its own process only."""
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("limit", ["file size", *(["disk"] if may_mount() else [])])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, limit: str) -> None:
    """Catches deleting old ones to make room, and leftovers that keep the disk full."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if limit == "disk":
        mount = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
        command = [sys.executable, "-c", SAVE_UNTIL_FULL, str(folder), limit]
        in_mount = ["unshare", "-rm", "sh", "-c", mount, str(folder), *command]
        printed = subprocess.run(in_mount, capture_output=True, text=True, check=True).stdout
    else:
        (tmp_path / "program.py").write_text(SAVE_UNTIL_FULL)
        end = run_script(tmp_path, str(tmp_path / "program.py"), str(folder), limit)
        assert end.code == 0, end.errors
        printed = end.printed
    reports = [json.loads(line) for line in printed.splitlines()]
    assert len(reports) == 2
    for message, latest, left in reports:
        assert (
            "earlier checkpoints are untouched: the disk is full; free some space or keep fewer"
            in message
        )
        assert latest.endswith("student_update=000001")
        assert left == ["student_update=000001"]


def saved_state(step: int) -> dict[str, Any]:
    return {
        "weights": {str(i): torch.full((100_000,), float(step)) for i in range(5)},
        "step": step,
    }


def save_for_ever(folder: Path, reports: int) -> None:
    """Go on from the newest checkpoint, save one after the other, and report each step.

    reports: a file descriptor.
    """
    gc.disable()  # what the parent left behind is not to be collected in a fork: it crashed
    manager = CheckpointManager(folder, keep=2)
    last = manager.latest()
    current = saved_state(0)
    if last is not None:
        manager.load(last, current)
        assert current["weights"]["0"].eq(current["step"]).all()
    for step in itertools.count(current["step"] + 1):
        manager.save(step, saved_state(step))
        os.write(reports, f"{step}\n".encode())


def kill_while_saving(folder: Path, delay_s: float) -> int:
    """The last step that a process, killed `delay_s` after its first save, called saved."""
    read_end, write_end = os.pipe()
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=save_for_ever, args=(folder, write_end))
    process.start()
    os.close(write_end)
    with os.fdopen(read_end) as reports:
        first = next(reports)
        time.sleep(delay_s)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the saving process failed by itself"
        return int([first, *reports][-1])


def test_kill_nine_while_saving_loses_no_finished_checkpoint(tmp_path: Path) -> None:
    """Catches writing in place, a rename before all is written, and deleting before the rename."""
    delays_s = rng.uniform((6,), 0, "kill").mul(0.2).tolist()
    interrupted = 0
    for delay_s in delays_s:
        reported = kill_while_saving(tmp_path, delay_s)
        interrupted += any(name.startswith(".tmp-") for name in names(tmp_path))
        manager = CheckpointManager(tmp_path)
        latest = manager.latest()
        assert latest is not None
        state = saved_state(0)
        manager.load(latest, state)
        assert state["step"] >= reported
        assert all(tensor.eq(state["step"]).all() for tensor in state["weights"].values())
    assert interrupted >= 2, "too few kills hit a save; the test proves nothing"
    CheckpointManager(tmp_path).save(10**6, small_state(10**6))
    assert not any(name.startswith(".tmp-") for name in names(tmp_path))
