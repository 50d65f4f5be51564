"""Adapters for training (LoRA): what is added to the linear layers of a block.

An adapter adds B A x to what a matrix W gives, W x (arXiv 2106.09685). W is not trained.

PEFT adapts networks too, for streams (`models/lora.py`). It keeps in the modules which adapter
works. A block that runs again in the backward pass would find there what the last call chose, which
was another network's. Here the choice belongs to the call, and running again repeats it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from selfforcing_dfd import rng


class Adapter(nn.Module):
    """B A x, with names as in diffusers' files. B begins at zero, so the adapter does nothing."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.lora_B(self.lora_A(x))
        return added

    @torch.no_grad()
    def begin(self, seed: int, name: str) -> None:
        """A from the usual range of a layer of its width, drawn for this name; B zero."""
        shape = tuple(self.lora_A.weight.shape)
        draw = rng.uniform(shape, seed, f"adapter {name}")
        self.lora_A.weight.copy_((2 * draw - 1) / shape[1] ** 0.5)
        self.lora_B.weight.zero_()


class AdaptedLinear(nn.Module):
    """A linear layer, with adapters by name. Its own parameters keep their names.

    working: the adapter that adds to the result; empty for none.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.adapters = nn.ModuleDict()
        self.working = ""

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        return y + self.adapters[self.working](x) if self.working else y

    def new_adapter(self, name: str, rank: int) -> Adapter:
        """An adapter in float32, where the weights are, with arbitrary values."""
        out_features, in_features = self.weight.shape
        adapter = Adapter(in_features, out_features, rank).to(self.weight.device, torch.float32)
        self.adapters[name] = adapter
        return adapter


def owner_of(name: str) -> str:
    """The adapter that a parameter of an adapted network belongs to; empty for the network's."""
    _, found, rest = name.partition(".adapters.")
    return rest.partition(".")[0] if found else ""


@contextmanager
def working(block: nn.Module, name: str) -> Iterator[None]:
    """Inside the `with`, the adapters of this name work in a block."""
    layers = [layer for layer in block.modules() if isinstance(layer, AdaptedLinear)]
    for layer in layers:
        layer.working = name
    try:
        yield
    finally:
        for layer in layers:
            layer.working = ""


def run_adapted(name: str, block: nn.Module, *inputs: Any) -> Any:
    """One call of a block with the adapters of this name, the same whenever it is made."""
    with working(block, name):
        return block(*inputs)
