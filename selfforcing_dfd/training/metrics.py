"""What is logged of an update: numbers over the samples of all processes, and clips to look at."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from selfforcing_dfd.processes.ranks import gather
from selfforcing_dfd.processes.world import World
from selfforcing_dfd.stages.base import StageLoss

SIGMA_BINS = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)
NUM_WATCHED = 16
"""Clips of an update that are compared with the data; more would cost memory and say little."""


class Watch(Protocol):
    """Looks at the student's clips beside real ones of the same captions, both [B, F, C, H, W]."""

    def __call__(self, generated: Tensor, real: Tensor) -> dict[str, float]:
        """Numbers to log."""
        ...

    def pictures(self, generated: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Images [N, H, W, 3] uint8 by name; none where latents cannot be shown."""
        ...


def values_of_all(parts: Sequence[StageLoss], world: World) -> dict[str, Tensor]:
    """Per-sample numbers of an update by name, in the order of positions; on all ranks.

    parts: of this process's micro-batches. Processes that share a sequence have the same ones.
    """
    names = list(parts[0].values)
    own = [torch.stack([part.values[name].float().cpu() for name in names]) for part in parts]
    rows = gather(torch.stack(own))[:: world.sequence_ranks]  # [R, micro-batches, names, B]
    return dict(zip(names, rows.permute(2, 1, 0, 3).flatten(1), strict=True))


def summarise(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of per-sample values [B].

    Also by branch, where `dfd` marks rows, and by sigma bin, where sigma is known.
    """
    some = next(iter(values.values()))
    masks = {"": torch.ones(some.shape, dtype=torch.bool)}
    if "dfd" in values:
        masks |= {"/dfd": values["dfd"] > 0, "/dmd": values["dmd"] > 0}
    if "sigma" in values:
        for low, high in itertools.pairwise(SIGMA_BINS):
            masks[f"/sigma<={high:g}"] = (values["sigma"] > low) & (values["sigma"] <= high)
    means = {}
    for suffix, mask in masks.items():
        for name, value in values.items():
            splits_itself = suffix and name in ("dfd", "dmd", "sigma")
            if mask.any() and not splits_itself:
                means[f"{name}{suffix}"] = float(value[mask].mean())
    return means


def watched_clips(parts: Sequence[StageLoss], world: World) -> tuple[Tensor, Tensor] | None:
    """(student's samples, data) of the update's first NUM_WATCHED positions, [N, F, C, H, W].

    On the first rank; None on others, and where the update made no samples or has no data.
    """
    pairs = [
        torch.stack([part.generated, part.real])
        for part in parts
        if part.generated is not None and part.real is not None
    ]
    if not pairs:
        return None
    micro = pairs[0].shape[1]
    first: list[Tensor] = []
    for n, own in enumerate(pairs):
        for data_rank in range(world.data_size):
            if (n * world.data_size + data_rank) * micro < NUM_WATCHED:
                first += bring(own, data_rank * world.sequence_ranks, world)
    if not world.is_first:
        return None
    clips = torch.cat(first, dim=1)[:, :NUM_WATCHED]
    return clips[0], clips[1]


def bring(own: Tensor, rank: int, world: World) -> list[Tensor]:
    """What one rank has, for the first rank; nothing for others. All tensors have one shape."""
    if rank == 0:
        return [own]
    if world.rank == rank:
        dist.send(own.cpu().contiguous(), 0)
    if not world.is_first:
        return []
    brought = torch.empty_like(own, device="cpu")
    dist.recv(brought, rank)
    return [brought.to(own.device)]
