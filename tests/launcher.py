"""Processes of one run, started and watched as a launcher does it, some of which may fail."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import torch.distributed as dist

from selfforcing_dfd.cli.errors import guarded
from selfforcing_dfd.processes.failure import ending_together
from selfforcing_dfd.processes.world import World, joined

LIMIT_S = 120
SPARE_S = 10  # before the end, for a process that hangs to say where


def launch(
    size: int, folder: Path, work: Callable[[World], None], timeout_s: float = 60
) -> list[tuple[int, str]]:
    """(exit code, errors) of each of `size` processes, which a launcher would start like this."""
    # as torchrun does, so that the store lives on when the first rank dies; without libuv, whose
    # epoll would be shared with the forks: once it left one of them without answers
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)
    fork = multiprocessing.get_context("fork")
    # no rank calls before all are there: a fork made while the store's thread answers one inherits
    # that thread's locks, and waited for them for ever
    all_there = fork.Event()
    processes = [
        fork.Process(
            target=_child, args=(rank, size, store.port, folder, work, timeout_s, all_there)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    all_there.set()
    deadline = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
    where = "\n".join((folder / f"errors{rank}").read_text() for rank in hanging)
    assert not hanging, f"ranks {hanging} hang:\n{where}"
    return [
        (process.exitcode or 0, (folder / f"errors{rank}").read_text().strip())
        for rank, process in enumerate(processes)
    ]


def _child(
    rank: int,
    size: int,
    port: int,
    folder: Path,
    work: Callable[[World], None],
    timeout_s: float,
    all_there: Event,
) -> None:
    gc.disable()  # what the parent left behind is not to be collected in a fork: it crashed
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    meeting["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), **meeting}
    sys.stderr = (folder / f"errors{rank}").open("w", buffering=1)
    faulthandler.dump_traceback_later(LIMIT_S - SPARE_S, file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    all_there.wait()

    def run(options: argparse.Namespace) -> None:
        with ending_together(), joined("cpu", timeout_s) as world:
            work(world)

    try:
        code = guarded(argparse.Namespace(command=run, traceback=False))
    except SystemExit as end:
        code = int(end.code or 0)
    os._exit(code)


def said(ends: list[tuple[int, str]]) -> list[str]:
    """The lines of all ranks that are ours; gloo and torch write some, too."""
    lines = [line for _, errors in ends for line in errors.splitlines()]
    return [line for line in lines if line.startswith("error") or "stopped" in line]
