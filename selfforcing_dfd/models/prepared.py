"""What a network works out once for many calls: noise levels, and the K/V of text and picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from selfforcing_dfd.models.picture import KeysValues, PictureConditioning


class Modulation(NamedTuple):
    """A noise level for one block, each [B or 1, F or 1, D]. Scales are factors: 1 is added."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class NoiseLevel(NamedTuple):
    """A noise level for the whole network: modulation of each block, (shift, scale) of the head.

    A block's modulation may still be the embedding [B, F, 6, D] that it is computed from.
    """

    blocks: tuple[Tensor | Modulation, ...]
    head: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class PreparedConditioning(PictureConditioning):
    """Conditioning with what every call would compute again; made by `WanTransformer.prepare`.

    text_kv, picture_kv: per block the (k, v) of cross-attention; picture_kv is None in blocks that
    see no picture. noise_levels: by sigma.
    """

    text_kv: tuple[KeysValues, ...]
    picture_kv: tuple[KeysValues | None, ...]
    noise_levels: Mapping[float, NoiseLevel]
