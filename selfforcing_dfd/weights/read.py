"""Wan's weights in every format that is in use, read strictly: no tensor is left out in silence.

    load_network("Wan2.1-T2V-1.3B-Diffusers")               a transformer's folder, or a pipeline's
    load_network("Wan2.1-T2V-1.3B")                         original Wan
    load_network("self_forcing_dmd.pt", entry="generator")  Self-Forcing, CausVid, Causal-Forcing
    load_network("0005000.pth")                             FastGen
    load_network("student.safetensors")                     one file, with names of either kind
    load_network("checkpoints/student_update=000600")       a training checkpoint of this package

Sizes, role and recipe come from the source; `describe` tells them without reading a tensor. Tensors
are read one at a time into the memory that they stay in, so loading holds one copy. (A .pt file is
mapped: its pages may show as memory too, but the system can drop them.)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from selfforcing_dfd.models.identity import Recipe, Role, TrainingData
from selfforcing_dfd.models.network import PlainWan, WanNetwork
from selfforcing_dfd.models.picture import further_channels, takes_picture
from selfforcing_dfd.weights.names import Shape, sizes_of, to_wan
from selfforcing_dfd.weights.sources import SIZES, StoredWeights, describe_extras
from selfforcing_dfd.weights.sources import read_weights as read_weights
from selfforcing_dfd.weights.stored import WeightsError as WeightsError

if TYPE_CHECKING:
    from selfforcing_dfd.models.wan import WanTransformer

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=WanNetwork)

HEAD_DIM = 128
WAN_WIDTHS = (1536, 3072, 5120)
"""Every released Wan has heads of 128 values; widths of 1.3B, 5B and 14B. No tensor tells the
number of heads.
"""
NUM_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Description:
    """What a file or folder says about one network, read without its tensors.

    sizes: all of WanTransformer's arguments. role, recipe, data: None where the source states none.
    format: in words. entries: all models that the source holds, the described one first.
    """

    source: str
    format: str
    sizes: Mapping[str, Any]
    role: Role | None
    recipe: Recipe | None
    data: TrainingData | None
    num_parameters: int
    entries: tuple[str, ...]

    def require(self, because: str, **wanted: Any) -> None:
        """Raise WeightsError unless the network has these sizes; `because` says who wants them."""
        other = [
            f"{name} {self.sizes[name]} instead of {value}"
            for name, value in wanted.items()
            if self.sizes[name] != value
        ]
        if other:
            raise WeightsError(
                f"{self.source} holds another model: it has {'; '.join(other)}, as {because} "
                "wants; name weights of that size, or change what wants it"
            )


def describe(source: Path | str | StoredWeights, entry: str = "", head_dim: int = 0) -> Description:
    """Sizes, role, recipe and format of a source; entry and head_dim as in `load_network`.

    Raises WeightsError for what cannot be read, and unless the tensors are exactly a network's.
    """
    weights = source if isinstance(source, StoredWeights) else read_weights(source, entry)
    network = meta_network(weights, head_dim, PlainWan)
    return Description(
        weights.source,
        weights.format,
        {name: network.config[name] for name in SIZES},
        weights.role,
        weights.recipe,
        weights.identity.data,
        sum(parameter.numel() for parameter in network.parameters()),
        weights.entries,
    )


def load_network(
    source: Path | str | StoredWeights,
    entry: str = "",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    head_dim: int = 0,
    drop_gan_heads: bool = False,
) -> WanTransformer:
    """A network of the size that the source has, with exactly its tensors, role and recipe.

    entry: which model of a source with several; by default the averaged one, see `read_weights`.
    dtype: None keeps each tensor's own. head_dim: only for sources that do not state the number of
    heads and have no released size. Raises WeightsError.
    """
    weights = source
    if not isinstance(weights, StoredWeights):
        weights = read_weights(weights, entry, drop_gan_heads)
    network = transformer_on_meta(weights, head_dim)
    fill(network, weights, device, dtype)
    return network


def load_plain(
    weights: StoredWeights, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> PlainWan:
    """`load_network` without diffusers, which takes seconds to import."""
    network = meta_network(weights, 0, PlainWan)
    fill(network, weights, device, dtype)
    return network


def fill(
    network: WanTransformer | PlainWan,
    weights: StoredWeights,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    """Give a network on the meta device its tensors, role and recipe."""
    tensors = {name: read_finite(weights, name).to(device, dtype) for name in weights.tensors}
    network.load_state_dict(tensors, strict=True, assign=True)
    network.register_to_config(**weights.identity.notes())


def read_finite(weights: StoredWeights, name: str) -> torch.Tensor:
    """One tensor on the CPU. Raises WeightsError for values that are not finite."""
    tensor = weights.tensors[name].read()
    can_tell = tensor.is_floating_point() and tensor.itemsize > 1  # not so for 8-bit numbers
    # both ends are NaN where one value is; `isfinite` would hold a second copy
    if can_tell and tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
        raise WeightsError(
            f"{weights.source}: {_shown(weights, name)} holds values that are not finite; fetch or "
            "export it again"
        )
    return tensor


def transformer_on_meta(weights: StoredWeights, head_dim: int = 0) -> WanTransformer:
    """`meta_network` with diffusers' methods."""
    from selfforcing_dfd.models.wan import WanTransformer

    return meta_network(weights, head_dim, WanTransformer)


