"""What all processes of a run do together; one process without a group does it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_first_rank(action: Callable[[], T]) -> T:
    """Do something once; all ranks get its result, or raise its error."""
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def gather_entries(own: dict[str, Any]) -> dict[str, Any]:
    """The entries of all ranks.

    ValueError, on all of them, if one key has different contents on two ranks.
    """
    if not dist.is_initialized():
        return own
    ranks: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    merged: dict[str, Any] = {}
    for rank, entries in enumerate(ranks):
        for key in sorted(entries.keys() & merged.keys()):
            if entries[key] != merged[key]:
                raise ValueError(
                    f"{key} on rank {rank} is not what other ranks have; put the rank in the key"
                )
        merged |= entries
    return merged
