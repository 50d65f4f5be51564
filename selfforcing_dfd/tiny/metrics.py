"""Scores of a set of tiny-world clips, each with an interval.

Invalid clips are in no mode and have no attributes: modes and means are over valid clips, beside
the share that is valid. Contrast and spread, by which a collapse to the mean of many clips shows
itself, are over all clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from selfforcing_dfd.tiny.bootstrap import Resamples, Score, spread
from selfforcing_dfd.tiny.readout import Reading
from selfforcing_dfd.tiny.world import MODE_PRIOR, parse_caption

_GRID = 512  # points on [0, 1] at which distribution functions of saturation are compared


def summarise(
    reading: Reading,
    captions: Sequence[str] | None = None,
    prior: Tensor = MODE_PRIOR,
    seed: int = 0,
) -> dict[str, Score]:
    """All scores of one set of clips, by name.

    captions: one for each clip; with them, the agreement of what they name with what is read is
    added. prior: law of the modes [24] that the clips should follow: the data's, unless the
    captions choose hue or direction. seed: of the bootstrap.

    valid; modes (hit, of 24), coverage (modes hit / expected for as many iid draws from the prior),
    kl_prior_sample, kl_sample_prior, entropy (nats); saturation, saturation_w1 (to the data's
    Beta(6, 6)), contrast, speed_px, jitter_px, saturation_drift (mean size) and contrast_drift
    (mean) per chunk, seam_excess_px, spread; agreement_FACTOR.
    """
    reading = _on_cpu(reading)
    every = Resamples.draw(len(reading), seed)
    valid = every.only(reading.valid)
    scores = {"valid": every.score(every.mean(reading.valid), 0, 1)}
    scores |= mode_scores(reading, prior, every)
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


def mode_scores(reading: Reading, prior: Tensor, every: Resamples) -> dict[str, Score]:
    """Modes hit, coverage, divergences and entropy.

    KL(prior || sample) smooths the sample with half a clip spread as the prior. Coverage compares
    with the modes that all clips, valid or not, would hit if they were iid draws from the prior.
    """
    prior = prior.double() / prior.sum()
    valid = every.only(reading.valid)
    # [R + 1, modes]
    hits = valid.counts @ torch.nn.functional.one_hot(reading.mode, len(prior)).double()
    total = hits.sum(dim=1, keepdim=True)
    share = hits / total  # NaN without valid clips, and so is all that follows from it
    smooth = (hits + 0.5 * prior) / (total + 0.5) + 0 * share
    num_hit = (hits > 0).sum(dim=1)
    expected = (1 - (1 - prior) ** len(reading)).sum()
    entropy = -torch.xlogy(share, share).sum(dim=1)
    return {
        "modes": valid.score(num_hit.double(), 0, len(prior)),
        "coverage": valid.score(num_hit / expected, 0, float(len(prior) / expected)),
        "kl_prior_sample": valid.score(torch.xlogy(prior, prior / smooth).sum(dim=1), 0),
        "kl_sample_prior": valid.score(-entropy - torch.xlogy(share, prior).sum(dim=1), 0),
        "entropy": valid.score(entropy + (num_hit - 1) / (2 * total[:, 0]), 0),  # Miller-Madow
    }


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
