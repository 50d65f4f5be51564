"""Starting weights that are read after a network is sharded, so that no process holds all of them.

The network is built without memory and sharded. Then every process reads the tensors one by one
and keeps its own part of each. It holds its parts and one whole tensor at a time, instead of whole
networks: a teacher and a student of 14B in float32 and bfloat16 are 86 GB before they are sharded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from selfforcing_dfd.common import find_file
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.stages.base import Start
from selfforcing_dfd.weights.read import read_finite, transformer_on_meta
from selfforcing_dfd.weights.sources import StoredWeights, read_weights
from selfforcing_dfd.weights.tensors import add_to_fingerprint


@dataclass(frozen=True, slots=True)
class WholeWeights:
    """What a process saw of weights of which it keeps a part.

    norm: as `agreement.norms_of` of the whole network, but for rounding. fingerprint: as
    `model_fingerprint`.
    """

    norm: float
    fingerprint: str


def without_memory(start: Start, dtype: torch.dtype) -> WanTransformer:
    """The network of some weights on the meta device, to be filled later. Raises WeightsError."""
    weights = stored_weights(start)
    network = transformer_on_meta(weights, start.head_dim)
    network.register_to_config(**weights.identity.notes())
    nn.Module.to(network, dtype)
    return network


def is_without_memory(network: nn.Module) -> bool:
    return next(network.parameters()).is_meta


@torch.no_grad()
def fill(network: nn.Module, start: Start, device: torch.device) -> WholeWeights:
    """Read this process's part of a sharded network, in the dtype that the network has.

    Nothing is sent. Raises WeightsError as `load_network` does.
    """
    weights = stored_weights(start)
    nn.Module.to_empty(network, device=device)
    digest = hashlib.sha256()
    squares = []
    for name, parameter in network.named_parameters():
        tensor = read_finite(weights, name).to(parameter.dtype)
        add_to_fingerprint(digest, name, tensor)
        squares.append(torch.linalg.vector_norm(tensor, dtype=torch.float64).square())
        keep_part(tensor, parameter)
    return WholeWeights(float(torch.stack(squares).sum().sqrt()), digest.hexdigest())


def keep_part(whole: Tensor, parameter: Tensor) -> None:
    """Put a process's own part of a tensor into its parameter."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        whole = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


def stored_weights(start: Start) -> StoredWeights:
    return read_weights(find_file(start.path), start.entry)
