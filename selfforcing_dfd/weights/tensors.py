"""Tensors as one safetensors file, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfforcing_dfd.common import atomic_file


def save_weights(
    path: Path | str,
    weights: nn.Module | Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one safetensors file; a kill leaves the old file or the new one, a failure the old one.

    dtype: for floating-point tensors; None keeps their own. With a process group all ranks call,
    the first one writes.
    """
    tensors = {name: whole(tensor) for name, tensor in _named(weights).items()}
    if dtype is not None:
        tensors = {name: _cast(tensor, dtype) for name, tensor in tensors.items()}
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    with atomic_file(path) as partial:
        save_file(tensors, partial, dict(metadata or {}))


def model_fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bits: which model it was, without storing it."""
    digest = hashlib.sha256()
    for name, tensor in _named(weights).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {list(tensor.shape)} {dtype}".encode())
        digest.update(whole(tensor).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def whole(tensor: Tensor) -> Tensor:
    """Contiguous on the CPU, with all shards of a DTensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _named(weights: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return weights.state_dict() if isinstance(weights, nn.Module) else weights


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
