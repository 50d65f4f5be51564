"""Several networks over one set of weights, each with an adapter of its own.

So student and fake score of a large model cost an adapter each, and the teacher, which is the same
weights without adapter, costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import Conditioning, Context, NetworkOutput
from selfforcing_dfd.models.adapters import AdaptedLinear, owner_of
from selfforcing_dfd.models.wan import WanTransformer


class AdaptedNetwork(nn.Module):
    """One of several networks over one set of weights.

    name: of its adapter; empty for the weights alone, as they are. Its parameters and its state are
    those of its adapter, by the names of diffusers' files without their prefix; without adapter,
    those of the weights.
    """

    def __init__(self, base: WanTransformer, name: str = "") -> None:
        super().__init__()
        self.base = base
        self.name = name

    @property
    def config(self) -> Mapping[str, Any]:
        """WanTransformer's arguments."""
        config: Mapping[str, Any] = self.base.config
        return config

    def forward(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput:
        self.base.adapter = self.name
        try:
            output: NetworkOutput = self.base(x_t, sigma, conditioning, context)
        finally:
            self.base.adapter = ""
        return output

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Own ones; options are those of the base's method."""
        for name, parameter in self.base.named_parameters(*args, **options):
            owner = owner_of(name)
            if owner == self.name:
                yield name.replace(f".adapters.{owner}.", "."), parameter

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Fill the own parameters in place. KeyError for one that is missing."""
        for name, parameter in self.named_parameters():
            parameter.copy_(state_dict[name])


StageNetwork = WanTransformer | AdaptedNetwork
"""What a stage is given for each role."""
Module = TypeVar("Module", bound=nn.Module)


def base_of(network: AdaptedNetwork | Module) -> WanTransformer | Module:
    """The network that computes: the one below an adapter, or the network itself."""
    return network.base if isinstance(network, AdaptedNetwork) else network


def adapt(
    base: WanTransformer,
    name: str,
    rank: int,
    seed: int,
    tensors: Mapping[str, Tensor] | None = None,
) -> AdaptedNetwork:
    """A network with a new adapter on every linear layer of the blocks.

    tensors: what the adapter begins with, see `weights.adapters`; None is a new one that changes
    nothing. Raises UserError for tensors of another model or rank.
    """
    for layer_name, layer in adapted_layers(base):
        layer.new_adapter(name, rank).begin(seed, f"{name} {layer_name}")
    network = AdaptedNetwork(base, name)
    if tensors is not None:
        check_fits(network, tensors, rank)
        network.load_state_dict(tensors)
    return network


def adapted_layers(base: WanTransformer) -> list[tuple[str, AdaptedLinear]]:
    """The blocks' linear layers by name, made ready for adapters."""
    found = []
    for number, block in enumerate(base.wan_blocks()):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and ".adapters." not in name:
                adapted = AdaptedLinear(layer)
                block.set_submodule(name, adapted)
                found.append((f"blocks.{number}.{name}", adapted))
            elif isinstance(layer, AdaptedLinear):
                found.append((f"blocks.{number}.{name}", layer))
    return found


def check_fits(network: AdaptedNetwork, tensors: Mapping[str, Tensor], rank: int) -> None:
    """UserError unless the tensors are those of the network's adapter."""
    wanted = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differing = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    if differing:
        name = differing[0]
        raise UserError(
            f"the adapter that {network.name} begins with does not fit: {len(differing)} of "
            f"{len(wanted)} tensors are others, first {name}, {found.get(name, 'missing')} instead "
            f"of {wanted.get(name, 'none')}. It must be one that was trained over the same "
            f"weights with model.lora_rank={rank}"
        )