def meta_network(weights: StoredWeights, head_dim: int, kind: type[Network]) -> Network:
    """The network of some weights on the meta device, without memory.

    Raises WeightsError unless the weights are all of its tensors and no others.
    """
    sizes = network_sizes(weights, head_dim)
    with torch.device("meta"):
        network = kind(**sizes)
    _check_tensors(
        weights, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    )
    return network


def network_sizes(weights: StoredWeights, head_dim: int = 0) -> dict[str, Any]:
    """WanTransformer's arguments: from the tensors' shapes, and heads and eps from the config.

    Raises WeightsError where the two disagree, or where nothing tells the number of heads.
    """
    try:
        width, sizes = sizes_of(weights.shapes)
    except KeyError as error:
        name = error.args[0]
        wrong = "is missing"
        if name in weights.tensors:
            wrong = f"has shape {weights.tensors[name].shape}"
        raise WeightsError(
            f"{weights.source}: {_shown(weights, name)} {wrong}{_advice(weights)}"
        ) from error
    _check_channels(weights, sizes)
    per_head = weights.config.get("attention_head_dim") or head_dim
    if not per_head and width in WAN_WIDTHS:
        logger.info(
            "%s does not state its number of heads; assumed Wan's, %d values each",
            weights.source,
            HEAD_DIM,
        )
        per_head = HEAD_DIM
    if not per_head or width % per_head or (head_dim and head_dim != per_head):
        stated = f"heads of {per_head} values" if per_head else "no word about heads"
        raise WeightsError(
            f"{weights.source} has width {width} and {stated}; say how many values a head has with "
            "head_dim=N (--head-dim N for convert), a divisor of the width that does not "
            "contradict its config"
        )
    heads = {"num_attention_heads": width // per_head, "attention_head_dim": per_head}
    found = {**sizes, **heads, "eps": weights.config.get("eps", 1e-6)}
    _check_config(weights, found)
    return found


def _check_channels(weights: StoredWeights, sizes: Mapping[str, Any]) -> None:
    """Raise WeightsError for further input channels that are not those of a picture."""
    channels = sizes["out_channels"]
    wanted = channels
    what = "no tensors of an image encoder"
    if takes_picture(sizes):
        wanted += further_channels(channels)
        what = "tensors of an image encoder"
    if sizes["in_channels"] != wanted:
        raise WeightsError(
            f"{weights.source} takes {sizes['in_channels']} channels, gives {channels} and has "
            f"{what}: a checkpoint for control, or of Wan2.2, which is not supported; use Wan2.1's "
            "text-to-video or image-to-video"
        )


def _check_config(weights: StoredWeights, sizes: Mapping[str, Any]) -> None:
    """Raise WeightsError where the sizes that the source states are others than `sizes`."""
    wanted = {**sizes, "patch_size": tuple(sizes["patch_size"])}
    other = [
        f"{key} {value} instead of {wanted[key]}"
        for key, value in weights.config.items()
        if value != wanted[key]
    ]
    if other:
        raise WeightsError(
            f"{weights.source}: its config says {'; '.join(other)}; correct it, or use the config "
            "it belongs to"
        )


def _check_tensors(weights: StoredWeights, wanted: Mapping[str, Shape]) -> None:
    """Raise WeightsError for missing, unknown or misshapen tensors, in the source's own names."""
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
    groups = [group for group in (unknown, missing, differing) if group]
    lines = [line for group in groups for line in group[: NUM_SHOWN // len(groups)]]
    num_more = sum(map(len, groups)) - len(lines)
    if num_more:
        lines.append(f"and {num_more} more")
    counts = f"{len(missing)} missing, {len(unknown)} unknown and {len(differing)} of another shape"
    shown = "".join(f"\n  {line}" for line in lines)
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
