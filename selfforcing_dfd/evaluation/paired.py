"""Differences between two methods over paired runs: equal start, draws and clips, other method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

EXACT_RUNS = 16  # up to so many runs all sign flips are tried


@dataclass(frozen=True, slots=True)
class Paired:
    """The mean difference over runs, with Student's t interval.

    flip_p: exact two-sided p of a test that flips the signs of differences, which assumes nothing
    of their law but symmetry; with R runs it is at least 2^(1 - R). NaN beyond EXACT_RUNS runs.
    One run has an interval without ends.
    """

    mean: float
    low: float
    high: float
    flip_p: float
    num_runs: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def paired(differences: Sequence[float], level: float = 0.95) -> Paired:
    """One difference a run -> mean and interval of this level. Raises ValueError for none."""
    if not differences:
        raise ValueError("no differences; give one for each run")
    values = np.asarray(differences, dtype=np.float64)
    num_runs = len(values)
    mean = float(values.mean())
    if num_runs == 1:
        return Paired(mean, -math.inf, math.inf, 1.0, 1)
    error = float(values.std(ddof=1)) / math.sqrt(num_runs)
    half = float(t.ppf(0.5 + level / 2, num_runs - 1)) * error
    return Paired(mean, mean - half, mean + half, flip_p(values), num_runs)


def flip_p(values: np.ndarray) -> float:
    """Share of all sign flips whose mean is at least as far from 0."""
    if len(values) > EXACT_RUNS:
        return math.nan
    flips = np.array(list(itertools.product((1, -1), repeat=len(values))))
    means = np.abs(flips @ values)
    # sums in another order round differently
    return float((means >= abs(values.sum()) - 1e-12 * np.abs(values).sum()).mean())
