"""Weights over several processes: FSDP2 (`fully_shard`), one transformer block at a time.

Each process keeps a part of every float32 parameter, of its gradient and of the optimizer's state.
A block's parameters are gathered, in the dtype of the computation, when it runs. Gradients are
summed over processes in float32. What the network itself computes in float32 stays so: inputs are
not cast (norm statistics, modulation, residual sums, rotations), nor is what happens to latents
outside of it (noise, sigma, clean predictions, losses).

One process shards too when it computes in 16 bits: this is also how float32 weights are cast. In
float32 there is nothing to do for one process. There, sharding cost 7 to 9 % of the time of a tiny
network on a CPU, so it is left out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from selfforcing_dfd.config import require
from selfforcing_dfd.models.adapted import base_of
from selfforcing_dfd.models.adapters import owner_of
from selfforcing_dfd.processes.world import World, join_alone

VIEWS = "FSDP2-wrapped module .* returned a view tensor"


@dataclass(frozen=True, slots=True)
class Sharding:
    """How networks are spread over processes.

    ranks: processes that hold one copy of the weights together; 0 is all. With fewer than all,
    their copies are kept equal by adding up gradients (hybrid sharding; 1 is plain replication).
    compute: the dtype in which trained networks run.
    """

    world: World
    ranks: int = 0
    compute: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        size = self.world.size
        require(
            self.ranks == 0 or size % self.ranks == 0,
            f"model.shard_ranks is {self.ranks}, but {size} processes train; use a number that "
            f"divides {size}: 0 for all, 1 for a whole copy in each, or the GPUs of one machine",
        )

    def apply(self, network: nn.Module, is_trained: bool) -> None:
        """Spread a network, which must be whole and equal on all ranks.

        Trained networks require gradient from now on, in the turns of others too: FSDP reads their
        dtypes at the first call, from parameters that require it. Stages ask them without gradient.
        Of a network with adapters, these alone are trained.
        """
        has_adapters = any(owner_of(name) for name, _ in network.named_parameters())
        for name, parameter in network.named_parameters():
            is_own = bool(owner_of(name)) == has_adapters
            parameter.requires_grad_(is_trained and is_own)
        has_dtype = {parameter.dtype for parameter in network.parameters()} == {self.compute}
        if self.world.size == 1 and (has_dtype or not is_trained):
            return
        mesh = self.mesh()
        policy = MixedPrecisionPolicy(
            param_dtype=None if has_dtype else self.compute,
            reduce_dtype=None if has_dtype else torch.float32,
            cast_forward_inputs=False,
        )
        for block in network.get_submodule("blocks").children():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh, mp_policy=policy)
        # a warning about in-place changes of what a block returns, which nobody makes
        warnings.filterwarnings("ignore", message=VIEWS)

    def mesh(self) -> DeviceMesh:
        """All processes in a row, or in rows of `ranks` that hold one copy each."""
        join_alone()
        size = self.world.size
        device = self.world.device.type
        if self.ranks in (0, size):
            return init_device_mesh(device, (size,))
        shape = (size // self.ranks, self.ranks)
        return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def keep_gathered(network: nn.Module) -> None:
    """From now on the weights stay whole between calls, until `release` is called.

    For the student: a rollout calls it many times in a turn.
    """
    root = base_of(network)
    if isinstance(root, FSDPModule):
        root.set_reshard_after_forward(False)


def release(network: nn.Module) -> None:
    """Give back what was gathered. Before this, `parameters()` are not what is trained."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def expect_backward(network: nn.Module, is_last: bool) -> None:
    """Before a micro-batch of an update: gradients are reduced after the last one alone.

    Until then each process adds up whole gradients in float32.
    """
    root = base_of(network)
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(is_last)
        root.set_reshard_after_backward(is_last)
