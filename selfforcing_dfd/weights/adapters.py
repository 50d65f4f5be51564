"""Files of adapters, and weights with an adapter worked in.

A file holds `transformer.blocks.0.attn1.to_q.lora_A.weight` and so on, as diffusers' pipelines
write and read it. What it adds is B A x, without a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from selfforcing_dfd.models.adapted import AdaptedNetwork
from selfforcing_dfd.processes.ranks import is_first
from selfforcing_dfd.weights.stored import WeightsError
from selfforcing_dfd.weights.tensors import save_weights, whole

PREFIX = "transformer."


def read_adapter(path: Path) -> dict[str, Tensor]:
    """An adapter's tensors by their names in `AdaptedNetwork`. Raises WeightsError."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not readable as a safetensors file: {error}") from error
    other = [name for name in tensors if not name.startswith(PREFIX) or "alpha" in name]
    if other:
        raise WeightsError(
            f"{path} is no adapter that a run exported: it holds {other[0]}. Name a file such as "
            "student_adapter.safetensors; adapters of others can be loaded in streams alone"
        )
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def save_adapter(
    path: Path, network: AdaptedNetwork, metadata: Mapping[str, str], dtype: torch.dtype
) -> None:
    """Write a network's adapter; with a process group all ranks call together.

    dtype: int8 is taken as float16. Raises WeightsError for values that are not finite.
    """
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in network.state_dict().items()}
    save_weights(path, tensors, metadata, torch.float16 if dtype is torch.int8 else dtype)


@torch.no_grad()
def merged(network: AdaptedNetwork) -> dict[str, Tensor]:
    """The weights with the adapter worked in, W + B A, whole and on the CPU.

    With a process group all ranks call together; others than the first get nothing.
    """
    pairs = dict(network.named_parameters())
    found = {}
    for name, parameter in AdaptedNetwork(network.base).named_parameters():
        weight = whole(parameter)
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in pairs:
            a = whole(pairs[f"{layer}.lora_A.weight"])
            b = whole(pairs[f"{layer}.lora_B.weight"])
            weight = weight.to(a.dtype) + b @ a
        if is_first():
            found[name] = weight
    return found
