"""Counter-based randomness: a draw depends on its name and counters only.

A stream is named by `(seed, name, *counters)`, for example `(0, "noise", student_update, sample)`.
No random state has to be saved or broadcast. Resuming a run or changing the number of processes
cannot change a draw.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def stream_seed(seed: int, name: str, *counters: int) -> int:
    """A 63-bit seed for one draw: BLAKE2b of the stream's name and counters.

    Neighbouring counters therefore give unrelated seeds.
    """
    text = ":".join([str(seed), name, *(str(int(counter)) for counter in counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, name: str, *counters: int) -> torch.Generator:
    """A fresh generator for one stream, on the CPU so that all devices get the same draws."""
    return torch.Generator().manual_seed(stream_seed(seed, name, *counters))


def normal(
    shape: tuple[int, ...], seed: int, name: str, *counters: int, pinned: bool = False
) -> Tensor:
    """Standard normal float32 tensor of `shape`; pinned: in memory that a GPU can copy from."""
    return torch.randn(shape, generator=generator(seed, name, *counters), pin_memory=pinned)


def uniform(shape: tuple[int, ...], seed: int, name: str, *counters: int) -> Tensor:
    """Uniform float64 tensor of `shape` in [0, 1)."""
    return torch.rand(shape, generator=generator(seed, name, *counters), dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Draw:
    """The randomness of one micro-batch.

    Positions count the samples of a run from its beginning, over all processes. update_start: where
    this update's samples begin; update_size: how many they are; micro_start: where this
    micro-batch's begin; positions: one for each sample.
    """

    seed: int
    update_start: int
    update_size: int
    micro_start: int
    positions: tuple[int, ...]

    def normal(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """[B, *shape]: each sample's own noise."""
        return torch.stack([normal(shape, self.seed, name, n) for n in self.positions]).to(like)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """[B, *shape] in [0, 1), float64: each sample's own."""
        return torch.stack([uniform(shape, self.seed, name, n) for n in self.positions])

    def coin(self, name: str, shared_by: Literal["update", "micro", "sample"]) -> Tensor:
        """[B] in [0, 1), float64: one value for each update, micro-batch or sample.

        Those of samples are stratified: of n in an update, each nth part of [0, 1) holds one.
        """
        if shared_by == "sample":
            return self.strata(name)
        start = self.update_start if shared_by == "update" else self.micro_start
        return uniform((), self.seed, name, start).expand(len(self.positions))

    def strata(self, name: str) -> Tensor:
        """[B] in [0, 1), float64: over the whole update one in each of its equal parts."""
        order = generator(self.seed, f"{name} order", self.update_start)
        part = torch.randperm(self.update_size, generator=order)
        places = torch.tensor(self.positions) - self.update_start
        return (part[places] + self.uniform(name)) / self.update_size

    def in_turn(self, name: str, num_options: int, turn: int) -> int:
        """One of `num_options`, the same on every process.

        Of any n turns that begin at a multiple of n, each takes another of the n options, in an
        order of their own.
        """
        order = generator(self.seed, name, turn // num_options)
        return int(torch.randperm(num_options, generator=order)[turn % num_options])

    def choice(self, name: str, num_options: int) -> int:
        """One of `num_options`, the same for the whole update on every process."""
        return int(uniform((), self.seed, name, self.update_start) * num_options)
