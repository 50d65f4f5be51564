"""Paired differences: intervals that hold what they say, and an exact test beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from selfforcing_dfd.evaluation.paired import (
    LEVEL,
    fewest_pairs,
    paired,
    sign_test,
    smallest_effect,
)
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


def test_sign_test_is_exact_and_leaves_ties_out():
    """Catches a one-sided p, and ties that count for a side."""
    found = sign_test([-1.0, -2.0, -0.5, -3.0, -1.0, -1.0, 0.0])
    assert (found.lower, found.higher, found.ties) == (6, 0, 1)
    assert found.p == pytest.approx(2 / 2**6)
    two_of_twenty = sign_test(18 * [-1.0] + 2 * [1.0])
    assert two_of_twenty.p == pytest.approx(0.0004, abs=5e-5), "as published for 18 of 20"
    assert sign_test([0.0, 0.0]).p == 1


def test_six_pairs_are_the_fewest_that_a_sign_test_can_decide():
    """Catches a note that promises a result which no numbers can give."""
    assert sign_test(fewest_pairs() * [1.0]).p < LEVEL
    assert sign_test((fewest_pairs() - 1) * [1.0]).p > LEVEL


def test_smallest_effect_is_shown_in_four_of_five_repetitions():
    """Catches a power note that promises too much: checked by drawing."""
    random = np.random.default_rng(0)
    values = random.normal(size=(4000, 12))
    smallest = smallest_effect(list(random.normal(size=200_000))) * math.sqrt(200_000)
    # for a known spread of 1 and 12 pairs; the spread of each draw is its own
    shift = smallest_effect(list(values[0] / values[0].std(ddof=1)))
    p = ttest_1samp(values + shift, 0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.02)
    assert smallest == pytest.approx(2.8, abs=0.02), "1.96 + .84 standard errors for many pairs"
    assert smallest_effect([1.0]) == math.inf
