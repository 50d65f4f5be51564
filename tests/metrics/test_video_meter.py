"""Numbers of whole videos: definitions by hand, and distortions that each move their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from selfforcing_dfd.metrics.video import Slope, Thinned, VideoMeter, measure
from selfforcing_dfd.rng import normal, uniform

FPS = 8.0


def clip(frames: int = 40, shift: int = 2) -> Tensor:
    """uint8 [T, H, W, 3]: a coloured random picture that moves to the right."""
    picture = uniform((64, 96, 3), 0, "picture")
    smooth = sum(picture.roll((r, c), (0, 1)) for r in range(8) for c in range(8)) / 64
    spread = (smooth - smooth.mean()) / smooth.std()
    moving = [spread.roll(shift * n, 1) for n in range(frames)]
    return (128 + 45 * torch.stack(moving)).clamp(0, 255).to(torch.uint8)


def of(video: Tensor, **settings: int) -> dict[str, float]:
    return measure(video, FPS, **settings)


def test_differences_are_what_their_definitions_say():
    """Catches another normaliser, and a second difference of the wrong frames."""
    video = clip(12).float()
    found = of(clip(12))
    step = video.diff(dim=0).abs().mean((1, 2, 3))
    assert found["difference"] == pytest.approx(float(step.mean()), rel=1e-5)
    assert found["temporal_flicker"] == pytest.approx(1 - float(step.mean()) / 255, rel=1e-6)
    residual = (2 * video[1:-1] - video[:-2] - video[2:]).abs().mean() / 2
    assert found["residual"] == pytest.approx(float(residual), rel=1e-5)
    assert found["largest_difference"] == pytest.approx(float(step.max() / step.median()), rel=0.01)
    grey = (video @ torch.tensor([0.299, 0.587, 0.114])).mean((1, 2))
    flicker = (grey[:-2] - 2 * grey[1:-1] + grey[2:]).abs().mean()
    assert found["luma_flicker"] == pytest.approx(float(flicker), abs=1e-4)


def jump(video: Tensor) -> Tensor:
    """Every fourth frame leaps, where chunks of four begin."""
    place = torch.arange(len(video))
    return torch.stack(
        [frame.roll(6 * int(n // 4), 0) for n, frame in zip(place, video, strict=True)]
    )


def there_and_back(video: Tensor) -> Tensor:
    return torch.cat([video[:20], video[:20]])


def brighter_and_darker(video: Tensor) -> Tensor:
    sign = 1 - 2 * (torch.arange(len(video)) % 2)
    return (video.float() + 12 * sign[:, None, None, None]).clamp(0, 255).to(torch.uint8)


def fading(video: Tensor) -> Tensor:
    share = torch.linspace(1, 0.3, len(video))[:, None, None, None]
    return (128 + share * (video.float() - 128)).to(torch.uint8)


def noisy(video: Tensor) -> Tensor:
    noise = 12 * normal(tuple(video.shape), 0, "noise")
    return (video.float() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("distort", "name", "sign"),
    [
        (lambda video: video[:1].expand_as(video), "frozen", 1),
        (lambda video: video[:1].expand_as(video), "flow", -1),
        (lambda video: video[:1].expand_as(video), "difference_by_contrast", -1),
        (brighter_and_darker, "luma_flicker", 1),
        (noisy, "residual_share", 1),
        (noisy, "difference", 1),
        (jump, "seam_excess", 1),
        (there_and_back, "repeats", 1),
        (fading, "drift_contrast", -1),
        (fading, "slope_contrast", -1),
    ],
)
def test_each_distortion_moves_its_number(
    distort: Callable[[Tensor], Tensor], name: str, sign: int
):
    """Catches a number that does not see what it is for."""
    before, after = of(clip(), chunk=4)[name], of(distort(clip()), chunk=4)[name]
    assert sign * (after - before) > 0.05 * max(abs(before), 0.02)


def test_a_frozen_video_is_frozen_and_a_loop_repeats_itself():
    """Catches thresholds that no video can reach."""
    still = of(clip()[:1].expand(40, -1, -1, -1))
    assert still["frozen"] == 1
    assert still["dynamic"] == 0
    assert of(clip())["frozen"] == 0
    assert of(there_and_back(clip()))["repeats"] == pytest.approx(1)


def test_motion_is_in_pixels_of_a_flow_step():
    """Catches a flow between neighbouring frames where frames 1 / 8 s apart are meant."""
    slow = measure(clip(40, shift=1), 16.0)
    quick = measure(clip(40, shift=2), 8.0)
    assert slow["flow"] == pytest.approx(2, abs=0.2)
    assert quick["flow"] == pytest.approx(2, abs=0.2)
    assert slow["end_x"] == pytest.approx(2 * 19 / 96, rel=0.1)


def test_a_video_moves_if_enough_of_its_pairs_do():
    """Catches the rule of VBench's dynamic degree turned round. 1.5 px is the bound at 64 rows."""
    assert of(clip(40, shift=1))["dynamic"] == 0
    assert of(clip(40, shift=3))["dynamic"] == 1
    few = torch.cat([clip(36, shift=0), clip(5, shift=3)])
    assert of(few)["dynamic"] == 0


def test_drift_is_the_last_second_less_the_first():
    """Catches drift over the whole video, or of its first and last frame."""
    video = clip(40)
    dark = (video[-8:].float() * 0.5).to(torch.uint8)
    found = of(torch.cat([video[:-8], dark]))
    wanted = (dark.float().mean() - video[:8].float().mean()) / 255
    assert found["drift_luma"] == pytest.approx(float(wanted), abs=2e-3)


def test_a_slope_is_that_of_least_squares():
    """Catches running sums that drift; a line over hours keeps its slope."""
    slope = Slope()
    times = torch.arange(4000, dtype=torch.float64) / 16
    values = 0.3 * times + 2 + normal((4000,), 0, "values").double()
    for time, value in zip(times.tolist(), values.tolist(), strict=True):
        slope.add(time, value)
    centred = times - times.mean()
    wanted = (centred * (values - values.mean())).sum() / centred.square().sum()
    assert slope.value == pytest.approx(float(wanted), rel=1e-9)


def test_memory_does_not_grow_with_the_video():
    """Catches lists with something for every frame."""
    thinned = Thinned(16)
    for n in range(1000):
        thinned.add(torch.tensor(n))
    places = [place for place, _ in thinned.kept]
    assert len(places) <= 16
    assert [int(value) for _, value in thinned.kept] == places
    assert len({later - earlier for earlier, later in pairwise(places)}) == 1
    meter = VideoMeter(FPS)
    for frame in clip(4).repeat(60, 1, 1, 1):
        meter.add(frame)
    assert len(meter.last_second) == FPS
    assert len(meter.recent) == 2
    assert len(meter.brightness) == 3


def test_too_few_frames_give_no_number():
    """Catches a zero that reads like a measurement."""
    one = of(clip(1))
    assert math.isnan(one["difference"])
    assert math.isnan(one["flow"])
    assert math.isnan(one["dynamic"])
    assert 0 < one["contrast"] < 1
    with pytest.raises(ValueError, match="those before"):
        measure([clip(1)[0], clip(1)[0][:32]], FPS)
