"""Training in several processes of this machine, from a command that is one process itself."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd.common import EXIT_INTERRUPTED, Interrupted, UserError

if TYPE_CHECKING:
    from selfforcing_dfd.config import Config

PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent dies
SAVE_S = 900  # until processes that are asked to stop have saved their state


def trainer_on(processes: int) -> Callable[[Config, bool], None]:
    """What trains a run, in this process or in so many others."""
    if processes == 1:
        from selfforcing_dfd.cli.train import run

        return run

    def train(config: Config, resume: bool) -> None:
        launch(config, resume, processes)

    return train


def launch(config: Config, resume: bool, processes: int) -> None:
    """Train a run by torchrun. UserError where there are fewer GPUs, or if the run ends badly."""
    from selfforcing_dfd.stages.config_files import to_yaml

    check_gpus(config.run.device, processes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc_per_node", str(processes), "--shutdown-timeout", str(SAVE_S)]
        words += ["-m", "selfforcing_dfd", "train", "--config", str(path)]
        words += ["--resume"] if resume else []
        ended = wait_for(words)
    if ended in (EXIT_INTERRUPTED, -signal.SIGINT):
        raise Interrupted("training was stopped; the same command goes on")
    if ended:
        raise UserError(
            f"training in {processes} processes ended with exit code {ended}; what they said "
            "stands above. The same command goes on from the last checkpoint"
        )


def check_gpus(device: str, processes: int) -> None:
    """UserError where several processes would share a GPU."""
    from selfforcing_dfd.common import find_device

    if find_device(device, "--device").type != "cuda":
        return
    import torch

    found = torch.cuda.device_count()
    if found < processes:
        raise UserError(f"--gpus is {processes}, but this machine has {found}; use --gpus {found}")


def wait_for(words: list[str]) -> int:
    """A program's exit code. Ctrl-C reaches it as well, and it is given the time to save."""
    interrupted = False
    with subprocess.Popen(words, preexec_fn=end_with_parent) as program:
        while True:
            try:
                code = program.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
    return EXIT_INTERRUPTED if interrupted and code else code


def end_with_parent() -> None:
    """In a process that begins: a killed parent ends it. Elsewhere than on Linux it lives on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
