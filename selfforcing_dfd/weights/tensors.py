"""Tensors as one safetensors file, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfforcing_dfd.common import atomic_file
from selfforcing_dfd.weights.eight_bits import in_8_bits
from selfforcing_dfd.weights.stored import WeightsError, stored
from selfforcing_dfd.weights.write import Outgoing, write_safetensors


def save_weights(
    path: Path | str,
    weights: nn.Module | Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one safetensors file; a kill leaves the old file or the new one, a failure the old one.

    dtype: for floating-point tensors; None keeps their own; int8: float16, and matrices in 8 bits,
    see `weights.eight_bits`. Equal weights and metadata give equal
    bytes. With a process group all ranks call, the first one writes. Raises WeightsError for values
    that are not finite, and for those that the dtype cannot hold.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        for tensor in _named(weights).values():
            if isinstance(tensor, DTensor):
                tensor.full_tensor()  # the first rank needs our part
        return
    named = {name: whole(tensor) for name, tensor in _named(weights).items()}
    for name, tensor in named.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WeightsError(
                f"{name} is not finite, so {path} is not written; go on from a checkpoint before "
                "it, with a lower learning rate"
            )
    if dtype is torch.int8:
        named, dtype = in_8_bits(named), None
    tensors = {name: stored(name, tensor) for name, tensor in named.items()}
    with atomic_file(path) as partial:
        write_safetensors(partial, Outgoing(str(path), tensors, dtype), metadata or {})


def model_fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bits: which model it was, without storing it."""
    digest = hashlib.sha256()
    for name, tensor in _named(weights).items():
        add_to_fingerprint(digest, name, whole(tensor))
    return digest.hexdigest()


def add_to_fingerprint(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """One contiguous tensor on the CPU; see `model_fingerprint`."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    digest.update(f"{name} {list(tensor.shape)} {dtype}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def whole(tensor: Tensor) -> Tensor:
    """Contiguous on the CPU, with all shards of a DTensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _named(weights: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return weights.state_dict() if isinstance(weights, nn.Module) else weights
