"""What all processes of a run do together; one process without a group does it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

VERY_LONG = timedelta(days=30)


def are_many() -> bool:
    """Whether other processes take part."""
    return dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the process that does what is done once."""
    return not dist.is_initialized() or dist.get_rank() == 0


@cache
def patient_group() -> dist.ProcessGroup | None:
    """All processes, for waiting on what may take hours: data, reports. None is the usual group.

    A process that fails or dies ends the others all the same; see `training/failure.py`.
    """
    if not are_many():
        return None
    return dist.new_group(backend="gloo", timeout=VERY_LONG)


@cache
def group_of_saves() -> dist.ProcessGroup | None:
    """All processes, for a thread of each that saves; all call together, before the threads begin.

    None where there is no group. Threads need one of their own: messages of one group must be sent
    in one order.
    """
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=VERY_LONG)


@cache
def group_of_neighbours(size: int, timeout_s: float) -> dist.ProcessGroup:
    """The group of this process among groups of `size` neighbours; all processes call together."""
    own, _ = dist.new_subgroups(size, timeout=timedelta(seconds=timeout_s))
    assert own is not None, "the world was divided into groups of another size"
    return own


def forget_groups() -> None:
    """Forget the groups of processes that are leaving each other."""
    patient_group.cache_clear()
    group_of_saves.cache_clear()
    group_of_neighbours.cache_clear()


def on_first_rank(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do something once; all ranks get its result, or raise its error.

    group: of all ranks, to wait in; None is the patient one.
    """
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group or patient_group())
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def raise_together(action: Callable[[], T], kind: type[Exception]) -> T:
    """Do something on every rank; where one of them meets an error of this kind, all raise it.

    The error of the lowest rank counts. Other errors are left to `failure.ending_together`.
    """
    if not are_many():
        return action()
    met: Exception | None = None
    try:
        result = action()
    except kind as error:
        met = error
    (number,) = add_up([met is not None])
    if number:
        raise next(error for error in gather_objects(met) if error is not None)
    return result


def gather_entries(own: dict[str, Any]) -> dict[str, Any]:
    """The entries of all ranks.

    ValueError, on all of them, if one key has different contents on two ranks.
    """
    merged: dict[str, Any] = {}
    for rank, entries in enumerate(gather_objects(own)):
        for key in sorted(entries.keys() & merged.keys()):
            if entries[key] != merged[key]:
                raise ValueError(
                    f"{key} on rank {rank} is not what other ranks have; put the rank in the key"
                )
        merged |= entries
    return merged


def gather_objects(own: T) -> list[T]:
    """What each rank has, in the order of ranks; on all ranks."""
    if not dist.is_initialized():
        return [own]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return ranks


def gather_to_first(own: list[T]) -> list[T]:
    """The lists of all ranks as one, on the first rank; empty on others.

    Waits as long as it takes.
    """
    if not are_many():
        return own
    ranks: list[Any] | None = [None] * dist.get_world_size() if is_first() else None
    dist.gather_object(own, ranks, group=patient_group())
    return [each for of_rank in ranks or [] for each in of_rank]


def gather(own: Tensor) -> Tensor:
    """[R, ...] on the CPU: a tensor of the same shape from each rank; on all ranks."""
    own = own.detach().cpu().contiguous()
    if not are_many():
        return own[None]
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    return torch.stack(ranks)


def add_up(own: Sequence[float]) -> list[float]:
    """Sums over ranks."""
    return gather(torch.tensor(own, dtype=torch.float64)).sum(0).tolist()
