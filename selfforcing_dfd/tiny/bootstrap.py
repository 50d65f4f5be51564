"""Means with bootstrap intervals over clips."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selfforcing_dfd.rng import generator

NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Score:
    """A number with its 95 % bootstrap interval over n clips; all NaN without usable clips."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Resamples:
    """How often each clip counts, [R + 1, n].

    Row 0 counts each clip once; the others are bootstrap draws of n clips.
    """

    counts: Tensor

    @classmethod
    def draw(cls, num_clips: int, seed: int, num_resamples: int = NUM_RESAMPLES) -> Resamples:
        """Counter-based, so that equal readings have equal intervals wherever they are computed."""
        random = generator(seed, "tiny bootstrap")
        picks = torch.randint(num_clips, (num_resamples, num_clips), generator=random)
        drawn = torch.zeros(num_resamples, num_clips)
        drawn.scatter_add_(1, picks, torch.ones(picks.shape))
        return cls(torch.cat([torch.ones(1, num_clips), drawn]).double())

    def only(self, which: Tensor) -> Resamples:
        """The same draws with some clips left out.

        The number of clips then varies from draw to draw, as it would in new samples.
        """
        return Resamples(self.counts * which)

    @property
    def num_clips(self) -> int:
        """Clips that count at all."""
        return int(self.counts[0].sum())

    def mean(self, values: Tensor) -> Tensor:
        """Means of values [n] or [n, m] in every row, [R + 1] or [R + 1, m]; NaN without clips."""
        total = self.counts.sum(dim=1)
        mean = self.counts @ values.double()
        return mean / (total if values.ndim == 1 else total[:, None])

    def score(self, rows: Tensor, low: float = -math.inf, high: float = math.inf) -> Score:
        """Value and interval of a statistic that was computed in every row [R + 1].

        The interval is kept within low .. high. Its ends are moved by the bootstrap's own bias
        (mean of the draws minus the value), which is large for counts of modes: a draw of n from n
        clips always misses some.
        """
        value = rows[0]
        drawn = rows[1:][rows[1:].isfinite()]
        if not value.isfinite() or not len(drawn):
            return Score(math.nan, math.nan, math.nan, self.num_clips)
        quantiles = torch.tensor([0.025, 0.975], dtype=drawn.dtype)
        ends = (drawn.quantile(quantiles) - drawn.mean() + value).clamp(low, high)
        return Score(float(value), float(ends[0]), float(ends[1]), self.num_clips)


def spread(pixels: Tensor, every: Resamples) -> Tensor:
    """Standard deviation over clips of pixels [n, m], root mean square over pixels, [R + 1]."""
    pixels = pixels - pixels.mean(dim=0)
    variance = every.mean(pixels.square()) - every.mean(pixels).square()
    return variance.mean(dim=1).clamp_min(0).sqrt()
