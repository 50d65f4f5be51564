"""Real or made? A discriminator on features of a frozen network (DMD2, arXiv 2405.14867, 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.models.adapted import StageNetwork, base_of
from selfforcing_dfd.models.layers import full_precision


class Head(nn.Module):
    """A score for each token of one block's output."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.width = width
        self.hidden = nn.Linear(width, inner)
        self.score = nn.Linear(inner, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N]."""
        normed = layer_norm(full_precision(tokens), (self.width,))
        return self.score(silu(self.hidden(normed.type_as(self.hidden.weight)))).squeeze(-1)


class Discriminator(nn.Module):
    """A head for each of several blocks of a network; scores are high for real clips.

    width: of the network. depths: of the blocks, as shares of the network's: 1 is the last one.
    """

    def __init__(self, width: int, num_layers: int, depths: tuple[float, ...], inner: int):
        super().__init__()
        self.layers = tuple(min(int(depth * num_layers), num_layers - 1) for depth in depths)
        self.blocks = nn.ModuleList(Head(width, inner) for _ in depths)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Outputs of the blocks `layers`, each [B, N, D] -> scores [B, heads * N], float32."""
        scores = [head(tokens) for head, tokens in zip(self.blocks, features, strict=True)]
        return full_precision(torch.cat(scores, dim=1))


def block_outputs(
    network: StageNetwork,
    layers: Sequence[int],
    x_t: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
) -> tuple[list[Tensor], Tensor]:
    """What some blocks of a network return [B, N, D] for x_t [B, F, C, H, W], and its flow."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
            kept[layer] = outputs[0]

        return hook

    blocks = base_of(network).blocks
    hooks = [blocks[layer].register_forward_hook(keep(layer)) for layer in set(layers)]
    try:
        flow = network(x_t, sigma, conditioning).flow
    finally:
        for hook in hooks:
            hook.remove()
    return [kept[layer] for layer in layers], flow
