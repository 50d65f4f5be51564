"""What the metrics see, tried on sets of tiny-world clips whose faults are known exactly.

Sets are drawn from the data's law, or from it with fewer and fewer of its 72 modes, or are harmed
in one way each. The truth is read from the pixels (`tiny.readout`). A metric is right about a set
if it rates it worse than fresh clips of the data, blind if it cannot tell, and fooled if it rates
it better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from selfforcing_dfd.metrics.feature_files import Encoded, set_scores
from selfforcing_dfd.metrics.features import (
    Encoder,
    JoinedEncoder,
    MotionEncoder,
    PixelEncoder,
    encode,
    sample,
    standardised,
)
from selfforcing_dfd.metrics.files import mean_of, stated
from selfforcing_dfd.metrics.video import METRICS_VERSION, measure
from selfforcing_dfd.rng import generator
from selfforcing_dfd.tiny.bootstrap import Score
from selfforcing_dfd.tiny.metrics import summarise
from selfforcing_dfd.tiny.readout import read
from selfforcing_dfd.tiny.world import (
    BACKGROUND,
    DIRECTIONS,
    FPS,
    MODE_PRIOR,
    SPEEDS,
    Factors,
    colour,
    coverage,
    draw_factors,
    paint,
    render,
    track,
)

SCHEMA = 1
FRAMES = 33
PLACES = 4  # frames that encoders see
FRESH = 5  # sets of the data that show how far chance goes
LADDER = (36, 18, 9, 4, 1)  # modes that are left
MEASURED = 16  # clips of a set that the numbers of single videos are measured on
TRUTH = ("valid", "modes", "kl_prior_sample", "saturation", "contrast", "speed_px", "jitter_px")

HIGHER = 1
LOWER = -1
OF_SETS: dict[str, int] = {
    "diversity_mean": HIGHER,
    "diversity_frames": HIGHER,
    "diversity_mean_standardised": HIGHER,
    "vendi": HIGHER,
    "precision": HIGHER,
    "recall": HIGHER,
    "density": HIGHER,
    "coverage": HIGHER,
    "mmd": LOWER,
    "memory_nearer": LOWER,
    "memory_copies": LOWER,
}
"""What counts as better, of scores of a set."""
OF_VIDEOS: dict[str, int] = {
    "saturation": LOWER,
    "contrast": HIGHER,
    "laplacian": HIGHER,
    "temporal_flicker": HIGHER,
    "difference": HIGHER,
    "difference_by_contrast": HIGHER,
    "residual_share": LOWER,
    "flow_top": HIGHER,
}
"""What counts as better, of means over videos, where they are read one-sidedly."""
AGAINST_DATA = " against data"
"""Ends the name of a mean over videos whose distance to the data's mean is what counts."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of set. what: in words; make: uint8 videos [n, T, H, W, 3] of n clips and a seed."""

    name: str
    what: str
    make: Callable[[int, int], Tensor]


def factors_of(count: int, seed: int, modes: int = len(MODE_PRIOR)) -> Factors:
    """Draws from the data's law, given that the mode is one of the `modes` likeliest."""
    random = generator(seed, "calibration", modes)
    factors = draw_factors(count, random)
    law = MODE_PRIOR.clone()
    law[law.argsort(descending=True)[modes:]] = 0
    mode = torch.multinomial(law, count, replacement=True, generator=random)
    return Factors(
        shape=factors.shape,
        hue=mode // (len(DIRECTIONS) * len(SPEEDS)),
        direction=mode // len(SPEEDS) % len(DIRECTIONS),
        speed=mode % len(SPEEDS),
        size=factors.size,
        saturation=factors.saturation,
        x=factors.x,
        y=factors.y,
    )


def as_bytes(videos: Tensor) -> Tensor:
    return (255 * videos.clamp(0, 1)).round().to(torch.uint8)


def data(count: int, seed: int, modes: int = len(MODE_PRIOR)) -> Tensor:
    return as_bytes(render(factors_of(count, seed, modes), FRAMES))


def vivid(count: int, seed: int) -> Tensor:
    factors = factors_of(count, seed)
    factors.saturation.mul_(1.5).clamp_(max=1)
    return as_bytes(render(factors, FRAMES))


