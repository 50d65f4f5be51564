"""Figures worked out by hand."""

from __future__ import annotations

from itertools import accumulate

import pytest

from selfforcing_dfd.benchmark.statistics import growth_per_thousand, jitter, playout, summary

EXACT = 1e-12  # sums of a few floats of order one


@pytest.mark.parametrize(
    ("samples", "name", "value"),
    [
        ([4.0, 1.0, 3.0, 2.0], "p50", 2.5),  # between the second and the third
        ([1.0, 2.0, 3.0, 4.0, 5.0], "p50", 3.0),
        ([10.0, 20.0], "p95", 19.5),
        (list(range(101)), "p99", 99.0),
        ([7.0], "p99", 7.0),
    ],
)
def test_percentiles_interpolate_between_sorted_samples(samples, name, value):
    """Catches nearest-rank percentiles, unsorted input and an index one too far."""
    assert summary(samples)[name] == pytest.approx(value, abs=EXACT)


def test_summary_has_the_tail():
    """Catches p95 and p99 exchanged, and a maximum that is a percentile."""
    assert summary([*range(100), 1000.0]) == pytest.approx(
        {"p50": 50, "p95": 95, "p99": 99, "max": 1000}, abs=EXACT
    )


def test_jitter_is_the_spread_of_intervals():
    """Catches the spread of ready times, or a variance, in place of the spread of intervals.

    Intervals of 1, 1, 3, 3 have mean 2 and spread 1.
    """
    assert jitter([1.0, 1.0, 3.0, 3.0]) == pytest.approx(
        {"std": 1.0, "p99_minus_p50": 1.0}, abs=EXACT
    )
    assert jitter([5.0, 5.0, 5.0]) == {"std": 0.0, "p99_minus_p50": 0.0}


def test_a_stream_faster_than_playback_misses_nothing():
    """Catches deadlines counted from the wrong frame: two are made a second, one is shown."""
    result = playout([10.0, 11.0, 12.0], [2, 2, 2], playback_fps=1.0, buffer_chunks=0)
    assert (result.miss_rate, result.min_buffer_ms) == (0.0, 0.0)


def test_a_late_chunk_misses_the_frames_whose_turn_has_passed():
    """Catches a miss counted by chunk, and a buffer measured at a chunk's last frame.

    Shown at two a second, with no buffer: the second chunk's four frames are due 2.0, 2.5, 3.0 and
    3.5 seconds after the first chunk; at 2.75 s two of them are late, the first by 0.75 s.
    """
    result = playout([5.0, 7.75], [4, 4], playback_fps=2.0, buffer_chunks=0)
    assert result.miss_rate == pytest.approx(2 / 8, abs=EXACT)
    assert result.min_buffer_ms == pytest.approx(750, abs=1e-9)


def test_the_buffer_delays_every_deadline():
    """Catches a buffer that is subtracted, or that is read as seconds.

    One chunk of four frames is two seconds.
    """
    assert playout([5.0, 7.75], [4, 4], playback_fps=2.0, buffer_chunks=1).miss_rate == 0.0
    assert playout(
        [5.0, 9.75], [4, 4], playback_fps=2.0, buffer_chunks=1
    ).miss_rate == pytest.approx(2 / 8, abs=EXACT)


def test_a_deadline_met_exactly_is_met():
    """Catches a missed deadline that is only rounding.

    Chunks arrive exactly at the pace of playback, at a rate that is no binary fraction.
    """
    ready = list(accumulate([12 / 16.1] * 200))
    assert playout(ready, [12] * 200, playback_fps=16.1, buffer_chunks=0).miss_rate == 0.0


def test_min_buffer_is_enough_and_no_more():
    """Catches a minimum that is not: with it no frame is late, with a little less one is."""
    ready = [0.0, 1.9, 2.0, 4.4, 4.5]
    frames = [12, 12, 9, 12, 12]
    needed_s = playout(ready, frames, playback_fps=16.0).min_buffer_ms / 1000
    in_chunks = needed_s * 16.0 / 12
    assert playout(ready, frames, playback_fps=16.0, buffer_chunks=in_chunks).miss_rate == 0.0
    assert (
        playout(ready, frames, playback_fps=16.0, buffer_chunks=in_chunks - 0.001).miss_rate > 0.0
    )


def test_growth_is_the_slope_of_the_fit():
    """Catches last minus first in place of the slope.

    The values grow by three a sample, with one outlier among five.
    """
    assert growth_per_thousand([0.0, 3.0, 6.0, 9.0]) == pytest.approx(3000, abs=1e-9)
    assert growth_per_thousand([0.0, 0.0, 10.0, 0.0, 0.0]) == pytest.approx(0, abs=1e-9)
    assert growth_per_thousand([7.0]) == 0.0
