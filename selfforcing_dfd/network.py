"""What every network answers to: conditioning and context in, flow and K/V out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from selfforcing_dfd.cache import ChunkKV, Context, PackedContext

Past = Context | PackedContext


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the student is asked for. `text`: [B, L, D_text] text-encoder states, zero past each prompt's end."""

    text: Tensor


@dataclass(frozen=True, slots=True)
class NetworkOutput:
    """flow: [B, F, C, H, W]; kv: the keys and values of exactly these frames."""

    flow: Tensor
    kv: ChunkKV


class Network(Protocol):
    """Student, teacher and fake score alike. Without context it is bidirectional over the frames it gets."""

    def __call__(
        self, x_t: Tensor, sigma: Tensor | float, conditioning: Conditioning, context: Past | None = None
    ) -> NetworkOutput: ...
