"""Paired differences: intervals that hold what they say, and an exact test beside them."""

from __future__ import annotations

import math

import pytest
import torch

from selfforcing_dfd.evaluation.paired import paired
from selfforcing_dfd.rng import generator


def test_interval_is_students():
    """Catches a normal quantile, which is half as wide for three runs, and a biased variance."""
    found = paired([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)  # t quantile of 2 degrees of freedom; standard deviation 1
    assert found.mean == 2
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert found.sign == 0
    assert paired([-1.0, -1.01, -1.02]).sign == -1


def test_intervals_hold_the_truth():
    """Catches intervals that are too narrow for few runs: 95 % of 2,000 hold a mean of 0.

    Fewer than 1,870 would with probability .001.
    """
    draws = torch.randn(2000, 4, generator=generator(0, "test paired")).tolist()
    assert 1870 <= sum(paired(values).sign == 0 for values in draws) <= 1930


def test_sign_flips_are_exact():
    """Catches a one-sided count: of the 8 flips of three equal differences two are as extreme."""
    assert paired([1.0, 1.0, 1.0]).flip_p == 2 / 8
    assert paired([1.0, -1.0]).flip_p == 1
    assert paired([0.3, 0.2, 0.1, -0.1]).flip_p == pytest.approx(6 / 16)
    assert math.isnan(paired([1.0] * 17).flip_p)


def test_one_run_says_nothing_of_the_method():
    """Catches an interval without width from one run."""
    one = paired([5.0])
    assert (one.mean, one.sign, one.flip_p) == (5, 0, 1)
    assert one.low == -math.inf
    with pytest.raises(ValueError, match="one for each run"):
        paired([])
