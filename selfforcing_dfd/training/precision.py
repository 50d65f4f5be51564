"""Compute in 16 bits with float32 weights: what sharded training (`fully_shard` with param_dtype)
does, in one process.

While a block runs, forward or re-run for the backward pass, its parameters are casts of themselves;
outside they are the float32 parameters that optimizer, average and checkpoints know. Gradients
arrive through the cast, so they are float32 and add up over micro-batches in float32. Every
parameter is cast, modulation tables and norms included; what the network itself does in float32
(norm statistics, modulation, residual sums, rotations) stays there, and so does all that happens to
latents outside of it: noise, sigma, clean predictions, losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


def compute_in(network: nn.Module, dtype: torch.dtype) -> None:
    """From now on `network` runs in `dtype`, unit by unit: each of its `blocks`, then what lies
    around them.

    At most one block's casts exist at a time outside the ones that the backward pass of that block
    needs.
    """
    blocks = list(network.get_submodule("blocks").children())
    within = {parameter for block in blocks for parameter in block.parameters()}
    for unit in (*blocks, network):
        own: set[Tensor] = {p for p in unit.parameters() if unit is not network or p not in within}
        setattr(unit, "forward", _cast_around(unit.forward, unit, own, dtype))  # noqa: B010


def _cast_around(
    forward: Callable[..., Any], unit: nn.Module, own: set[Tensor], dtype: torch.dtype
) -> Any:
    @wraps(forward)
    def run(*inputs: Any, **named: Any) -> Any:
        with parameters_in(unit, own, dtype):
            return forward(*inputs, **named)

    return run


@contextmanager
def parameters_in(module: nn.Module, chosen: set[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Inside the `with`, the chosen parameters are differentiable casts of themselves; afterwards
    they are as before.
    """
    holders = [
        (part._parameters, n, p)
        for part in module.modules()
        for n, p in part._parameters.items()
        if p in chosen
    ]
    casts: dict[Tensor, Tensor] = {p: p.to(dtype) for p in chosen}
    try:
        for parameters, name, parameter in holders:
            parameters[name] = casts[parameter]  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, parameter in holders:
            parameters[name] = parameter
