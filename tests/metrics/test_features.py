"""Features that need no weights, and diversity, against loops over pairs and pixels."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from selfforcing_dfd.metrics.diversity import by_prompt, diversity, diversity_scores
from selfforcing_dfd.metrics.features import (
    BANDS,
    TURNS,
    JoinedEncoder,
    MotionEncoder,
    PixelEncoder,
    Sampled,
    colours,
    directions,
    encode,
    places_of,
    pooled,
    sample,
    standardised,
)
from selfforcing_dfd.rng import normal, uniform
from selfforcing_dfd.tiny.world import Factors, render

FPS = 16.0


def shape_clip(hue: int = 0, direction: int = 0, saturation: float = 0.5, speed: int = 2) -> Tensor:
    """uint8 [33, 64, 64, 3]: a large disc."""
    index = {"shape": 0, "hue": hue, "direction": direction, "speed": speed, "size": 1}
    factors = Factors(
        **{name: torch.tensor([value]) for name, value in index.items()},
        saturation=torch.tensor([saturation]),
        x=torch.tensor([30.0]),
        y=torch.tensor([34.0]),
    )
    return (255 * render(factors)[0]).round().to(torch.uint8)


def sampled(video: Tensor, places: int = 4) -> Sampled:
    return sample(video, len(video), FPS, places)


def test_sixteen_frames_lie_at_even_distances():
    """Catches a last frame that is never looked at, and short clips that fail."""
    assert places_of(81) == [round(80 * n / 15) for n in range(16)]
    assert places_of(3, 5) == [0, 0, 1, 2, 2]
    clip = sample((torch.full((2, 2, 3), n) for n in range(33)), 33, FPS, 5)
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 8, 16, 24, 32]
    assert clip.before[:, 0, 0, 0].tolist() == [0, 8, 16, 24, 30]
    assert clip.after[:, 0, 0, 0].tolist() == [2, 10, 18, 26, 32]
    assert clip.seconds == 1 / 8
    assert sample(iter(torch.zeros(1, 2, 2, 3)), 1, FPS).frames.shape == (16, 2, 2, 3)


def test_diversity_is_equation_26():
    """Catches pairs that are counted twice or with themselves, and vectors that are not unit."""
    vectors = normal((5, 3, 7), 0, "features")

    def cosine(one: Tensor, other: Tensor) -> float:
        return float(one @ other / (one.norm() * other.norm()))

    pairs = list(combinations(range(5), 2))
    for place in range(3):
        wanted = 1 - sum(cosine(vectors[i, place], vectors[j, place]) for i, j in pairs) / 10
        assert float(diversity(vectors[:, place])) == pytest.approx(wanted, rel=1e-5)
    each = [float(diversity(vectors[:, place])) for place in range(3)]
    assert float(diversity(vectors)) == pytest.approx(sum(each) / 3, rel=1e-6)
    assert float(diversity(torch.eye(4))) == pytest.approx(1)
    assert float(diversity(torch.ones(3, 4))) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="needs two"):
        diversity(vectors[:1])


def test_pooling_averages_out_what_differs_between_frames():
    """Catches pooling of vectors of different length, and a mean-pooled score above per-frame."""
    frames = torch.stack([torch.eye(3)[:2], torch.eye(3)[[0, 2]]])  # two clips, two places
    torch.testing.assert_close(pooled(frames)[0], torch.tensor([1.0, 1.0, 0]) / math.sqrt(2))
    found = diversity_scores(frames, ["one", "one"])
    assert found["diversity_mean"].value == pytest.approx(0.5)
    assert found["diversity_frames"].value == pytest.approx(0.5)
    wide = encode(PixelEncoder(), [sampled(shape_clip(hue)) for hue in (0, 3)])
    found = diversity_scores(wide, ["one", "one"])
    assert found["diversity_mean"].value <= found["diversity_frames"].value


def test_prompts_are_the_unit_of_the_interval():
    """Catches an interval over pairs, which has no width for one prompt of many videos."""
    vectors = normal((9, 1, 5), 1, "features")
    prompts = ["a", "b", "a", "b", "a", "c", "d", "d", "d"]
    assert by_prompt(prompts) == {"a": [0, 2, 4], "b": [1, 3], "d": [6, 7, 8]}
    score = diversity_scores(vectors, prompts)["diversity_mean"]
    each = [float(diversity(vectors[rows])) for rows in ([0, 2, 4], [1, 3], [6, 7, 8])]
    assert score.n == 3
    assert score.value == pytest.approx(sum(each) / 3)
    assert score.low < score.value - 0.1
    assert score.high > score.value + 0.1
    assert diversity_scores(vectors, list(range(9))) == {}


def test_a_histogram_of_colours_equals_a_loop():
    """Catches levels that are mixed up between colours."""
    frame = 255 * uniform((3, 5, 3), 0, "pixels").float()
    wanted = torch.zeros(4, 4, 4)
    for pixel in frame.flatten(0, 1) / 85:
        for r in range(4):
            for g in range(4):
                for b in range(4):
                    near = [max(0.0, 1 - abs(float(pixel[c]) - n)) for c, n in enumerate((r, g, b))]
                    wanted[r, g, b] += math.prod(near) / 15
    torch.testing.assert_close(colours(frame).square(), wanted.flatten())


def test_angles_go_round():
    """Catches a histogram that loses what lies between its last and its first direction."""
    step = 2 * math.pi / TURNS
    angle = torch.tensor([0.0, 2.25 * step, (TURNS - 0.5) * step])
    found = directions(angle, torch.tensor([1.0, 4.0, 2.0]), 2 * math.pi)
    wanted = torch.zeros(TURNS)
    wanted[0] = 1 + 1
    wanted[2] = 3
    wanted[3] = 1
    wanted[7] = 1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_each_encoder_sees_its_own():
    """Catches motion that colour moves, and pixels that no colour moves."""
    motion = MotionEncoder()
    pixels = PixelEncoder()
    usual, hue, turned = (
        sampled(video)
        for video in (shape_clip(), shape_clip(hue=3), shape_clip(direction=1, speed=2))
    )
    by_motion = encode(motion, [usual, hue, turned])
    assert float(diversity(by_motion[:2])) < 0.1
    assert float(diversity(by_motion[[0, 2]])) > 0.6
    by_pixels = encode(pixels, [usual, hue])
    assert float(diversity(by_pixels)) > 0.02
    both = encode(JoinedEncoder([pixels, motion]), [usual, hue])
    mean = (diversity(by_pixels) + diversity(by_motion[:2])) / 2
    assert float(diversity(both)) == pytest.approx(float(mean), rel=1e-4)
    assert JoinedEncoder([pixels, motion]).name == "pixels+motion"


def test_a_still_picture_is_a_motion_of_its_own():
    """Catches zeros for a clip that stands still: its cosine with another such clip would be 0."""
    still = shape_clip()[:1].expand(33, -1, -1, -1)
    found = MotionEncoder()(sampled(still))
    assert found.shape == (4, TURNS * BANDS + 1)
    torch.testing.assert_close(found[:, -1], torch.ones(4))


def test_the_same_content_in_grey_counts_as_the_same_once_standardised():
    """Catches desaturation that reads as less diversity."""
    vivid = shape_clip(saturation=0.8)
    grey = (90 + 0.3 * (vivid.float() - 90)).round().to(torch.uint8)
    one, other = standardised(sampled(vivid)), standardised(sampled(grey))
    assert float((one.frames.float() - other.frames.float()).abs().mean()) < 2
    assert float(one.frames.float().mean()) == pytest.approx(128, abs=2)
    flat = standardised(sampled(torch.full((9, 24, 24, 3), 7, dtype=torch.uint8)))
    assert flat.frames.unique().tolist() == [128]
