"""Scores of readings: what they notice, what they do not reward, and how wide they are."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_clips import Clips, draw
from torch import Tensor

from selfforcing_dfd.rng import generator, uniform
from selfforcing_dfd.tiny import world
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.metrics import Score, beta_6_6, kl_floor, mode_laws, summarise
from selfforcing_dfd.tiny.readout import MAX_OFF_AXIS, MIN_SPEED, Reading, read

N = 384


def reading_of(factors: world.Factors) -> Reading:
    """The reading of clips rendered from these factors, without rendering.

    test_readout shows that it is exact.
    """
    flat = torch.zeros(len(factors))
    chunks = torch.zeros(len(factors), 3)
    speed_px = world.SPEED_PX[factors.speed]
    return Reading(
        shape=factors.shape,
        hue=factors.hue,
        direction=factors.direction,
        speed=factors.speed,
        size=factors.size,
        speed_px=speed_px,
        off_axis=flat,
        saturation=factors.saturation,
        contrast=(world.colour(factors.hue, factors.saturation) - world.BACKGROUND).norm(dim=-1),
        jitter=flat,
        psnr=flat + 50,
        explained=flat + 1,
        valid=flat == 0,
        saturation_by_chunk=factors.saturation[:, None].expand(-1, 3),
        contrast_by_chunk=chunks,
        speed_by_chunk=speed_px[:, None].expand(-1, 3),
        direction_by_chunk=factors.direction[:, None].expand(-1, 3),
        hue_by_chunk=factors.hue[:, None].expand(-1, 3),
        valid_by_chunk=chunks == 0,
        seam_jumps=chunks[:, 1:],
        seam_excess=flat,
        pixels=torch.stack([factors.x, factors.y], dim=-1) / world.SIDE,
    )


def tempered(power: float, seed: int) -> Reading:
    """Draws from prior ** power: a model that prefers what is common."""
    draws = generator(seed, "test tempered")
    factors = world.draw_factors(N, draws)
    priors = {
        "hue": world.HUE_PRIOR,
        "direction": world.DIRECTION_PRIOR,
        "speed": world.SPEED_PRIOR,
    }
    drawn = {}
    for name, prior in priors.items():
        drawn[name] = torch.multinomial(prior**power, N, replacement=True, generator=draws)
    return reading_of(dataclasses.replace(factors, **drawn))


def changed(one: dict[str, Score], other: dict[str, Score]) -> set[str]:
    """The scores that differ by more than .02 and whose intervals do not meet.

    All scores are of order 1 in their units. Shares are left out: they follow from the modes.
    """
    apart = {
        name for name in one if one[name].high < other[name].low or other[name].high < one[name].low
    }
    return {
        name
        for name in apart
        if abs(one[name].value - other[name].value) > 0.02 and not name.startswith("share_")
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_data_has_the_modes_of_the_data(seed: int) -> None:
    """Catches a wrong expectation, a transposed prior and a wrong W1.

    The floor's own interval holds 95 % of samples of the data; each KL of one factor is small.
    """
    scores = summarise(tempered(1, seed))
    assert 0.9 <= scores["coverage"].value <= 1.1
    floor = scores["kl_floor"]
    assert floor.low <= scores["kl_prior_sample"].value <= floor.high
    for factor in ("hue", "direction", "speed"):
        assert scores[f"kl_{factor}"].value < 0.04
    assert scores["saturation_w1"].value < 0.03
    shares = [scores[f"share_{name}"].value for name in world.HUES]
    assert torch.tensor(shares).sub(world.HUE_PRIOR).abs().max() < 0.08


def test_clips_of_the_data_move_and_cover_the_modes(codec: TinyCodec) -> None:
    """Catches thresholds that throw out clips of the data, which the codec makes uneven.

    All 256 of 256 clips count as moving after one round trip; the slowest has .49 pixels a video
    frame and the most oblique is .4 degrees off its axis, so both thresholds are far away.
    """
    factors = world.draw_factors(256, generator(7, "time"))
    parts = [factors[slice(start, start + 64)] for start in range(0, 256, 64)]
    shown = [read(codec.decode(codec.encode(world.render(part)))) for part in parts]
    reading = Reading.join(shown)
    scores = summarise(reading)
    assert scores["moving"].value == 1
    assert reading.speed_px.min() > 1.8 * MIN_SPEED
    assert reading.off_axis.max() < 0.1 * MAX_OFF_AXIS
    assert torch.equal(reading.mode, world.mode(factors.hue, factors.direction, factors.speed))
    assert scores["coverage"].low < 1 < scores["coverage"].high
    assert scores["kl_prior_sample"].value <= scores["kl_floor"].high


def test_standing_still_wins_nothing(clips: Clips) -> None:
    """Catches scores that a frozen model wins: these shapes drift .02 pixels in some direction.

    By direction alone, without asking for motion, they would hit most modes of hue and direction.
    """
    factors = clips.factors
    angle = 2 * math.pi * uniform((len(factors),), 0, "test drift").float()
    drift = 0.02 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    centres = world.track(factors, 1) + drift[:, None] * torch.arange(33)[:, None]
    frozen = read(draw(factors, centres, factors.saturation[:, None].expand(-1, 33)))
    assert frozen.valid.all()
    scores = summarise(frozen)
    assert scores["moving"].value == scores["modes"].value == scores["coverage"].value == 0
    assert scores["kl_prior_sample"].value > 3 * scores["kl_floor"].high
    assert scores["share_still"].value == 1
    assert math.isnan(scores["share_right"].value)
    assert scores["kl_direction"].value > 2
    assert scores["kl_hue"].value < 0.2  # a red disc that stands still is red


def test_motion_between_two_directions_is_none() -> None:
    """Catches modes of a diagonal, which is as much the one direction as the other."""
    reading = tempered(1, 0)
    reading = dataclasses.replace(reading, off_axis=torch.full((N,), 44.0))
    assert summarise(reading)["modes"].value == 0


def test_clips_that_do_not_move_are_missed() -> None:
    """Catches shares of the moving clips alone, by which fewer clips would look as good as all."""
    reading = tempered(1, 0)
    half = torch.arange(N) % 2 == 0
    still = dataclasses.replace(reading, speed_px=torch.where(half, 0.0, reading.speed_px))
    whole = summarise(reading)
    scores = summarise(still)
    assert scores["moving"].value == 0.5
    assert scores["kl_prior_sample"].n == whole["kl_prior_sample"].n == N
    missing = scores["kl_direction"].value - whole["kl_direction"].value
    assert missing == pytest.approx(math.log(2), abs=0.03)


def test_tempering_lowers_coverage_and_raises_the_divergence() -> None:
    """Catches metrics that do not notice mode seeking.

    The law p^4 hits a third of what the data hits in 384 draws; p^2 lies between.
    """
    data, mild, strong = (summarise(tempered(power, 0)) for power in (1, 2, 4))
    assert strong["coverage"].value < 0.4
    kl = "kl_prior_sample"
    assert data[kl].high < mild[kl].low < mild[kl].high < strong[kl].low
    assert data["coverage"].low > mild["coverage"].high > strong["coverage"].high
    assert changed(data, strong) == {
        "modes",
        "coverage",
        "kl_prior_sample",
        "kl_hue",
        "kl_direction",
        "kl_speed",
        "contrast",
        "speed_px",
    }


def test_floor_falls_with_the_number_of_clips() -> None:
    """Catches a floor that is not of as many clips: KL falls by itself with more of them."""
    few, many = (kl_floor(mode_laws([""] * count)) for count in (96, 384))
    assert few.low > many.high
    assert (few.n, many.n) == (96, 384)


def test_captions_choose_the_law() -> None:
    """Catches a model that is blamed for modes that its captions exclude."""
    reading = tempered(1, 0)
    free = summarise(reading)["kl_prior_sample"].value
    red = dataclasses.replace(reading, hue=torch.zeros(N, dtype=torch.long))
    assert summarise(red)["kl_prior_sample"].value > 2 * free
    asked = summarise(red, ["a red disc moves"] * N)
    assert asked["coverage"].value == pytest.approx(1, abs=0.1)
    assert asked["kl_prior_sample"].value <= asked["kl_floor"].high
    told = [
        f"a small {world.HUES[hue]} disc moves {world.DIRECTIONS[direction]} {world.SPEEDS[speed]}"
        for hue, direction, speed in zip(reading.hue, reading.direction, reading.speed, strict=True)
    ]
    assert summarise(reading, told)["coverage"].value == pytest.approx(1)
    assert summarise(reading, told)["kl_floor"].high < 0.1 * free


def test_saturation_moves_saturation_alone(clips: Clips) -> None:
    """Through pixels. Contrast may follow a little, since a purer colour is another colour."""
    saturation = (clips.factors.saturation * 1.4).clamp(max=1)
    distorted = read(world.render(dataclasses.replace(clips.factors, saturation=saturation)))
    moved = changed(summarise(clips.reading), summarise(distorted))
    assert moved == {"saturation", "saturation_w1"}


def test_drift_moves_drift(clips: Clips) -> None:
    """Catches a drift score that misses a saturation growing by 6 % a latent frame.

    The mean grows with it, and nothing else may move.
    """
    factors = clips.factors
    saturation = (factors.saturation[:, None] * 1.06 ** (torch.arange(33) / 4)).clamp(max=1)
    moved = changed(
        summarise(clips.reading),
        summarise(read(draw(factors, world.track(factors, 33), saturation))),
    )
    assert "saturation_drift" in moved
    assert moved <= {
        "saturation_drift",
        "contrast_drift",
        "saturation",
        "saturation_w1",
        "jitter_px",
    }


def test_jitter_moves_jitter_alone(clips: Clips) -> None:
    """Catches a jitter score that misses jitter, or another score that moves with it.

    Up to 1 px along each axis, independent in every video frame: rms sqrt(2 / 3), less what the
    line fit takes.
    """
    factors = clips.factors
    shake = 2 * uniform((len(factors), 33, 2), 0, "test jitter").float() - 1
    saturation = factors.saturation[:, None].expand(-1, 33)
    scores = summarise(read(draw(factors, world.track(factors, 33) + shake, saturation)))
    assert changed(summarise(clips.reading), scores) == {"jitter_px"}
    assert scores["jitter_px"].value == pytest.approx(math.sqrt(2 / 3), abs=0.05)


def test_the_mean_of_clips_moves_validity_contrast_and_spread(clips: Clips) -> None:
    """By saturation alone it would pass for a cure of over-saturation."""
    faint = summarise(read(clips.videos.unflatten(0, (2, -1)).mean(dim=0)))
    assert {"valid", "contrast", "spread"} <= changed(summarise(clips.reading), faint)


def test_invalid_clips_are_in_no_mode() -> None:
    """Catches modes counted over all clips: here only invalid clips show the rarer hues."""
    reading = tempered(1, 0)
    reading = dataclasses.replace(reading, valid=reading.hue == 0)
    scores = summarise(reading)
    assert scores["modes"].value <= 12
    assert scores["share_red"].value == 1
    assert scores["valid"].value == pytest.approx((reading.hue == 0).double().mean().item())
    # Expected is what all clips would hit, so a model that fails half the time does not get half
    # the goal.
    expected = (1 - (1 - world.MODE_PRIOR.double()) ** N).sum().item()
    assert scores["coverage"].value == pytest.approx(scores["modes"].value / expected)


def test_nothing_valid_is_no_good_score() -> None:
    """Catches a perfect score for no valid clips: smoothed by the prior, they would follow it."""
    reading = tempered(1, 0)
    scores = summarise(dataclasses.replace(reading, valid=torch.zeros(N, dtype=torch.bool)))
    assert scores["kl_prior_sample"].value > 5
    assert math.isnan(scores["saturation"].value)
    assert scores["valid"].value == scores["modes"].value == 0


def test_captions_are_compared_with_what_is_read() -> None:
    """Catches agreement counted over invalid clips or clips whose caption names no hue."""
    reading = tempered(1, 0)
    asked = ["a disc moves"] * (N // 2) + ["a red disc moves"] * (N // 2)
    valid = torch.arange(N) % 3 > 0
    scores = summarise(dataclasses.replace(reading, valid=valid), asked)
    second = torch.arange(N) >= N // 2
    assert scores["agreement_shape"].value == pytest.approx(
        (reading.shape[valid] == 0).float().mean().item()
    )
    assert scores["agreement_hue"].n == int((valid & second).sum())
    expected = (reading.hue[valid & second] == 0).float().mean().item()
    assert scores["agreement_hue"].value == pytest.approx(expected)
    assert "agreement_size" not in scores
    with pytest.raises(ValueError, match="1 captions for 384 clips"):
        summarise(reading, ["a disc moves"])


def test_intervals_cover_the_truth() -> None:
    """Catches intervals that are too narrow.

    Of 40 intervals of 95 % about 38 hold the law's mean saturation and speed; fewer than 33 in 1 of
    1,000 cases.
    """
    inside = torch.zeros(2)
    for seed in range(40):
        scores = summarise(reading_of(world.draw_factors(100, generator(seed, "test intervals"))))
        speed = (world.SPEED_PX * world.SPEED_PRIOR).sum().item()
        for row, (name, truth) in enumerate((("saturation", 0.5), ("speed_px", speed))):
            inside[row] += scores[name].low <= truth <= scores[name].high
    assert (inside >= 33).all()


def test_values_lie_in_their_intervals_and_repeat() -> None:
    """Catches a value outside its interval, and reports that differ for equal readings.

    A bootstrap of counts of modes is far below the count itself.
    """
    reading = tempered(1, 0)
    scores = summarise(reading)
    assert all(score.low <= score.value <= score.high for score in scores.values())
    assert scores == summarise(reading)
    assert scores != summarise(reading, seed=1)


def test_w1_is_the_shift_of_a_shifted_law() -> None:
    """Beta(6, 6) moved by .1 lies at W1 = .1. Would catch a distance of squares or of densities.

    Saturation has standard deviation .14, so over 4,000 draws the shift is known to .0022: three of
    these.
    """
    factors = world.draw_factors(4000, generator(0, "test w1"))
    reading = reading_of(dataclasses.replace(factors, saturation=factors.saturation + 0.1))
    assert summarise(reading)["saturation_w1"].value == pytest.approx(0.1, abs=0.007)


def test_beta_is_the_law_that_saturation_is_drawn_from() -> None:
    """Kolmogorov's distance of 20,000 draws exceeds .0138 with probability .001."""
    drawn: Tensor = world.draw_factors(20_000, generator(0, "test beta")).saturation.sort().values
    empirical = (torch.arange(20_000) + 0.5) / 20_000
    assert (beta_6_6(drawn.double()) - empirical).abs().max() < 0.0138
