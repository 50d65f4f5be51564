"""Functions in several processes of one gloo group."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 300  # a busy machine takes twenty times as long as a free one


def in_processes(size: int, folder: Path, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns in each of `size` processes, which are forks of this one.

    folder: an empty one, for their messages. Raises the first error with its rank.
    """
    folder.mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=_child, args=(rank, size, folder, work)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    for rank, process in enumerate(processes):
        error = folder / f"error{rank}"
        if process.is_alive():
            process.kill()
            process.join()
        if error.exists():
            raise AssertionError(f"rank {rank}: {error.read_text()}")
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(size)]


def _child(rank: int, size: int, folder: Path, work: Callable[[], Any]) -> None:
    gc.disable()  # what the parent left behind is not to be collected in a fork: it crashed
    warnings.simplefilter("ignore")
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        torch.save(work(), folder / f"result{rank}")
        dist.barrier()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
