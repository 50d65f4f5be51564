"""Checks that stop a run before values that are not finite are trained on or stored."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from selfforcing_dfd.common import UserError
from selfforcing_dfd.processes.ranks import add_up


class NonFiniteError(UserError):
    """A loss, gradient, weight or optimizer value became infinite or not a number.

    Nothing of it was stored; training goes on from the newest checkpoint, see `healing`.
    """


class NonFiniteWeightsError(NonFiniteError):
    """Weights after the step of a turn; their network can tell nothing about samples any more."""


class NonFiniteStateError(NonFiniteError):
    """Values of a finished turn, found when they were to be stored."""


def require_finite(name: str, value: float | Tensor, where: str) -> None:
    """NonFiniteError unless every value is finite. `where`: update and turn, for the message."""
    tensor = torch.as_tensor(value)
    bad = _count_bad(tensor)
    if bad and tensor.numel() == 1:
        raise NonFiniteError(_advice(f"{name} is {tensor.item()}", where))
    if bad:
        what = f"{name} is not finite in {bad} of {tensor.numel()} values"
        raise NonFiniteError(_advice(what, where))


def check_losses(losses: Tensor, where: str) -> Tensor:
    """The mean of losses [R, micro-batches]; NonFiniteError names the ranks where it is none."""
    for rank, own in enumerate(losses):
        name = "loss" if len(losses) == 1 else f"loss of rank {rank}"
        require_finite(name, own.mean(), where)
    return losses.mean()


def check_finite(
    loss: Tensor, named_grads: Iterable[tuple[str, Tensor | None]], where: str
) -> Tensor:
    """The norm of all gradients together (0-d, at least float32); call before the optimizer step.

    named_grads: parameter names with their `.grad`; None (no gradient) counts as zero. Raises
    NonFiniteError, which names the first parameter whose gradient is not finite.
    """
    require_finite("loss", loss.detach(), where)
    grads = [(name, grad.detach()) for name, grad in named_grads if grad is not None]
    if not grads:
        raise ValueError(
            f"no parameter has a gradient at {where}; call backward() first, then pass (name, grad)"
        )
    norms = [torch.linalg.vector_norm(grad, dtype=_at_least_float32(grad)) for _, grad in grads]
    total = torch.linalg.vector_norm(torch.stack(norms))
    total = total.full_tensor() if isinstance(total, DTensor) else total
    if not math.isfinite(total.item()):
        _raise_for_gradient(grads, where)
    return total


def check_weights(named: Iterable[tuple[str, Tensor]], where: str) -> None:
    """NonFiniteWeightsError, naming the first, unless all are finite; call after the step."""
    weights = [(name, weight.detach()) for name, weight in named]
    norms = [
        torch.linalg.vector_norm(weight, dtype=_at_least_float32(weight)) for _, weight in weights
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    total = total.full_tensor() if isinstance(total, DTensor) else total
    if not math.isfinite(total.item()):
        bad = first_not_finite(weights)
        if bad:
            raise NonFiniteWeightsError(_too_late(bad, where))


def check_stored(named: Iterable[tuple[str, Tensor]], where: str) -> None:
    """NonFiniteStateError, naming the first, unless all values to be stored are finite."""
    bad = first_not_finite(named)
    if bad:
        raise NonFiniteStateError(_too_late(bad, where))


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """The first tensor that is not finite, and in how many values; empty if all are.

    With a process group all ranks call together.
    """
    floats = [(name, tensor.detach()) for name, tensor in named if tensor.is_floating_point()]
    is_bad = any(not bool(_own_part(tensor).isfinite().all()) for _, tensor in floats)
    if not any(add_up([is_bad])):  # one message for all tensors
        return ""
    for name, tensor in floats:
        bad = _count_bad(tensor)
        if bad:
            return f"{name} is not finite in {bad} of {tensor.numel()} values"
    return ""


def _too_late(what: str, where: str) -> str:
    return (
        f"{what} at {where}. Nothing of it was stored. Look at the last lines of metrics.jsonl for "
        "a growing loss or gradient norm; a lower learning rate or tighter gradient clipping helps "
        "then"
    )


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _raise_for_gradient(grads: list[tuple[str, Tensor]], where: str) -> None:
    for name, grad in grads:
        bad = _count_bad(grad)
        if bad:
            what = f"gradient of {name} is not finite in {bad} of {grad.numel()} values"
            raise NonFiniteError(_advice(what, where))
    raise NonFiniteError(_advice(f"the norm over {len(grads)} gradients overflows", where))


def _own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _count_bad(tensor: Tensor) -> int:
    bad = (~torch.isfinite(tensor)).sum()
    return int((bad.full_tensor() if isinstance(bad, DTensor) else bad).item())


def _advice(what: str, where: str) -> str:
    return (
        f"{what} at {where}. The optimizer step was not taken, so the weights are as before. "
        "Look at the last lines of metrics.jsonl for a growing loss or gradient norm, then at that "
        "batch's data; a lower learning rate or tighter gradient clipping helps if the growth came "
        "first"
    )