def grey(count: int, seed: int) -> Tensor:
    """All that is seen goes half of the way to the background."""
    return as_bytes(BACKGROUND + 0.5 * (render(factors_of(count, seed), FRAMES) - BACKGROUND))


def ghosts(count: int, seed: int) -> Tensor:
    """Means of two clips each: what an average over the data looks like."""
    both = [render(factors_of(count, seed + shift), FRAMES) for shift in (0, 1)]
    return as_bytes((both[0] + both[1]) / 2)


def noisy(count: int, seed: int) -> Tensor:
    """Noise that is new in every frame."""
    videos = render(factors_of(count, seed), FRAMES)
    random = generator(seed, "calibration noise")
    return as_bytes(videos + 0.1 * torch.randn(videos.shape, generator=random))


def frozen(count: int, seed: int) -> Tensor:
    first = as_bytes(render(factors_of(count, seed), 1))
    return first.expand(-1, FRAMES, -1, -1, -1)


def jumpy(count: int, seed: int) -> Tensor:
    """The shape leaves its track by up to 2 pixels in every frame."""
    factors = factors_of(count, seed)
    centres = track(factors, FRAMES)
    random = generator(seed, "calibration jumps")
    centres = centres + 4 * torch.rand(centres.shape, generator=random) - 2
    alpha = coverage(factors.shape, factors.size, centres)
    return as_bytes(paint(alpha, colour(factors.hue, factors.saturation)))


def copies(count: int, seed: int) -> Tensor:
    """Half of the clips are of the training set, the others are fresh."""
    half = count // 2
    return torch.cat([data(count, TRAINING_SEED)[:half], data(count - half, seed)])


TRAINING_SEED = 1
HELD_OUT_SEED = 2
FIRST_SEED = 10


def kinds() -> list[Kind]:
    """Every harmed set."""
    fewer = [
        Kind(f"{left} modes", f"only the {left} likeliest of 72 modes", fewer_modes(left))
        for left in LADDER
    ]
    return [
        *fewer,
        Kind("grey", "all goes half of the way to the background", grey),
        Kind("vivid", "saturation times 1.5", vivid),
        Kind("ghosts", "means of two clips", ghosts),
        Kind("noise", "noise of .1 in every frame", noisy),
        Kind("frozen", "the first frame for ever", frozen),
        Kind("jumpy", "up to 2 pixels off the track, anew in every frame", jumpy),
        Kind("copies", "half of the clips are training clips", copies),
    ]


def fewer_modes(left: int) -> Callable[[int, int], Tensor]:
    return lambda count, seed: data(count, seed, left)


def encoders() -> list[Encoder]:
    """Those that need no weights."""
    pixels = PixelEncoder()
    motion = MotionEncoder()
    return [pixels, motion, JoinedEncoder([pixels, motion])]


def encoded(videos: Tensor, encoder: Encoder, both: bool) -> Encoded:
    """Features of videos uint8 [n, T, H, W, 3]. both: also of standardised frames."""
    clips = [sample(video, len(video), FPS, PLACES) for video in videos]
    others = encode(encoder, map(standardised, clips)) if both else torch.empty(0)
    return Encoded([Path(str(n)) for n in range(len(videos))], encode(encoder, clips), others)


def all_encoded(videos: Tensor, both: bool = True) -> dict[str, Encoded]:
    """By every encoder; the joined one takes the features of its parts."""
    pixels, motion, joined = encoders()
    found = {each.name: encoded(videos, each, both) for each in (pixels, motion)}
    parts = [found[pixels.name], found[motion.name]]
    frames = torch.cat([part.frames for part in parts], dim=2) / 2**0.5
    others = torch.cat([part.standardised for part in parts], dim=-1) / 2**0.5
    return {**found, joined.name: Encoded(parts[0].files, frames, others)}


def truth_of(videos: Tensor) -> dict[str, float | None]:
    """Exact numbers of a set, by reading every clip back; None where no clip can be read."""
    found = summarise(read(videos.float() / 255))
    return {name: stated(found[name].value) for name in TRUTH}


def means_of(videos: Tensor) -> dict[str, float]:
    """Means of the numbers of single videos, over the first clips of a set; NaN for none."""
    rows = [measure(video, FPS) for video in videos[:MEASURED]]
    return {name: mean_of([row[name] for row in rows]) for name in OF_VIDEOS}


