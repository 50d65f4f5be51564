"""Do all processes train the same run? A cheap check that names those that do not.

Processes derive from settings and clock what they must do alike (whose turn it is, exit steps,
coins), and tell each other nothing. So one that was started with another file, or whose copy of the
weights has drifted, would not be noticed. It would wait for the others at another place, or train
something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from selfforcing_dfd.common import UserError
from selfforcing_dfd.processes.ranks import are_many, gather_objects
from selfforcing_dfd.training.compare import listed

AGREE_EVERY = 10
"""Student updates from one check to the next; a check sends a few hundred bytes."""


class DisagreementError(UserError):
    """Processes of one run differ in what must be the same; the message names the ranks."""


def require_agreement(facts: Mapping[str, Any]) -> None:
    """DisagreementError, on all ranks, unless ranks that have a fact of a name have the same one.

    facts: numbers and texts by what they are, of this rank.
    """
    if not are_many():
        return
    ranks = gather_objects(dict(facts))
    lines = []
    for name in dict.fromkeys(name for own in ranks for name in own):
        found = {rank: str(own[name]) for rank, own in enumerate(ranks) if name in own}
        ((common, _),) = Counter(found.values()).most_common(1)
        differing = [rank for rank, fact in found.items() if fact != common]
        lines += [f"{name}: rank {rank} {found[rank]}, others {common}" for rank in differing]
    if lines:
        raise DisagreementError(
            f"the processes do not train the same run:{listed(lines)}\n"
            "Start all of them with the same command, version, weights and data, and --resume"
        )


def norms_of(networks: Mapping[str, nn.Module]) -> dict[str, float]:
    """The norm of each network's weights in this process, by what they are.

    Of sharded weights by part: those that hold the same part are copies of each other.
    """
    norms = {}
    for role, network in networks.items():
        parts = list(network.parameters())
        squares = [_local(part).double().square().sum() for part in parts]
        norm = float(torch.stack(squares).sum().sqrt())
        norms[f"norm of the {role}'s weights{_part_of(parts[0])}"] = norm
    return norms


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part_of(tensor: torch.Tensor) -> str:
    """Which part of the weights this process holds; the last axis of a mesh counts parts."""
    if not isinstance(tensor, DTensor):
        return ""
    return f", part {tensor.device_mesh.get_local_rank(tensor.device_mesh.ndim - 1)}"
