"""Differences between two methods over paired runs: equal start, draws and clips, other method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, t

EXACT_RUNS = 16  # up to so many runs all sign flips are tried
LEVEL = 0.05  # of two-sided tests
POWER = 0.8  # chance to show an effect that is there


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


@dataclass(frozen=True, slots=True)
class Signs:
    """How many differences lie below 0, above it and at it, and the exact two-sided p.

    Ties say nothing of a direction and are left out of the test. p is 1 where all are ties.
    """

    lower: int
    higher: int
    ties: int
    p: float


def sign_test(differences: Sequence[float]) -> Signs:
    """The sign test: it assumes that pairs are independent, and nothing else."""
    lower = sum(value < 0 for value in differences)
    higher = sum(value > 0 for value in differences)
    told = lower + higher
    p = float(binomtest(lower, told).pvalue) if told else 1.0
    return Signs(lower, higher, len(differences) - told, p)


def smallest_effect(differences: Sequence[float]) -> float:
    """The mean difference that so many pairs of this spread show in four of five repetitions.

    For a two-sided t test at 5 %: (t(.975) + t(.8)) standard errors. Infinite for one pair.
    """
    num_pairs = len(differences)
    if num_pairs < 2:
        return math.inf
    error = float(np.std(differences, ddof=1)) / math.sqrt(num_pairs)
    freedom = num_pairs - 1
    return float(t.ppf(1 - LEVEL / 2, freedom) + t.ppf(POWER, freedom)) * error


def fewest_pairs() -> int:
    """From so many pairs on a sign test can fall below its level, if all have one sign."""
    return math.ceil(1 - math.log2(LEVEL))
