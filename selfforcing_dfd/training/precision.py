"""Compute in 16 bits with float32 weights, as sharded training does, in one process.

While a block runs, forward or again for the backward pass, its parameters are 16-bit casts of
themselves. Outside they are the float32 parameters that optimizer, average and checkpoints know.
Gradients pass back through the cast, so they are float32 and add up over micro-batches in float32.
All parameters are cast, modulation tables and norms included. What the network itself computes in
float32 stays so (norm statistics, modulation, residual sums, rotations), and so does all that
happens to latents outside of it: noise, sigma, clean predictions, losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


def compute_in(network: nn.Module, dtype: torch.dtype) -> None:
    """From now on `network` runs in `dtype`: each of its `blocks`, and what lies around them.

    Casts exist for one block at a time, beside those that a running backward pass needs.
    """
    blocks = list(network.get_submodule("blocks").children())
    within = {parameter for block in blocks for parameter in block.parameters()}
    for block in blocks:
        _run_in(block, set[Tensor](block.parameters()), dtype)
    _run_in(network, set[Tensor](network.parameters()) - within, dtype)


def _run_in(module: nn.Module, parameters: set[Tensor], dtype: torch.dtype) -> None:
    """Replace the module's forward by one that runs with casts of the parameters."""
    setattr(module, "forward", _with_casts(module.forward, module, parameters, dtype))  # noqa: B010


def _with_casts(
    forward: Callable[..., Any], module: nn.Module, parameters: set[Tensor], dtype: torch.dtype
) -> Any:
    @wraps(forward)
    def run(*inputs: Any, **named: Any) -> Any:
        with parameters_in(module, parameters, dtype):
            return forward(*inputs, **named)

    return run


@contextmanager
def parameters_in(module: nn.Module, chosen: set[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Inside the `with`, the chosen parameters are casts of themselves, which carry gradients.

    Afterwards they are as before.
    """
    holders = [
        (part._parameters, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter in chosen
    ]
    casts: dict[Tensor, Tensor] = {parameter: parameter.to(dtype) for parameter in chosen}
    try:
        for parameters, name, parameter in holders:
            parameters[name] = casts[parameter]  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, parameter in holders:
            parameters[name] = parameter
