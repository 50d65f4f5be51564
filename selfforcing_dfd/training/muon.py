"""Muon for sharded matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Muon(torch.optim.Muon):
    """torch's Muon, which makes the update of a matrix orthogonal and so needs the whole of it.

    Matrices of which each process has a part are gathered one by one, and every process makes the
    same step. torch's own step on sharded matrices would form its bfloat16 products in parts, with
    other rounding for every number of processes.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        sharded = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if isinstance(parameter, DTensor)
        ]
        if not sharded:
            super().step()
        for parameter, group in sharded:
            if parameter.grad is not None:
                self._step_whole(parameter, group)

    def _step_whole(self, parameter: DTensor, group: dict[str, object]) -> None:
        """The step of one matrix, by an optimizer of its own that sees the whole of it."""
        settings = {name: value for name, value in group.items() if name in self.defaults}
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        matrix = nn.Parameter(parameter.full_tensor())
        matrix.grad = _full(parameter.grad)
        optimizer = torch.optim.Muon([matrix], **settings)  # type: ignore[arg-type]
        momentum = _full(state["momentum_buffer"])
        optimizer.state[matrix]["momentum_buffer"] = momentum
        optimizer.step()
        _put(matrix.detach(), parameter)
        _put(momentum, state["momentum_buffer"])


def _full(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def _put(whole: Tensor, sharded: DTensor) -> None:
    """Each process takes its own part; nothing is sent."""
    part = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
    sharded.copy_(part)
