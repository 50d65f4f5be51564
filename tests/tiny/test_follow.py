"""The follow test's scores, on rendered clips that go on well or badly."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_clips import Clips, draw
from torch import Tensor

from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.follow import compare_with_real
from selfforcing_dfd.tiny.readout import Reading, read
from selfforcing_dfd.tiny.world import HEADINGS, SPEED_PX, Factors, track

FIRST = 9  # video frames of the first chunk


def going_on(factors: Factors, step: Tensor) -> Tensor:
    """Tracks [B, 33, 2] that begin as the real ones and go on with steps [B, 2]."""
    centres = track(factors, 33)
    after = torch.arange(1, 33 - FIRST + 1)[:, None] * step[:, None]
    return torch.cat([centres[:, :FIRST], centres[:, FIRST - 1 : FIRST] + after], dim=1)


def shown(factors: Factors, step: Tensor) -> Reading:
    saturation = factors.saturation[:, None].expand(-1, 33)
    return read(draw(factors, going_on(factors, step), saturation))


def test_the_data_follows_itself(codec: TinyCodec, clips: Clips) -> None:
    """Catches a test that real clips fail, by one codec round trip or by the fits of chunks.

    Against themselves all is exactly 1; against the clips before the codec, speed reads 2 to 4 %
    low.
    """
    factors = clips.factors
    once = read(codec.decode(codec.encode(clips.videos)))
    same = compare_with_real(once, once)
    assert same["follow"].value == same["follow_speed"].value == 1
    scores = compare_with_real(once, clips.reading)
    assert scores["follow"].value == 1
    assert scores["follow_direction"].value == scores["follow_hue"].value == 1
    for name in ("", "_slowly", "_steadily", "_quickly", "_1", "_2"):
        assert scores[f"follow_speed{name}"].value == pytest.approx(1, abs=0.05)
    assert scores["follow_jump_px"].value < 0.5
    assert scores["follow_speed_quickly"].n == int((factors.speed == 2).sum())


def test_a_habitual_speed_is_found_out(clips: Clips) -> None:
    """Catches a mean that hides a student which always goes on at .5 pixels, whatever it saw.

    Its slow clips are right and all others wrong.
    """
    factors = clips.factors
    reading = shown(factors, 0.5 * HEADINGS[factors.direction])
    scores = compare_with_real(reading, clips.reading)
    for speed, name in enumerate(("slowly", "steadily", "quickly")):
        expected = 0.5 / SPEED_PX[speed].item()
        assert scores[f"follow_speed_{name}"].value == pytest.approx(expected, abs=0.03)
    assert scores["follow_direction"].value == 1
    slow = (factors.speed == 0).float().mean().item()
    assert scores["follow"].value == pytest.approx(slow)


def test_a_turn_is_no_following(clips: Clips) -> None:
    """Catches a test of the speed alone."""
    factors = clips.factors
    heading = HEADINGS[(factors.direction + 1) % 4]
    scores = compare_with_real(
        shown(factors, SPEED_PX[factors.speed][:, None] * heading), clips.reading
    )
    assert scores["follow"].value == scores["follow_direction"].value == 0
    assert scores["follow_speed"].value == pytest.approx(1, abs=0.03)


def test_standing_still_follows_nothing(clips: Clips) -> None:
    """Catches a direction that is counted although the shape hardly moves."""
    factors = clips.factors
    scores = compare_with_real(shown(factors, 0.02 * HEADINGS[factors.direction]), clips.reading)
    assert scores["follow_direction"].value == scores["follow"].value == 0
    assert scores["follow_hue"].value == 1
    assert scores["follow_speed"].value < 0.05


def test_another_colour_and_nothing_at_all_are_seen_in_their_chunk(clips: Clips) -> None:
    """Catches chunks that are mixed up, and invalid chunks that are left out of shares."""
    factors = clips.factors[slice(0, 16)]
    real = read(clips.videos[:16])
    other = dataclasses.replace(factors, hue=(factors.hue + 3) % 6)
    saturation = factors.saturation[:, None].expand(-1, 33)
    videos = clips.videos[:16].clone()
    videos[:, 21:] = draw(other, track(other, 33), saturation)[:, 21:]
    scores = compare_with_real(read(videos), real)
    assert (scores["follow_hue_1"].value, scores["follow_hue_2"].value) == (1, 0)
    videos = clips.videos[:16].clone()
    videos[:, 9:21] = 0.35
    scores = compare_with_real(read(videos), real)
    assert scores["follow_1"].value == scores["follow_direction_1"].value == 0
    assert scores["follow_direction"].value == 0.5


def test_unequal_sets_are_refused(clips: Clips) -> None:
    """Catches clips that are held against others."""
    with pytest.raises(ValueError, match="read the same clips"):
        compare_with_real(read(clips.videos[:3]), clips.reading)
    short = read(clips.videos[:3, :9])
    with pytest.raises(ValueError, match="single chunk"):
        compare_with_real(short, short)
