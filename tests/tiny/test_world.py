from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_clips import Clips

from selfforcing_dfd.data.sources.video import read_video
from selfforcing_dfd.rng import generator
from selfforcing_dfd.tiny import world
from selfforcing_dfd.tiny.readout import read

NAMES = {
    "shape": world.SHAPES,
    "hue": world.HUES,
    "direction": world.DIRECTIONS,
    "speed": world.SPEEDS,
    "size": world.SIZES,
}


def test_draws_follow_the_priors() -> None:
    """Catches priors in the wrong order.

    Over 20,000 draws a share's standard error is at most .0035.
    """
    factors = world.draw_factors(20_000, generator(0, "test priors"))
    indices = world.mode(factors.hue, factors.direction, factors.speed)
    modes = torch.bincount(indices, minlength=72) / 20_000
    assert (modes - world.MODE_PRIOR).abs().max() < 4 * 0.0035
    assert abs(factors.saturation.mean() - 0.5) < 0.005
    # Beta(6, 6) has variance 1 / 52.
    assert abs(factors.saturation.var() * 52 - 1) < 0.05


def test_mode_prior_is_indexed_as_modes_are() -> None:
    """Catches a transposed outer product, which leaves the sum 1 and every count wrong."""
    rarest = world.mode(torch.tensor(5), torch.tensor(3), torch.tensor(2))
    assert world.MODE_PRIOR[rarest] == world.MODE_PRIOR.min()
    assert world.MODE_PRIOR[rarest].item() == pytest.approx(0.04 * 0.1 * 0.15)
    red_up_slowly = world.mode(torch.tensor(0), torch.tensor(3), torch.tensor(0))
    assert world.MODE_PRIOR[red_up_slowly].item() == pytest.approx(0.35 * 0.1 * 0.5)
    assert world.MODE_PRIOR.sum().item() == pytest.approx(1)


def test_the_world_is_a_torus() -> None:
    """Catches edges that do not wrap.

    A clip shifted by a whole number of pixels is the same clip rolled.
    """
    factors = world.draw_factors(6, generator(0, "test torus"))
    moved = dataclasses.replace(factors, x=factors.x + 40, y=factors.y - 23)
    rolled = world.render(factors, 5).roll((-23, 40), dims=(2, 3))
    # float32 positions near 100 pixels are exact to 1e-5, and the steepest edge has slope 1/4 per
    # 0.9 px.
    torch.testing.assert_close(world.render(moved, 5), rolled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("direction", range(4))
def test_shapes_move_where_their_direction_says(direction: int) -> None:
    """Catches swapped axes and signs: frame t is frame 0 rolled, with y pointing down."""
    factors = world.draw_factors(3, generator(0, "test direction"))
    fast = torch.full_like(factors.speed, 2)
    factors = dataclasses.replace(factors, direction=torch.full_like(fast, direction), speed=fast)
    video = world.render(factors, 6)
    right, down = {"right": (10, 0), "down": (0, 10), "left": (-10, 0), "up": (0, -10)}[
        world.DIRECTIONS[direction]
    ]
    torch.testing.assert_close(
        video[:, 5], video[:, 0].roll((down, right), dims=(1, 2)), atol=1e-4, rtol=0
    )


def test_a_clip_does_not_depend_on_the_others_in_its_batch() -> None:
    """Catches masks by shape that write to the wrong rows."""
    factors = world.draw_factors(20, generator(0, "test batch"))
    whole = world.render(factors, 3)
    single = torch.cat([world.render(factors[slice(clip, clip + 1)], 3) for clip in range(20)])
    assert torch.equal(whole, single)


@pytest.mark.parametrize("level", ["short", "medium", "long"])
def test_captions_parse_back(clips: Clips, level: world.Level) -> None:
    """Catches a caption that names other factors than those of its level, or wrong values."""
    named = {"short": {"shape"}, "medium": {"shape", "hue"}, "long": set(NAMES)}[level]
    parsed = [world.parse_caption(caption) for caption in world.captions(clips.factors, level)]
    values = {name: getattr(clips.factors, name).tolist() for name in named}
    assert parsed == [
        {name: values[name][clip] for name in named} for clip in range(len(clips.factors))
    ]


def test_mixed_captions_take_turns(tmp_path: Path) -> None:
    """Catches one level for all clips: a teacher would know only that one.

    Also in files, whose clips are drawn one by one.
    """
    factors = world.draw_factors(6, generator(0, "mixed"))
    texts = world.captions(factors, "mixed")
    for clip, text in enumerate(texts):
        level = ("short", "medium", "long")[clip % 3]
        assert text == world.captions(factors, level)[clip]  # type: ignore[arg-type]
    paths = world.write_clips(tmp_path, 3, 0, "mixed", num_frames=1)
    words = [len(path.with_suffix(".txt").read_text().split()) for path in paths]
    assert words == [3, 4, 7]


def test_captions_that_contradict_themselves_are_refused() -> None:
    """Catches the last word winning in silence."""
    assert world.parse_caption("A bright, RED disc!") == {"hue": 0, "shape": 0}
    with pytest.raises(ValueError, match="names the hue twice: red and blue"):
        world.parse_caption("a red blue disc moves")


def test_written_clips_keep_their_attributes(tmp_path: Path) -> None:
    """Catches lossy encoding, swapped channels and captions that belong to other clips."""
    paths = world.write_clips(tmp_path, 6, seed=3, level="long")
    reading = read(torch.stack([read_video(path, 33) for path in paths]).float() / 255)
    assert reading.valid.all()
    for clip, path in enumerate(paths):
        parsed = world.parse_caption(path.with_suffix(".txt").read_text())
        assert parsed == {name: int(getattr(reading, name)[clip]) for name in NAMES}
    truth = torch.cat(
        [world.draw_factors(1, generator(3, "tiny clip", clip)).saturation for clip in range(6)]
    )
    # 8 bits and near-lossless H.264: 1 of 255 levels of a channel at .9 is .0044.
    assert (reading.saturation - truth).abs().max() < 0.01


def test_a_longer_folder_begins_with_the_clips_of_a_shorter_one(tmp_path: Path) -> None:
    """Catches a generator shared between clips.

    Equal frames may be encoded otherwise where x264 has AVX-512, by a level or two of 255; another
    clip is 10 away.
    """
    short = world.write_clips(tmp_path / "short", 2, seed=0, num_frames=5)
    long = world.write_clips(tmp_path / "long", 3, seed=0, num_frames=5)
    for one, other in zip(short, long, strict=False):
        assert (read_video(one, 5).float() - read_video(other, 5).float()).abs().mean() < 0.5
    assert (read_video(long[0], 5).float() - read_video(long[2], 5).float()).abs().mean() > 5


def test_words_that_no_caption_has_are_named() -> None:
    """Catches a prompt of which a half means nothing, and nobody is told."""
    assert world.unknown_words("A purple disc moves left, backwards; PURPLE!") == [
        "purple",
        "backwards",
    ]
    assert world.unknown_words("a large red disc moves left slowly", "short") == [
        *("large", "red", "left", "slowly")
    ]
    factors = world.draw_factors(6, generator(0, "test words"))
    for level in world.IN_TURN:
        for caption in world.captions(factors, level):
            assert world.unknown_words(caption, level) == []
            assert world.unknown_words(caption) == []
