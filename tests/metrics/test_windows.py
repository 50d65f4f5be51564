"""Numbers of the stretches of a long video."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfforcing_dfd.metrics.video import measure
from selfforcing_dfd.metrics.windows import WindowMeter


def frames(count: int) -> Tensor:
    """uint8 [T, 24, 24, 3] of noise that becomes brighter."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 100, (count, 24, 24, 3), generator=random)
    return (noise + torch.arange(count)[:, None, None, None]).to(torch.uint8)


def test_a_stretch_is_measured_like_a_video_of_its_own():
    """Catches stretches that overlap, leave frames out, or see those of the stretch before."""
    video = frames(50)
    meter = WindowMeter(8.0, 16)
    for frame in video:
        meter.add(frame)
    found = meter.windows()
    assert [(window.start_s, window.frames) for window in found] == [(0, 16), (2, 16), (4, 16)]
    for number, window in enumerate(found):
        alone = measure(video[16 * number : 16 * number + 16], 8.0)
        assert window.numbers == pytest.approx(alone, nan_ok=True)


def test_a_last_stretch_counts_from_half_the_length():
    """Catches a last point of a curve that stands for two frames, and a video that is cut off."""
    for count, windows in ((55, 3), (56, 4), (16, 1), (7, 0)):
        meter = WindowMeter(8.0, 16)
        for frame in frames(count):
            meter.add(frame)
        assert len(meter.windows()) == windows


def test_seams_are_found_in_every_stretch():
    """Catches chunks that are counted from the beginning of a stretch."""
    still = torch.zeros(90, 24, 24, 3, dtype=torch.uint8)
    ways = torch.arange(90)
    chunk_of = (ways - 9).div(12, rounding_mode="floor") + 1
    video = still + (40 * (chunk_of % 2))[:, None, None, None].to(torch.uint8)
    video[:, ::2] += 50  # some contrast
    meter = WindowMeter(8.0, 30, 12, 9)
    for frame in video:
        meter.add(frame)
    for window in meter.windows():
        # all of the change is where chunks begin: the difference there, in units of the mean
        assert window.numbers["seam_excess"] > 5


def test_one_stretch_is_in_memory():
    """Catches a curve over minutes that keeps its frames or its meters."""
    meter = WindowMeter(8.0, 16)
    for frame in frames(40):
        meter.add(frame)
    assert meter.meter is not None
    assert meter.meter.frames == 8
    assert all(isinstance(each, float) for window in meter.done for each in window.numbers.values())
