"""Sequence parallelism by heads: Ulysses (arXiv 2309.14509).

Outside of self-attention each process holds a part of the tokens of every latent frame, with all
heads. Inside it holds all tokens, with a part of the heads, and so do the K/V that it keeps. One
exchange of queries, keys and values leads from the first form to the second, one of the attended
values back. All processes of a group call the network together, with equal inputs, and all get the
whole flow.

Gradients of parameters are those of the process's own tokens: their sum over the group is the
gradient. The loss has to be computed from the whole flow on every process, and is not summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from selfforcing_dfd.common import UserError


@dataclass(frozen=True, slots=True)
class SequenceParallel:
    """A group of processes that share each sequence; by default all processes."""

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    def check_heads(self, heads: int) -> None:
        """Raise UserError for a number of heads that cannot be shared evenly."""
        if heads % self.size:
            fitting = [size for size in range(1, heads + 1) if heads % size == 0]
            raise UserError(
                f"{self.size} processes share a sequence, but the model has {heads} heads; "
                f"use one of {', '.join(map(str, fitting))} processes"
            )

    def check_tokens(self, rows: int, columns: int) -> None:
        """Raise UserError for latent frames whose tokens cannot be shared evenly."""
        if rows * columns % self.size:
            raise UserError(
                f"{self.size} processes share the {rows} x {columns} tokens of a latent frame; "
                "use a number of processes that divides them, or another size of the video"
            )

    def own_tokens(self, x: Tensor, frames: int) -> Tensor:
        """This process's tokens: [B, frames * tokens, ...] -> [B, frames * tokens / size, ...]."""
        parts = x.unflatten(1, (frames, self.size, -1))
        return parts[:, :, self.rank].flatten(1, 2)

    def own_rotary(self, rotary: tuple[Tensor, Tensor], frames: int) -> tuple[Tensor, Tensor]:
        """Rotary tables, each [frames * tokens, 1, d], of this process's tokens."""
        cos, sin = (self.own_tokens(table[None], frames)[0] for table in rotary)
        return cos, sin

    def all_tokens(self, x: Tensor, frames: int) -> Tensor:
        """Inverse of `own_tokens`, on every process."""
        gathered = _Gather.apply(x.contiguous(), self)
        return _by_frame(gathered, frames)

    def split_heads(self, tensors: tuple[Tensor, ...], frames: int) -> tuple[Tensor, ...]:
        """Own tokens with all heads -> all tokens with own heads, of several tensors at once.

        Each [B, frames * tokens / size, heads, d] -> [B, frames * tokens, heads / size, d].
        """
        x = torch.stack(tensors)
        by_head = x.unflatten(3, (self.size, -1)).movedim(3, 0)
        exchanged = _Exchange.apply(by_head.contiguous(), self)
        return tuple(_by_frame(each, frames) for each in exchanged.unbind(1))

    def join_heads(self, x: Tensor, frames: int) -> Tensor:
        """Inverse of `split_heads` for one tensor."""
        by_part = x.unflatten(1, (frames, self.size, -1)).movedim(2, 0)
        exchanged = _Exchange.apply(by_part.contiguous(), self)
        return exchanged.movedim(0, 3).flatten(3, 4).flatten(1, 2)


def _by_frame(parts: Tensor, frames: int) -> Tensor:
    """[size, B, frames * tokens / size, ...] -> [B, frames * tokens, ...]; parts are of frames."""
    return parts.unflatten(2, (frames, -1)).movedim(0, 2).flatten(1, 3)


class _Exchange(torch.autograd.Function):
    """[size, ...]: entry r goes to process r. It is its own inverse, and its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: SequenceParallel) -> Tensor:
        ctx.sequence = sequence
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=sequence.group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grads[0].contiguous(), ctx.sequence), None


class _Gather(torch.autograd.Function):
    """x of all processes, [size, ...]. All compute one loss of it, so the own part is the gradient.

    A sum over the group would count that loss `size` times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: SequenceParallel) -> Tensor:
        ctx.sequence = sequence
        parts = [torch.empty_like(x) for _ in range(sequence.size)]
        dist.all_gather(parts, x, group=sequence.group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.sequence.rank], None
