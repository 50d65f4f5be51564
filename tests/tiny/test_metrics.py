from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_clips import Clips, draw
from torch import Tensor

from selfforcing_dfd.rng import generator, uniform
from selfforcing_dfd.tiny import world
from selfforcing_dfd.tiny.metrics import Score, beta_6_6, summarise
from selfforcing_dfd.tiny.readout import Reading, read

N = 384


def reading_of(factors: world.Factors) -> Reading:
    """The reading of clips rendered from these factors, without rendering.

    test_readout shows that it is exact.
    """
    flat = torch.zeros(len(factors))
    return Reading(
        shape=factors.shape,
        hue=factors.hue,
        direction=factors.direction,
        speed=factors.speed,
        size=factors.size,
        speed_px=world.SPEED_PX[factors.speed],
        saturation=factors.saturation,
        contrast=(world.colour(factors.hue, factors.saturation) - world.BACKGROUND).norm(dim=-1),
        jitter=flat,
        psnr=flat + 50,
        explained=flat + 1,
        valid=flat == 0,
        saturation_by_chunk=factors.saturation[:, None].expand(-1, 3),
        contrast_by_chunk=flat[:, None].expand(-1, 3),
        seam_excess=flat,
        pixels=torch.stack([factors.x, factors.y], dim=-1) / world.SIDE,
    )


def tempered(power: float, seed: int) -> Reading:
    """Draws from prior ** power: a model that prefers what is common."""
    draws = generator(seed, "test tempered")
    factors = world.draw_factors(N, draws)
    return reading_of(
        dataclasses.replace(
            factors,
            hue=torch.multinomial(world.HUE_PRIOR**power, N, replacement=True, generator=draws),
            direction=torch.multinomial(
                world.DIRECTION_PRIOR**power, N, replacement=True, generator=draws
            ),
        )
    )


def changed(one: dict[str, Score], other: dict[str, Score]) -> set[str]:
    """The scores that differ by more than .02 and whose intervals do not meet.

    All scores are of order 1 in their units.
    """
    apart = {
        name for name in one if one[name].high < other[name].low or other[name].high < one[name].low
    }
    return {name for name in apart if abs(one[name].value - other[name].value) > 0.02}


@pytest.mark.parametrize("seed", range(3))
def test_the_data_has_the_modes_of_the_data(seed: int) -> None:
    """Catches a wrong expectation, a transposed prior and a wrong W1.

    2 N KL(q||p) is nearly chi-squared with 23 degrees of freedom: .03 on average, above .065 with
    probability .001.
    """
    scores = summarise(tempered(1, seed))
    assert 0.9 <= scores["coverage"].value <= 1.1
    assert scores["kl_sample_prior"].value < 0.065
    assert scores["kl_prior_sample"].value < 0.2
    assert scores["saturation_w1"].value < 0.03
    entropy = -(world.MODE_PRIOR * world.MODE_PRIOR.log()).sum().item()
    assert scores["entropy"].low < entropy < scores["entropy"].high


def test_tempering_lowers_coverage_and_raises_both_divergences() -> None:
    """Catches metrics that do not notice mode seeking.

    Of 24 modes the law p^4 hits 12 in 384 draws, half of what the data hits; p^2 lies between.
    """
    data, mild, strong = (summarise(tempered(power, 0)) for power in (1, 2, 4))
    assert strong["coverage"].value < 0.6
    for name in ("kl_prior_sample", "kl_sample_prior"):
        assert data[name].high < mild[name].low < mild[name].high < strong[name].low
    assert data["coverage"].low > mild["coverage"].high > strong["coverage"].high
    assert changed(data, strong) == {
        "modes",
        "coverage",
        "kl_prior_sample",
        "kl_sample_prior",
        "entropy",
        "contrast",
    }


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
    assert scores["modes"].value <= 4
    assert scores["modes"].n == int((reading.hue == 0).sum())
    assert scores["valid"].value == pytest.approx(scores["modes"].n / N)
    # Expected is what all clips would hit, so a model that fails half the time does not get half
    # the goal.
    expected = (1 - (1 - world.MODE_PRIOR) ** N).sum().item()
    assert scores["coverage"].value == pytest.approx(scores["modes"].value / expected)


def test_nothing_valid_is_no_perfect_score() -> None:
    """Catches a perfect score for no valid clips.

    With prior smoothing alone, they would have KL(prior || sample) = 0, the best there is.
    """
    reading = tempered(1, 0)
    scores = summarise(dataclasses.replace(reading, valid=torch.zeros(N, dtype=torch.bool)))
    assert math.isnan(scores["kl_prior_sample"].value)
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
