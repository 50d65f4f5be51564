"""One command that trains in several processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from selfforcing_dfd.cli import launch
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import UserError
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.streaming.load import TINY_DMD_STUDENT
from selfforcing_dfd.tiny.world import write_clips
from selfforcing_dfd.weights.read import load_network
from selfforcing_dfd.weights.write import convert

SMALL = ("--samples", "1", "--device", "cpu", "batch.size=2", "batch.micro=1")
SMALL += ("checkpoint.every=1", "checkpoint.export=float32")


def test_fewer_gpus_than_processes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes that share a GPU, out of memory after an hour of packing."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--gpus is 4, but this machine has 2; use --gpus 2"):
        launch.check_gpus("cuda", 4)
    launch.check_gpus("cuda", 2)
    launch.check_gpus("cpu", 4)


@pytest.mark.parametrize(("code", "known"), [(3, "exit code 3"), (1, "exit code 1")])
def test_training_that_ends_badly_is_named(
    code: int, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a journey that goes on with the student of a run that failed."""
    monkeypatch.setattr(launch, "wait_for", lambda words: code)
    config = load_config("tiny/dmd.yaml", ["run.device=cpu"])
    with pytest.raises(UserError, match=f"training in 2 processes ended with {known}"):
        launch.launch(config, True, 2)


def test_a_program_ends_with_its_parent(tmp_path: Path) -> None:
    """Catches training that goes on after kill -9 of the command, and holds its folder."""
    program = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
    code = (
        "import sys; from selfforcing_dfd.cli.launch import wait_for; "
        f"wait_for([sys.executable, '-c', {program + 'time.sleep(60)'!r}])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    number = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while psutil.pid_exists(number) and psutil.Process(number).status() != "zombie":
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.soak
def test_two_processes_make_the_student_of_one(tmp_path: Path) -> None:
    """Catches processes that each train a student, and a stop that loses the run."""
    convert(TINY_DMD_STUDENT, tmp_path / "my_student.pt", "self-forcing")
    write_clips(tmp_path / "my_videos", 4, 7)
    words = ["distil", str(tmp_path / "my_student.pt"), str(tmp_path / "my_videos"), *SMALL]
    updates = "run.student_updates=3"
    one = tmp_path / "one"
    assert main([*words, updates, "--out", str(one)]) == 0
    two = tmp_path / "two"
    command = [*words, updates, "--out", str(two), "--gpus", "2"]
    stopped = subprocess.Popen([sys.executable, "-m", "selfforcing_dfd", *command])
    deadline = time.monotonic() + 240
    most = 0
    while not list(two.glob("student/checkpoints/student_update=*/meta.json")):
        assert time.monotonic() < deadline
        most = max(most, len(trainers()))
        time.sleep(0.05)
    assert most == 2
    os.kill(stopped.pid, signal.SIGKILL)
    stopped.wait()
    assert not (two / "export").exists()
    while trainers():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert main(command) == 0
    journal = [json.loads(line) for line in (two / "student" / "journal.jsonl").open()]
    begun = [line["student_update"] for line in journal if line["event"] == "training"]
    assert len(begun) == 2
    assert begun[0] == 0 < begun[1]
    assert (two / "export" / "README.md").is_file()
    wanted = load_network(one / "student" / "student.safetensors").state_dict()
    found = load_network(two / "student" / "student.safetensors").state_dict()
    start = load_network(TINY_DMD_STUDENT).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in found.items())
    for name, value in found.items():
        # sums over two processes are formed in another order; see training/test_many_processes
        torch.testing.assert_close(value, wanted[name], rtol=2e-3, atol=1e-4)


def trainers() -> list[int]:
    """Processes that torchrun started for the command, on this test's behalf."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            words = each.cmdline()
            if "run.yaml" in " ".join(words) and "torch.distributed.run" not in words:
                found.append(each.pid)
    return found
