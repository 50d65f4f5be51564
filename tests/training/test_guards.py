"""Guards: two-sided, against the data, and heard of."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.world import draw_factors, render
from selfforcing_dfd.training.guards import GuardError, Guards, latent_statistics, pixel_statistics

REAL = render(draw_factors(4, rng.generator(0, "guards")), 9)


def identity(latents: Tensor) -> Tensor:
    return latents


def blurred(videos: Tensor, reach: int = 2) -> Tensor:
    """Means over all pixels that are at most `reach` lines and columns away."""
    shifts = range(-reach, reach + 1)
    moved = [videos.roll((down, right), dims=(2, 3)) for down in shifts for right in shifts]
    return torch.stack(moved).mean(dim=0)


def grey(videos: Tensor, share: float) -> Tensor:
    """Colours moved towards their own grey."""
    return torch.lerp(videos, videos.mean(-1, keepdim=True).expand_as(videos), share)


@pytest.mark.parametrize(
    ("changed", "moved"),
    [
        (grey(REAL, 0.6), {"saturation"}),
        (REAL[:1].expand_as(REAL), {"spread"}),
        (REAL[:, :1].expand_as(REAL), {"motion"}),
        (blurred(REAL), {"sharpness"}),
        (
            torch.lerp(REAL, torch.full_like(REAL, 0.35), 0.6),
            {"saturation", "contrast", "motion", "spread"},
        ),
    ],
    ids=["grey", "one clip for all", "still", "blurred", "pale"],
)
def test_each_failure_moves_its_own_number(changed: Tensor, moved: set[str]) -> None:
    """Catches a statistic that watches something else: desaturation must not read as motion."""
    before = pixel_statistics(REAL)
    after = pixel_statistics(changed)
    fallen = {name for name in before if after[name] < 0.6 * before[name]}
    assert moved <= fallen
    if len(moved) == 1:
        assert {name for name in before if not 0.6 <= after[name] / before[name] <= 1.6} == moved


def test_blur_and_noise_move_sharpness_of_latents_either_way(codec: TinyCodec) -> None:
    """Catches a sharpness of latents that blur does not lower. A latent pixel is 8 pixels wide."""
    before = latent_statistics(codec.encode(REAL))["sharpness"]
    assert latent_statistics(codec.encode(blurred(REAL, 8)))["sharpness"] < 0.7 * before
    noise = 0.1 * rng.normal(tuple(REAL.shape), 0, "guards noise")
    assert latent_statistics(codec.encode(REAL + noise))["sharpness"] > 1.05 * before
    assert pixel_statistics(REAL + noise)["sharpness"] > 1.5 * pixel_statistics(REAL)["sharpness"]
    assert pixel_statistics(torch.zeros_like(REAL))["sharpness"] == 0


def test_own_data_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a false alarm: data against itself has ratio one."""
    values = Guards(identity, 0.1)(REAL, REAL)
    assert not caplog.records
    assert values["guards_outside"] == 0
    assert values["contrast_ratio"] == 1


@pytest.mark.parametrize("share", [0.6, -1.0], ids=["too little", "too much"])
def test_both_sides_warn_once(caplog: pytest.LogCaptureFixture, share: float) -> None:
    """Catches a one-sided guard, for which grey is a success, and a warning at every update."""
    guards = Guards(identity, 0.3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            guards(grey(REAL, share), REAL)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the student's samples leave the data's range"
    ]


def test_stop_ends_the_run() -> None:
    """Catches a stop that only warns."""
    with pytest.raises(GuardError, match=r"saturation .* \(data .*guards\.stop is on"):
        Guards(identity, 0.3, stop=True)(grey(REAL, 0.9), REAL)


def test_pictures_show_both_sides_frame_by_frame() -> None:
    """Catches pictures of one side only, with axes mixed up, or of latents, which show nothing."""
    pictures = Guards(identity, 0.3).pictures(REAL * 0, REAL)
    assert not pictures["samples"].any()
    height, width = REAL.shape[2:4]
    assert pictures["data"].shape == (len(REAL), height, 4 * width, 3)
    last = REAL[:, -1].mul(255).round().to(torch.uint8)
    assert torch.equal(pictures["data"][:, :, -width:], last)
    assert Guards(identity, 0.3, measure=latent_statistics).pictures(REAL, REAL) == {}
