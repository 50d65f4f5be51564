"""Counter-based randomness: every draw is a function of what it is for, never of what was drawn
before.

A stream is named by `(seed, name, *counters)`, for example `(0, "noise", student_update, sample)`.
Nothing random has to be saved, ranks need no broadcast, and resuming or changing the number of
processes cannot change a draw.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def stream_seed(seed: int, name: str, *counters: int) -> int:
    """A 63-bit seed for one draw: BLAKE2b of the stream's name and counters, so that neighbouring
    counters are unrelated.
    """
    text = ":".join([str(seed), name, *(str(int(counter)) for counter in counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, name: str, *counters: int) -> torch.Generator:
    """A fresh CPU generator for one stream. CPU, so that a run draws the same numbers on every
    device.
    """
    return torch.Generator().manual_seed(stream_seed(seed, name, *counters))


def normal(shape: tuple[int, ...], seed: int, name: str, *counters: int) -> Tensor:
    """Standard normal float32 tensor of `shape`."""
    return torch.randn(shape, generator=generator(seed, name, *counters))


def uniform(shape: tuple[int, ...], seed: int, name: str, *counters: int) -> Tensor:
    """Uniform float64 tensor of `shape` in [0, 1)."""
    return torch.rand(shape, generator=generator(seed, name, *counters), dtype=torch.float64)
