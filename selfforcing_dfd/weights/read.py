"""Wan's weights in every format that is in use, read strictly: nothing is guessed and no tensor is
left out in silence.

    load_transformer("Wan2.1-T2V-1.3B-Diffusers")              diffusers: a transformer's folder, or
      a pipeline's
    load_transformer("Wan2.1-T2V-1.3B")                        original Wan
    load_transformer("self_forcing_dmd.pt", entry="generator")  Self-Forcing, CausVid,
      Causal-Forcing, DFD
    load_transformer("student.safetensors")                    one file, of ours or with names of
      either kind
    load_transformer("checkpoints/student_update=000600")      a training checkpoint of ours

Tensors are read one at a time into the memory that they stay in, so loading holds one copy. (A .pt
file is mapped: its pages may show as memory too, but the system can drop them.)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.models.hub import CAUSAL, RECIPE, Role, role_of
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.weights.names import Shape, sizes_of, to_wan
from selfforcing_dfd.weights.sources import SIZES, StoredWeights, describe_extras
from selfforcing_dfd.weights.sources import read_weights as read_weights
from selfforcing_dfd.weights.stored import WeightsError as WeightsError
from selfforcing_dfd.weights.stored import stored

logger = logging.getLogger(__name__)

HEAD_DIM, WAN_WIDTHS = 128, (1536, 3072, 5120)
"""Every released Wan has heads of 128 values; widths of 1.3B, 5B and 14B. No tensor tells the
number of heads.
"""
NUM_SHOWN = 8


def load_transformer(
    source: Path | str | StoredWeights,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    entry: str = "",
    head_dim: int = 0,
    drop_gan_heads: bool = False,
) -> WanTransformer:
    """A network of the size that the tensors have, with exactly these tensors.

    dtype: None keeps each tensor's own. entry: see `read_weights`. head_dim: only for sources that
    do not tell the number of heads and are no released size. Raises WeightsError.
    """
    weights = (
        source if isinstance(source, StoredWeights) else read_weights(source, entry, drop_gan_heads)
    )
    network = meta_network(weights, head_dim)
    tensors = {name: tensor.read().to(device, dtype) for name, tensor in weights.tensors.items()}
    network.load_state_dict(tensors, strict=True, assign=True)
    network.register_to_config(**weights.notes)
    return network


def load_into(
    network: WanTransformer,
    source: Path | str | StoredWeights,
    entry: str = "",
    drop_gan_heads: bool = False,
) -> None:
    """Copy weights into a network, one tensor at a time, in its own dtypes and on its devices.

    Raises WeightsError, before anything is changed, unless every tensor fits and none is left over.
    """
    weights = (
        source if isinstance(source, StoredWeights) else read_weights(source, entry, drop_gan_heads)
    )
    own = network.state_dict()
    _check_tensors(weights, {name: tuple(tensor.shape) for name, tensor in own.items()})
    _check_config(weights, {name: network.config[name] for name in SIZES})
    if any(tensor.is_meta for tensor in own.values()):
        raise WeightsError(
            "the network is on the meta device and has no memory; use load_transformer, or to_empty() it"
        )
    with torch.no_grad():
        for name, tensor in weights.tensors.items():
            own[name].copy_(tensor.read())


def stored_network(network: WanTransformer, role: Role = "unknown") -> StoredWeights:
    """A network in memory as if it were stored, for the exporter; its config's own note of the role
    comes first.
    """
    tensors = {name: stored(name, tensor) for name, tensor in network.state_dict().items()}
    config = {name: network.config[name] for name in SIZES}
    noted = role_of({CAUSAL: network.config.get(CAUSAL)})
    recipe = network.config.get(RECIPE)
    role = role if noted == "unknown" else noted
    return StoredWeights("the network", "network", "diffusers", tensors, config, role, recipe)


def meta_network(weights: StoredWeights, head_dim: int = 0) -> WanTransformer:
    """The network that weights are for, without memory. Raises WeightsError unless they are all of
    it and nothing else.
    """
    sizes = network_sizes(weights, head_dim)
    with torch.device("meta"):
        network = WanTransformer(**sizes)
    _check_tensors(
        weights, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    )
    return network


def network_sizes(weights: StoredWeights, head_dim: int = 0) -> dict[str, Any]:
    """WanTransformer's arguments: from the tensors' shapes, number of heads and eps from the
    config.

    Raises WeightsError where the two disagree, or where nothing tells the number of heads.
    """
    try:
        width, sizes = sizes_of(weights.shapes)
    except KeyError as error:
        name = error.args[0]
        wrong = (
            f"has shape {weights.tensors[name].shape}" if name in weights.tensors else "is missing"
        )
        raise WeightsError(
            f"{weights.source}: {_shown(weights, name)} {wrong}{_advice(weights)}"
        ) from error
    if sizes["in_channels"] != sizes["out_channels"]:
        raise WeightsError(
            f"{weights.source} takes {sizes['in_channels']} channels and gives {sizes['out_channels']}: a checkpoint for "
            "image-to-video or control, which is not supported; use a text-to-video one (Wan2.1 T2V)"
        )
    per_head = weights.config.get("attention_head_dim") or head_dim
    if not per_head and width in WAN_WIDTHS:
        logger.info(
            "%s does not tell its number of heads; taken as Wan's own, %d values each",
            weights.source,
            HEAD_DIM,
        )
        per_head = HEAD_DIM
    if not per_head or width % per_head or (head_dim and head_dim != per_head):
        told = f"heads of {per_head} values" if per_head else "no word about heads"
        raise WeightsError(
            f"{weights.source} has width {width} and {told}; say how many values a head has with head_dim=N (--head-dim N "
            "for convert), a divisor of the width that does not contradict its config"
        )
    heads = {"num_attention_heads": width // per_head, "attention_head_dim": per_head}
    found = {**sizes, **heads, "eps": weights.config.get("eps", 1e-6)}
    _check_config(weights, found)
    return found


def _check_config(weights: StoredWeights, sizes: Mapping[str, Any]) -> None:
    """Raise WeightsError where what the source tells is not what `sizes` are."""
    wanted = {**sizes, "patch_size": tuple(sizes["patch_size"])}
    other = [
        f"{key} {value} instead of {wanted[key]}"
        for key, value in weights.config.items()
        if value != wanted[key]
    ]
    if other:
        raise WeightsError(
            f"{weights.source}: its config says {'; '.join(other)}; correct it, or use the config it belongs to"
        )


def _check_tensors(weights: StoredWeights, wanted: Mapping[str, Shape]) -> None:
    """Raise WeightsError with what is missing, unknown or of another shape, in the source's own
    names.
    """
    found = weights.shapes
    missing = [
        f"{_shown(weights, name)} {list(wanted[name])} is missing"
        for name in wanted
        if name not in found
    ]
    unknown = [
        f"{tensor.key} is not known"
        for name, tensor in weights.tensors.items()
        if name not in wanted
    ]
    differing = [
        f"{weights.tensors[name].key} is {list(found[name])}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if not (missing or unknown or differing):
        return
    share = NUM_SHOWN // sum(map(bool, (missing, unknown, differing)))
    lines = [line for group in (unknown, missing, differing) for line in group[:share]]
    more = len(missing) + len(unknown) + len(differing) - len(lines)
    counts = f"{len(missing)} missing, {len(unknown)} unknown and {len(differing)} of another shape"
    shown = "".join(f"\n  {line}" for line in [*lines, *([f"and {more} more"] if more else [])])
    raise WeightsError(
        f"{weights.source} does not fit: of {len(wanted)} tensors {counts}{_advice(weights)}{shown}"
    )


def _advice(weights: StoredWeights) -> str:
    return (
        describe_extras(tensor.key for tensor in weights.tensors.values())
        or "; use weights of this size, or fetch them again"
    )


def _shown(weights: StoredWeights, name: str) -> str:
    """A tensor's name in the source's own terms."""
    return (to_wan(name) or name) if weights.layout == "wan" else name
