"""The order in which training reads samples.

The state of a data stream is one integer: the position in an endless order that is a function of
(seed, epoch). Workers and ranks only decide who reads a position.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.data.ahead import in_order
from selfforcing_dfd.data.shards import Batch, Sample, ShardReader
from selfforcing_dfd.models.picture import Picture, picture_channels


class SampleOrder:
    """An endless order: position n of the stream is sample `arrangement(n // N)[n % N]`.

    Every sample comes exactly once per epoch. aside: samples that are left out, with the position
    from which on; another one, drawn for that position, comes in their place, so all others stay
    where they are. ValueError if nothing is left.
    """

    def __init__(self, num_samples: int, seed: int, aside: Mapping[int, int] | None = None):
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; want at least 1")
        self.aside = dict(aside or {})
        if len(self.aside) >= num_samples:
            raise ValueError(f"all {num_samples} samples are set aside; none is left to train on")
        self.num_samples = num_samples
        self.seed = seed
        # two, as a batch may straddle epochs
        self._arrangement = lru_cache(maxsize=2)(self.arrangement)

    def sample_at(self, position: int) -> int:
        """The sample number at a position of the stream, 0 <= position without end."""
        epoch, rest = divmod(position, self.num_samples)
        number = self._arrangement(epoch)[rest]
        attempt = 0
        while position >= self.aside.get(number, math.inf):
            drawn = rng.uniform((), self.seed, "instead", position, attempt)
            number = int(drawn * self.num_samples)
            attempt += 1
        return number

    def arrangement(self, epoch: int) -> list[int]:
        """All sample numbers in the order of one epoch."""
        generator = rng.generator(self.seed, "order", epoch)
        return torch.randperm(self.num_samples, generator=generator).tolist()


def load_batch(reader: ShardReader, order: SampleOrder, start: int, size: int) -> Batch:
    """The samples at positions start, start + 1, ... start + size - 1."""
    samples = [read_at(reader, order, position) for position in range(start, start + size)]
    latents = torch.stack([sample.latents for sample in samples])
    text = torch.stack([sample.text for sample in samples])
    noise = [sample.noise for sample in samples if sample.noise is not None]
    captions = tuple(sample.caption for sample in samples)
    keys = tuple(sample.key for sample in samples)
    stacked_noise = torch.stack(noise) if noise else None
    pictures = [sample.picture for sample in samples if sample.picture is not None]
    picture = picture_of(pictures) if pictures else None
    return Batch(latents, text, captions, keys, stacked_noise, reader.has_clips, picture)


def picture_of(stored: list[tuple[Tensor, Tensor]]) -> Picture:
    """The pictures of a batch, from latents and tokens as they are stored."""
    latents, tokens = zip(*stored, strict=True)
    return Picture(picture_channels(torch.stack(latents)), torch.stack(tokens))


def read_at(reader: ShardReader, order: SampleOrder, position: int) -> Sample:
    """The sample at a position of the stream, with the caption that is drawn for it there."""
    number = order.sample_at(position)
    return reader.read(number, reader.level_at(number, order.seed, position))


def batches(
    reader: ShardReader, order: SampleOrder, starts: Iterable[int], size: int, num_workers: int = 0
) -> Iterator[Batch]:
    """`load_batch` for each of `starts`, in order; they may be endless.

    Rank r of R with batches of B starts at r B, r B + R B, ... Workers only read ahead.
    """
    return in_order(lambda start: load_batch(reader, order, start, size), starts, num_workers)
