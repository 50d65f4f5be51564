"""Scores of a set of tiny-world clips, each with an interval.

A mode is a hue, a direction and a speed, 72 in all, and only a moving clip is in one (see
`Reading.moving`). Shares of modes are of all clips: those in no mode are missed. So every row of a
report counts the same number of clips, without which divergences cannot be compared, and no model
gains by standing still. Means of attributes are over valid clips. Contrast and spread, by which a
collapse to the mean of many clips shows itself, are over all clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from selfforcing_dfd.rng import generator
from selfforcing_dfd.tiny.bootstrap import Resamples, Score, spread
from selfforcing_dfd.tiny.readout import MIN_SPEED, Reading
from selfforcing_dfd.tiny.world import (
    DIRECTION_PRIOR,
    DIRECTIONS,
    HUE_PRIOR,
    HUES,
    MODE_PRIOR,
    SPEED_PRIOR,
    parse_caption,
)

PACES = ("still", "slow", "steady", "quick")  # below MIN_SPEED, then the classes of speed
SHARES = {"hue": HUES, "direction": DIRECTIONS, "pace": PACES}
"""The names of `share_NAME`: hues of valid clips, directions of moving, paces of valid clips."""

_GRID = 512  # points on [0, 1] at which distribution functions of saturation are compared
_FLOOR_DRAWS = 200  # samples of the data's law behind the floor of a divergence
_SMOOTH = 0.5  # clips, spread as the law, that keep a divergence finite
_TINY = 1e-12


def summarise(
    reading: Reading, captions: Sequence[str] | None = None, seed: int = 0
) -> dict[str, Score]:
    """All scores of one set of clips, by name.

    captions: one for each clip. With them, a clip's law is the data's given what its caption names,
    and the agreement of what they name with what is read is added. seed: of the bootstrap.

    valid, moving (shares of all clips); modes (hit, of 72), coverage (modes hit / hit on average by
    as many iid draws from the law), kl_prior_sample over the modes and kl_floor (what as many draws
    score), kl_hue, kl_direction, kl_speed; shares (see SHARES); saturation, saturation_w1 (to the
    data's Beta(6, 6)), contrast, speed_px, jitter_px, saturation_drift (mean size) and
    contrast_drift (mean) per chunk, seam_excess_px, spread; agreement_FACTOR.
    """
    reading = _on_cpu(reading)
    every = Resamples.draw(len(reading), seed)
    valid = every.only(reading.valid)
    scores = {
        "valid": every.score(every.mean(reading.valid), 0, 1),
        "moving": every.score(every.mean(reading.moving), 0, 1),
    }
    laws = mode_laws(captions if captions is not None else [""] * len(reading))
    scores |= mode_scores(reading, laws, every)
    scores |= shares(reading, every)
    seams = max(1, reading.saturation_by_chunk.shape[1] - 1)
    saturation_drift = (
        reading.saturation_by_chunk[:, -1] - reading.saturation_by_chunk[:, 0]
    ).abs() / seams
    contrast_drift = (reading.contrast_by_chunk[:, -1] - reading.contrast_by_chunk[:, 0]) / seams
    scores |= {
        "saturation": valid.score(valid.mean(reading.saturation), 0, 1),
        "saturation_w1": valid.score(saturation_w1(reading.saturation, valid), 0, 1),
        "contrast": every.score(every.mean(reading.contrast), 0),
        "speed_px": valid.score(valid.mean(reading.speed_px), 0),
        "jitter_px": valid.score(valid.mean(reading.jitter), 0),
        "saturation_drift": valid.score(valid.mean(saturation_drift), 0),
        "contrast_drift": valid.score(valid.mean(contrast_drift)),
        "seam_excess_px": valid.score(valid.mean(reading.seam_excess)),
        "spread": every.score(spread(reading.pixels, every), 0),
    }
    return scores | (agreement(reading, captions, every) if captions is not None else {})


def mode_laws(captions: Sequence[str]) -> Tensor:
    """The law of each clip's mode, [n, 72]: the data's law given what the caption names."""
    return torch.stack([mode_law(caption) for caption in captions])


def mode_law(caption: str) -> Tensor:
    """The data's law of the modes [72], given the hue, direction and speed that a caption names."""
    named = parse_caption(caption)
    law = torch.ones((), dtype=torch.float64)
    priors = {"hue": HUE_PRIOR, "direction": DIRECTION_PRIOR, "speed": SPEED_PRIOR}
    for factor, prior in priors.items():
        own = prior.double() / prior.double().sum()
        if factor in named:
            own = one_hot(torch.tensor(named[factor]), len(prior)).double()
        law = torch.outer(law.flatten(), own)
    return law.flatten()


def mode_scores(reading: Reading, laws: Tensor, every: Resamples) -> dict[str, Score]:
    """Modes hit, coverage and divergences of moving clips from their laws [n, 72].

    The share of a mode is of all clips, moving or not, and coverage compares with the modes that
    all clips would hit if each were a draw from its law. So a model that stands still half the time
    is not asked for half as much.
    """
    shape = (len(HUES), len(DIRECTIONS), -1)
    law = laws.mean(dim=0).unflatten(0, shape)
    of_hue = one_hot(reading.hue, len(HUES)).double()
    of_mode = one_hot(reading.mode, len(MODE_PRIOR)).double() * reading.moving[:, None]
    hits = every.counts @ of_mode  # [R + 1, 72]
    by_factor = hits.unflatten(1, shape)
    num_hit = (hits > 0).sum(dim=1)
    expected = expected_modes(laws)
    floor = kl_floor(laws)
    return {
        "modes": every.score(num_hit.double(), 0, len(MODE_PRIOR)),
        "coverage": every.score(num_hit / expected, 0, len(MODE_PRIOR) / expected),
        "kl_prior_sample": every.score(divergence(law.flatten(), hits, len(reading)), 0),
        "kl_floor": floor,
        "kl_hue": every.score(
            divergence(law.sum((1, 2)), every.only(reading.valid).counts @ of_hue, len(reading)), 0
        ),
        "kl_direction": every.score(
            divergence(law.sum((0, 2)), by_factor.sum((1, 3)), len(reading)), 0
        ),
        "kl_speed": every.score(
            divergence(law.sum((0, 1)), by_factor.sum((1, 2)), len(reading)), 0
        ),
    }


def divergence(law: Tensor, hits: Tensor, num_clips: int) -> Tensor:
    """KL(law || sample) in nats, [R], of `hits` [R, modes] among num_clips clips.

    The sample is smoothed by half a clip spread as the law. Clips in no mode count as clips, so
    the sample's shares may sum to less than 1, which adds to the divergence. It depends on the
    number of clips: compare it at equal numbers only, and with `kl_floor`.
    """
    share = (hits + _SMOOTH * law) / (num_clips + _SMOOTH)
    return torch.xlogy(law, law / share.clamp_min(_TINY)).sum(dim=1)


def expected_modes(laws: Tensor) -> float:
    """How many modes one draw from each law [n, 72] hits on average."""
    return float((1 - (1 - laws).prod(dim=0)).sum())


def kl_floor(laws: Tensor, num_draws: int = _FLOOR_DRAWS) -> Score:
    """What KL(law || sample) is for one draw from each law [n, 72]: its mean, and 95 % of cases."""
    random = generator(0, "tiny floor")
    drawn = torch.multinomial(laws, num_draws, replacement=True, generator=random)  # [n, draws]
    hits = torch.zeros(num_draws, laws.shape[1], dtype=laws.dtype)
    hits.scatter_add_(1, drawn.T, torch.ones_like(drawn.T, dtype=laws.dtype))
    floors = divergence(laws.mean(dim=0), hits, len(laws))
    low, high = floors.quantile(torch.tensor([0.025, 0.975], dtype=floors.dtype)).tolist()
    return Score(float(floors.mean()), low, high, len(laws))


def shares(reading: Reading, every: Resamples) -> dict[str, Score]:
    """`share_NAME` of every hue, direction and pace; see SHARES."""
    pace = torch.where(reading.speed_px < MIN_SPEED, 0, 1 + reading.speed)
    valid = every.only(reading.valid)
    moving = every.only(reading.moving)
    scores = {}
    for names, values, clips in (
        (HUES, reading.hue, valid),
        (DIRECTIONS, reading.direction, moving),
        (PACES, pace, valid),
    ):
        for index, name in enumerate(names):
            scores[f"share_{name}"] = clips.score(clips.mean(values == index), 0, 1)
    return scores


def saturation_w1(saturation: Tensor, valid: Resamples) -> Tensor:
    """Wasserstein-1 distance to Beta(6, 6) in every row [R + 1].

    It is the area between the two distribution functions.
    """
    grid = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
    below = valid.mean(saturation[:, None] <= grid)
    return (below - beta_6_6(grid)).abs().mean(dim=1)


def beta_6_6(x: Tensor) -> Tensor:
    """Distribution function of Beta(6, 6), the sixth smallest of eleven uniforms.

    It is the probability that at least six of them lie below x.
    """
    terms = [math.comb(11, k) * x**k * (1 - x) ** (11 - k) for k in range(6, 12)]
    return torch.stack(terms).sum(dim=0)


def agreement(reading: Reading, captions: Sequence[str], every: Resamples) -> dict[str, Score]:
    """For every factor that captions name, the share of clips that show what their caption names.

    Only valid clips whose caption names the factor count.
    """
    if len(captions) != len(reading):
        raise ValueError(f"{len(captions)} captions for {len(reading)} clips; want one a clip")
    read = {
        "shape": reading.shape,
        "hue": reading.hue,
        "direction": reading.direction,
        "speed": reading.speed,
        "size": reading.size,
    }
    named = [parse_caption(caption) for caption in captions]
    scores = {}
    for factor, values in read.items():
        asked = torch.tensor([factors.get(factor, -1) for factors in named])
        if (asked >= 0).any():
            clips = every.only(reading.valid & (asked >= 0))
            scores[f"agreement_{factor}"] = clips.score(clips.mean(values == asked), 0, 1)
    return scores


def _on_cpu(reading: Reading) -> Reading:
    return Reading(*(getattr(reading, name).cpu() for name in Reading.__dataclass_fields__))
