"""One run at a time writes to a folder, which is locked meanwhile."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_script

from selfforcing_dfd.training.exclusive import LOCK_FILE, ExclusiveError, lock_folders
from tests.training.conftest import arguments

HOLD = """
import sys
from selfforcing_dfd.training.exclusive import lock_folders

with lock_folders(*sys.argv[1:]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(*folders: Path) -> subprocess.Popen[str]:
    """Another process that holds the folders until it is killed or its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *map(str, folders)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def train(world: Path, out: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and errors of `python train.py` in a process of its own."""
    (out / "one.yaml").write_text("run: {stage: dfd, name: one}\n")
    settings = [*arguments(world, out), "run.student_updates=1", *overrides]
    end = run_script(out, "train.py", "--config", str(out / "one.yaml"), *settings)
    return end.code, end.errors


def test_a_second_process_on_a_run_folder_is_refused(world: Path, tmp_path: Path) -> None:
    """Catches a requeued job that kills the healthy one: both delete each other's checkpoints."""
    folder = tmp_path / "runs" / "one"
    with hold(folder) as other:
        code, errors = train(world, tmp_path, "--resume")
        assert code == 2
        assert "\n" not in errors.strip()
        assert f"{folder} is in use by process {other.pid} on {socket.gethostname()}" in errors
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("held", ["one", "one/second"])
def test_an_arm_and_its_comparison_exclude_each_other(
    world: Path, tmp_path: Path, held: str
) -> None:
    """Catches a comparison that only locks its own folder, or only those of its arms."""
    folder = tmp_path / "runs" / held
    with hold(folder):
        code, errors = train(world, tmp_path, "arms={first: [], second: []}")
    assert code == 2
    assert f"{folder} is in use by" in errors
    assert not list(tmp_path.glob("runs/one/first/*.safetensors"))


def test_kill_nine_leaves_no_lock(tmp_path: Path) -> None:
    """Catches a lock that is a file's existence: after a kill, somebody would have to delete it."""
    with hold(tmp_path) as other:
        with pytest.raises(ExclusiveError, match=f"in use by process {other.pid} on"):
            lock_folders(tmp_path).__enter__()
        other.kill()
        other.wait()
        assert (tmp_path / LOCK_FILE).exists()
        with lock_folders(tmp_path):
            pass


def test_a_folder_is_free_again_after_an_error(tmp_path: Path) -> None:
    """Catches a lock that a failed run keeps, and the first of two folders held for ever."""
    with pytest.raises(RuntimeError, match="in the body"), lock_folders(tmp_path / "a"):
        raise RuntimeError("in the body")
    with lock_folders(tmp_path / "b"):
        with pytest.raises(ExclusiveError, match=f"{tmp_path / 'b'} is in use"):
            lock_folders(tmp_path / "a", tmp_path / "b").__enter__()
        with lock_folders(tmp_path / "a"):
            pass
    with lock_folders(tmp_path / "a", tmp_path / "a", tmp_path / "b" / ".." / "a"):
        pass
