"""The Slurm script, with Slurm's commands replaced by small ones that write down how they ran."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs/slurm/train.sbatch"
COMMANDS = {
    "srun": 'shift; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> "$LOG"; fi',
    "torchrun": """echo "$@" >> "$LOG"
trap 'echo saved >> "$LOG"; exit 130' TERM
echo ready >> "$LOG"
for _ in $(seq "${SECONDS_TO_TRAIN:-100}"); do sleep 0.1; done""",
}
DEADLINE_S = 60


class Job:
    """The script as Slurm starts it. log: what the commands wrote."""

    def __init__(self, folder: Path, **variables: str):
        for name, body in COMMANDS.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)
        self.log = folder / "log"
        own = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
        own |= {"SLURM_GPUS_ON_NODE": "4", "LOG": str(self.log)} | variables
        path = f"{folder}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), "dfd_ar.yaml", "model.shard_ranks=4"],
            env={**os.environ, **own, "PATH": path},
        )

    def wait_for(self, word: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not (self.log.exists() and word in self.log.read_text()):
            assert time.monotonic() < end, f"{word} never came"
            time.sleep(0.05)


def test_it_is_a_script() -> None:
    """Catches a typing error that only Slurm would find."""
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_it_goes_on_on_all_machines(tmp_path: Path) -> None:
    """Catches a job that begins anew, or on one machine, and an exit code that is lost."""
    job = Job(tmp_path, SECONDS_TO_TRAIN="1")
    assert job.process.wait(DEADLINE_S) == 0
    line = job.log.read_text().splitlines()[0]
    for part in ("--nnodes 2", "--nproc_per_node 4", "--rdzv_endpoint node1:29500"):
        assert part in line
    assert line.endswith("train.py --config dfd_ar.yaml --resume model.shard_ranks=4")
    assert "requeue" not in job.log.read_text()


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_it_saves_before_the_time_limit(sent: signal.Signals, requeued: bool, tmp_path: Path):
    """Catches a run that is killed with unsaved updates, and a job that is not queued again.

    A job that somebody cancelled must stay away.
    """
    job = Job(tmp_path)
    job.wait_for("ready")
    job.process.send_signal(sent)
    code = job.process.wait(DEADLINE_S)
    assert "saved" in job.log.read_text(), "the processes were not asked to save"
    assert ("requeue 7" in job.log.read_text()) == requeued
    assert (code == 0) == requeued
