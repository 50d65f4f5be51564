"""The processes that train one run together: who they are, and how they meet and part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

from selfforcing_dfd.common import UserError, find_device
from selfforcing_dfd.processes.failure import launched, meeting_point
from selfforcing_dfd.processes.ranks import forget_groups


@dataclass(frozen=True, slots=True)
class World:
    """This process among all that train together.

    sequence_ranks: neighbours that share each sequence. They read the same samples, draw the same
    noise, and compute different tokens.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sequence_ranks: int = 1

    @property
    def data_size(self) -> int:
        """Into how many parts the samples of an update are divided."""
        return self.size // self.sequence_ranks

    @property
    def data_rank(self) -> int:
        """Which of these parts this process computes."""
        return self.rank // self.sequence_ranks

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once: logs, checkpoints' last file."""
        return self.rank == 0


def find_world(device: str) -> World:
    """This process among those of the process group; alone where there is none.

    device: `run.device`. Raises UserError for a device that is not there, and for one GPU that all
    processes would share.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return World(device=find_device(device, "run.device"))
    found = find_device(device, "run.device")
    if found.type == "cuda" and found.index is not None:
        raise UserError(
            f"run.device is {device}, but {dist.get_world_size()} processes train; "
            "use run.device=cuda, and each process takes a GPU of its own"
        )
    if found.type == "cuda":
        found = find_device(f"cuda:{PartialState().local_process_index}", "run.device")
    return World(dist.get_rank(), dist.get_world_size(), found)


@contextmanager
def joined(device: str, timeout_s: float) -> Iterator[World]:
    """Meet the other processes that torchrun or accelerate started, until the `with` ends.

    A process that was started alone makes no group: gloo would look up the host's name, which can
    take seconds or fail, and a program that uses this package may have a group of its own.
    timeout_s: a process that waits longer for the others gives up.
    """
    if not launched() or dist.is_initialized():
        yield find_world(device)
        return
    on_cpu = find_device(device, "run.device").type == "cpu"
    rank, size, store = meeting_point()
    dist.init_process_group(
        "gloo" if on_cpu else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    PartialState(cpu=on_cpu)  # knows the device, for itself and for accelerate's trackers
    # after an error the process ends, and would wait for messages if it took leave
    yield find_world(device)
    leave()


def leave() -> None:
    """End the process group when all have come here, and what was built on it."""
    dist.barrier()  # nobody leaves while another still writes
    forget_groups()
    PartialState._reset_state()
    dist.destroy_process_group()


def join_alone() -> None:
    """A process group of this process alone, unless there is a group already."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def processes_of_node() -> int:
    """How many processes the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
