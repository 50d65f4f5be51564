"""A journey that is killed at any moment goes on, and ends where it would have ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfforcing_dfd.common import sha256_of, shipped
from selfforcing_dfd.tiny.world import write_clips

LONGEST_S = 600
MOMENTS = (
    "configs/student.yaml",  # before anything is packed
    "shards/index.json",  # packed, and perhaps not yet noted
    "student/checkpoints/*/meta.json",  # while training
    "samples/before/*.mp4",  # while measuring
    "export/README.md",  # exported, and perhaps not yet noted
)


def command(videos: Path, out: Path) -> list[str]:
    student = str(shipped("assets/tiny/student.safetensors"))
    words = ["distil", student, str(videos), "--out", str(out), "--samples", "2"]
    words += ["--device", "cpu", "run.student_updates=3", "batch.size=1", "batch.micro=1"]
    return [sys.executable, "-m", "selfforcing_dfd", *words, "checkpoint.every=1"]


def start(videos: Path, out: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command(videos, out), env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL
    )


@pytest.mark.soak
def test_killed_at_every_step_it_ends_with_the_same_student(tmp_path):
    """Catches a step that a kill leaves half done, and that is then believed to be whole."""
    videos = tmp_path / "videos"
    write_clips(videos, 3, 7)
    assert start(videos, tmp_path / "whole").wait(LONGEST_S) == 0
    killed = tmp_path / "killed"
    for moment in MOMENTS:
        process = start(videos, killed)
        deadline = time.monotonic() + LONGEST_S
        while not any(killed.glob(moment)) and time.monotonic() < deadline:
            assert process.poll() is None, f"it ended before {moment}"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(videos, killed).wait(LONGEST_S) == 0
    for name in ("student/student.safetensors", "export/transformer/config.json"):
        assert sha256_of(killed / name) == sha256_of(tmp_path / "whole" / name), name
    numbers = [
        json.loads((folder / "evaluation.json").read_text())["means"]
        for folder in (killed, tmp_path / "whole")
    ]
    assert numbers[0] == numbers[1]
