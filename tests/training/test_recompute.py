"""Activation checkpointing changes what is kept and what runs again, and no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import conditioning, latents, tiny_network
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfforcing_dfd.training.recompute import Recompute, recompute


class Counting(TorchDispatchMode):
    """Counts forward passes of attention and of linear layers."""

    attention = 0
    linear = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        name = str(operation)
        self.attention += "attention" in name and "backward" not in name
        self.linear += "addmm" in name
        return operation(*args, **(named or {}))


def update(what: Recompute) -> tuple[Tensor, Counting]:
    """Gradients of a pass, and what ran in it."""
    network = tiny_network()
    recompute(network, what)
    with Counting() as counting:
        flow = network(latents("x"), torch.tensor([0.3, 0.8]), conditioning()).flow
        flow.square().mean().backward()
    grads = [parameter.grad.flatten() for parameter in network.parameters()]
    return torch.cat(grads), counting


@pytest.mark.parametrize("what", ["selective", "full"])
def test_gradients_are_those_without_it(what: Recompute) -> None:
    """Catches a block that runs again on other inputs, or kept results in the wrong places."""
    assert torch.equal(update(what)[0], update("none")[0])


def test_selective_runs_all_again_but_attention() -> None:
    """Catches operations that are attention and not known as such, and one that keeps all."""
    none, selective, full = (update(what)[1] for what in ("none", "selective", "full"))
    assert none.attention > 0
    assert selective.attention == none.attention
    assert full.attention == 2 * none.attention
    assert none.linear < selective.linear == full.linear
