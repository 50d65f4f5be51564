"""The noise of a stream's chunks, drawn where nothing waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd import rng


@dataclass(slots=True)
class ChunkNoise(Sequence[Tensor]):
    """The draws of one chunk, each [1, f, C, h, w] float32, as `denoise_chunk` takes them.

    A draw depends on the seed, the chunk and its own number only, so it may be made at any time:
    when it is asked for, while a GPU still works on the step before, or a chunk ahead. It is drawn
    on the CPU, so that all devices get the same one. For a GPU it lies in pinned memory, from which
    the copy makes nothing wait.
    """

    seed: int
    chunk_index: int
    shape: tuple[int, ...]
    num_draws: int
    device: torch.device
    _drawn: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return self.num_draws

    def __getitem__(self, index: Any) -> Any:
        """The draw of that number; those before it are made too."""
        if not 0 <= index < self.num_draws:
            raise IndexError(f"draw {index} of {self.num_draws}")
        self.draw(index + 1)
        return self._drawn[index]

    def draw(self, count: int | None = None) -> None:
        """Make the first `count` draws, by default all, and start copying them."""
        pinned = self.device.type == "cuda"
        for number in range(len(self._drawn), self.num_draws if count is None else count):
            key = (self.seed, "stream noise", self.chunk_index, number)
            drawn = rng.normal(self.shape, *key, pinned=pinned)
            self._drawn.append(drawn.to(self.device, non_blocking=True))

    def is_for(self, seed: int, chunk_index: int, num_draws: int) -> bool:
        """Whether these are the draws of that chunk."""
        return (self.seed, self.chunk_index, self.num_draws) == (seed, chunk_index, num_draws)
