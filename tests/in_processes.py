"""Work for other processes, and processes that are killed."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import time
from collections.abc import Callable
from typing import Any

import torch


def doubled(number: int) -> tuple[int, int]:
    """Twice the number, and with how many threads PyTorch computes; some take longer."""
    time.sleep(0.02 * (number % 3))
    return 2 * number, torch.get_num_threads()


def run_until_killed(target: Callable[..., None], *args: Any) -> None:
    """Call it in a fork of this process, in which it kills itself.

    Garbage goes first: a fork that frees a video's decoder waits for threads that it has not.
    """
    gc.collect()
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