@dataclass(frozen=True, slots=True)
class References:
    """Training and held-out clips: their features, and the means of training videos."""

    training: Mapping[str, Encoded]
    held_out: Mapping[str, Encoded]
    means: Mapping[str, float]

    @classmethod
    def draw(cls, count: int) -> References:
        training = data(count, TRAINING_SEED)
        return cls(
            all_encoded(training, both=False),
            all_encoded(data(count, HELD_OUT_SEED), both=False),
            means_of(training),
        )


def metrics_of(videos: Tensor, references: References) -> dict[str, float | None]:
    """All metrics of a set, by name, each turned so that higher is better; None for no number."""
    found = {}
    for name, features in all_encoded(videos).items():
        scores, _ = set_scores(
            features,
            ["all"] * len(videos),
            references.training[name],
            references.training[name],
            references.held_out[name],
        )
        for metric, sign in OF_SETS.items():
            score = scores[metric]
            value = score.value if isinstance(score, Score) else score
            found[f"{metric}, {name}"] = sign * value
    means = means_of(videos)
    for metric, sign in OF_VIDEOS.items():
        found[metric] = sign * means[metric]
        found[metric + AGAINST_DATA] = -abs(means[metric] - references.means[metric])
    return {metric: stated(value) for metric, value in found.items()}


def calibrate(count: int, seen: Callable[[str], object] = lambda name: None) -> dict[str, Any]:
    """Truth and metrics of all sets of `count` clips, and what the metrics are worth.

    seen: called with the name of every set that was measured.
    """
    references = References.draw(count)
    rows = []
    for name, what, videos in sets(count):
        rows.append(
            {
                "set": name,
                "what": what,
                "truth": truth_of(videos),
                "metrics": metrics_of(videos, references),
            }
        )
        seen(name)
    return {
        "schema": SCHEMA,
        "metrics_version": METRICS_VERSION,
        "clips": count,
        "fresh": FRESH,
        "sets": rows,
    }


def sets(count: int) -> Iterator[tuple[str, str, Tensor]]:
    """(name, what it is, videos) of every set; the fresh ones of the data come first."""
    for number in range(FRESH):
        yield f"data {number + 1}", "fresh clips of the data", data(count, FIRST_SEED + number)
    for number, kind in enumerate(kinds()):
        yield kind.name, kind.what, kind.make(count, FIRST_SEED + 2 * (FRESH + number))


def num_sets() -> int:
    return FRESH + len(kinds())


def verdict(value: float | None, fresh: Sequence[float]) -> str:
    """Whether a set is rated `worse` than fresh clips of the data, `same` or `better`.

    Chance may go as far beyond the fresh sets on each side as they lie apart. `none` where the
    metric has no number.
    """
    if value is None:
        return "none"
    low = min(fresh)
    high = max(fresh)
    if value < low - (high - low):
        return "worse"
    return "better" if value > high + (high - low) else "same"


@dataclass(frozen=True, slots=True)
class Judged:
    """What one metric is worth.

    rank: Spearman's correlation with the number of modes, over the data and the sets with fewer
    modes. verdicts: of every harmed set.
    """

    metric: str
    rank: float
    verdicts: Mapping[str, str]


def judge(found: Mapping[str, Any]) -> list[Judged]:
    """Every metric of what `calibrate` returns, those that are right most often first."""
    fresh = found["sets"][: found["fresh"]]
    harmed = found["sets"][found["fresh"] :]
    modes = [mean_of([row["truth"]["modes"] for row in fresh])]
    ladder = harmed[: len(LADDER)]
    modes += [row["truth"]["modes"] for row in ladder]
    judged = []
    for metric in fresh[0]["metrics"]:
        usual = [row["metrics"][metric] for row in fresh]
        values = [mean_of(usual)] + [row["metrics"][metric] for row in ladder]
        verdicts = {row["set"]: verdict(row["metrics"][metric], usual) for row in harmed}
        judged.append(Judged(metric, correlation(values, modes), verdicts))
    return sorted(judged, key=lambda each: -list(each.verdicts.values()).count("worse"))


def correlation(values: Sequence[float], truth: Sequence[float]) -> float:
    """Spearman's; 0 for a metric that is the same for all."""
    if len(set(values)) < 2:
        return 0.0
    return float(spearmanr(values, truth).statistic)
