from __future__ import annotations

import dataclasses
from dataclasses import fields

import pytest
import torch
from tiny_clips import Clips, draw
from torch import Tensor

from selfforcing_dfd.rng import generator, normal, uniform
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.readout import Reading, chunk_starts, read
from selfforcing_dfd.tiny.world import HEADINGS, SPEED_PX, Factors, draw_factors, render, track

CATEGORIES = ("shape", "hue", "direction", "speed", "size")


def accuracy(reading: Reading, factors: Factors) -> dict[str, float]:
    return {
        name: (getattr(reading, name) == getattr(factors, name)).float().mean().item()
        for name in CATEGORIES
    }


def test_clean_clips_are_read_exactly(clips: Clips) -> None:
    """Every factor of every clip. Saturation has no noise here: .0001 was measured."""
    assert accuracy(clips.reading, clips.factors) == dict.fromkeys(CATEGORIES, 1.0)
    assert (clips.reading.saturation - clips.factors.saturation).abs().max() < 0.001
    assert (clips.reading.speed_px - SPEED_PX[clips.factors.speed]).abs().max() < 0.002
    # Pixels at the centroid's threshold come and go as the shape moves through the pixel grid.
    assert clips.reading.jitter.max() < 0.1
    assert clips.reading.valid.all()
    assert clips.reading.psnr.min() > 45


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_noise_does_not_change_what_is_read(clips: Clips, noise: float) -> None:
    """Catches a colour read from the pixels that noise changed most.

    It is more saturated than the shape's. Half of validity's threshold is left at noise .05: all
    pixels are compared, and noise is in all of them.
    """
    videos = clips.videos[:32] + noise * normal((32, *clips.videos.shape[1:]), 0, "test noise")
    reading = read(videos)
    assert accuracy(reading, clips.factors[slice(0, 32)]) == dict.fromkeys(CATEGORIES, 1.0)
    assert (reading.saturation - clips.factors.saturation[:32]).abs().mean() < 0.005
    assert reading.valid.all()


def test_rare_hues_and_pale_colours_are_read() -> None:
    """Catches rare hues and pale colours that are misread.

    The rarest hues are what is counted in the end; saturation .1 occurs in one of 10,000 clips of
    the data.
    """
    factors = draw_factors(24, generator(0, "test hues"))
    hue = torch.arange(24) % 6
    saturation = torch.linspace(0.1, 1, 24)
    reading = read(render(dataclasses.replace(factors, hue=hue, saturation=saturation)))
    assert torch.equal(reading.hue, hue)
    assert (reading.saturation - saturation).abs().max() < 0.001


def mean_of(videos: Tensor, count: int) -> Tensor:
    return videos.unflatten(0, (count, -1)).mean(dim=0)


def test_two_shapes_in_one_clip_are_no_valid_clip() -> None:
    """Catches a validity that asks only whether there is something of a shape.

    A shape twice, in two places, at half its contrast: either explains half at most, and the shape
    that is read explains less.
    """
    one = draw_factors(24, generator(0, "test one"))
    other = dataclasses.replace(one, x=one.x + 30, y=one.y + 25)
    assert not read((render(one) + render(other)) / 2).valid.any()


def test_most_means_of_two_random_clips_are_invalid(clips: Clips) -> None:
    """Catches a validity that accepts the mean of two clips.

    Some means are valid: a shape that is larger or stronger, or covers the other, explains more
    than half of the clip. 26 of 96 pairs and 96 of 384 were valid; the standard error over 32 pairs
    is 8 %.
    """
    assert read(mean_of(clips.videos, 2)).valid.float().mean() < 0.5


def test_means_of_eight_clips_are_invalid_and_faint(clips: Clips) -> None:
    """Catches a collapse to the mean that is not noticed.

    Distillation risks it. Contrast must show it even where validity would not.
    """
    reading = read(mean_of(clips.videos, 8))
    assert not reading.valid.any()
    assert reading.contrast.mean() < 0.3 * clips.reading.contrast.mean()


@pytest.mark.parametrize("kind", ["grey", "black", "faint noise", "noise", "one frame"])
def test_clips_without_a_moving_shape_are_invalid_and_finite(kind: str, clips: Clips) -> None:
    """Catches 0 / 0 in an empty clip, and noise that explains itself."""
    shape = (3, 33, 64, 64, 3)
    video = {
        "grey": torch.full(shape, 0.35),
        "black": torch.zeros(shape),
        "faint noise": 0.35 + 0.01 * normal(shape, 0, "test blank"),
        "noise": uniform(shape, 0, "test blank").float(),
        "one frame": torch.full(shape, 0.35).index_copy(
            1, torch.tensor([16]), clips.videos[:3, 16:17]
        ),
    }[kind]
    reading = read(video)
    assert not reading.valid.any()
    for field in fields(Reading):
        assert getattr(reading, field.name).isfinite().all(), field.name


def test_values_outside_the_range_are_clipped(clips: Clips) -> None:
    """Catches colours below 0 in decoded latents, which once made a saturation of 5,501."""
    loud = 0.35 + 3 * (clips.videos[:8] - 0.35)
    assert torch.equal(read(loud).saturation, read(loud.clamp(0, 1)).saturation)
    assert read(loud).saturation.max() <= 1


def test_reading_does_not_depend_on_the_batch(clips: Clips) -> None:
    """Catches statistics taken over clips.

    Sums may round differently in products of other shapes.
    """
    alone = read(clips.videos[11:12])
    for field in fields(Reading):
        torch.testing.assert_close(
            getattr(alone, field.name), getattr(clips.reading, field.name)[11:12]
        )


def test_chunks_start_where_their_first_latent_frame_does() -> None:
    """Three latent frames are 9 video frames in the first chunk and 12 in the others."""
    assert chunk_starts(33) == [0, 9, 21]
    assert chunk_starts(9) == [0]
    assert chunk_starts(13, chunk=1) == [0, 1, 5, 9]


def test_saturation_is_read_chunk_by_chunk(clips: Clips) -> None:
    """Catches chunk boundaries at the wrong video frames, which would mix neighbouring values."""
    factors = clips.factors[slice(0, 8)]
    levels = torch.tensor([0.3, 0.5, 0.7])
    saturation = levels.repeat_interleave(torch.tensor([9, 12, 12])).expand(8, -1)
    reading = read(draw(factors, track(factors, 33), saturation))
    assert (reading.saturation_by_chunk - levels).abs().max() < 0.001


def test_a_jump_at_seams_is_seam_excess(clips: Clips) -> None:
    """Catches a seam score that misses jumps at seams, or counts jumps elsewhere.

    A jump of 2 px across the track into both later chunks, less the .16 px by which it tilts the
    fitted line. Against steps elsewhere, which the tilt makes .16 px: 1.69 px. Equal jumps into
    every other latent frame count as none.
    """
    factors = clips.factors[slice(0, 8)]
    centres = track(factors, 33)
    jumped = track(factors, 33)
    across = torch.stack(
        [centres[:, 1, 1] - centres[:, 0, 1], centres[:, 1, 0] - centres[:, 0, 0]], dim=-1
    )
    across = 2 * across / across.norm(dim=-1, keepdim=True)
    jumped[:, 9:] += across[:, None]
    jumped[:, 21:] += across[:, None]
    saturation = factors.saturation[:, None].expand(-1, 33)
    assert (read(draw(factors, jumped, saturation)).seam_excess - 1.69).abs().max() < 0.1
    everywhere = centres + across[:, None] * ((torch.arange(33) + 3) // 4 % 2)[:, None]
    assert read(draw(factors, everywhere, saturation)).seam_excess.abs().max() < 0.1


def test_unusable_videos_are_refused(clips: Clips) -> None:
    """Catches NaN counted as a hue, and channels-first clips read as noise."""
    with pytest.raises(ValueError, match="1 of 2 clips have pixels that are not finite"):
        read(torch.stack([clips.videos[0], clips.videos[1] * float("nan")]))
    with pytest.raises(ValueError, match="want \\[B, T, 64, 64, 3\\]"):
        read(clips.videos.permute(0, 1, 4, 2, 3))
    with pytest.raises(ValueError, match="divide uint8 by 255"):
        read((clips.videos * 255).byte())


def test_motion_is_read_chunk_by_chunk(clips: Clips) -> None:
    """Catches a speed or direction of the whole clip where a chunk's own is asked for.

    Each chunk has its own speed, the second turns by a right angle, and the track has no jumps. .04
    is what partly covered pixels at the centroid's threshold cost.
    """
    factors = clips.factors[slice(0, 8)]
    heading = HEADINGS[factors.direction]
    turned = torch.stack([-heading[:, 1], heading[:, 0]], dim=-1)
    steps = torch.cat([heading[:, None].expand(-1, 9, -1), turned[:, None].expand(-1, 24, -1)], 1)
    speeds = torch.tensor([1.0, 2.0, 0.5])
    steps = steps * speeds.repeat_interleave(torch.tensor([9, 12, 12]))[:, None]
    start = torch.stack([factors.x, factors.y], dim=-1)
    saturation = factors.saturation[:, None].expand(-1, 33)
    reading = read(draw(factors, start[:, None] + steps.cumsum(dim=1), saturation))
    assert (reading.speed_by_chunk - speeds).abs().max() < 0.04
    after = (factors.direction + 1) % 4
    assert torch.equal(
        reading.direction_by_chunk, torch.stack([factors.direction, after, after], dim=1)
    )
    assert reading.valid_by_chunk.all()


def test_chunks_of_the_data_are_read_after_the_codec(codec: TinyCodec, clips: Clips) -> None:
    """Catches chunks in which the codec's own small steps pass for another motion.

    Over 12 video frames it makes every speed read 2 % low; in the first chunk 3 %.
    """
    reading = read(codec.decode(codec.encode(clips.videos)))
    factors = clips.factors
    ratio = reading.speed_by_chunk.mean(dim=0) / SPEED_PX[factors.speed].mean()
    assert torch.allclose(ratio, torch.tensor([0.97, 0.98, 0.98]), atol=0.015)
    assert (reading.direction_by_chunk == factors.direction[:, None]).all()
    assert (reading.hue_by_chunk == factors.hue[:, None]).all()
    assert reading.valid_by_chunk.all()


def test_a_jump_between_chunks_is_read_where_it_is(clips: Clips) -> None:
    """Catches jumps counted at another seam, or within a chunk."""
    factors = clips.factors[slice(0, 8)]
    centres = track(factors, 33)
    centres[:, 21:] += 3 * HEADINGS[factors.direction][:, None]
    saturation = factors.saturation[:, None].expand(-1, 33)
    jumps = read(draw(factors, centres, saturation)).seam_jumps
    assert jumps.shape == (8, 2)
    assert jumps[:, 0].max() < 0.2
    assert (jumps[:, 1] - 3).abs().max() < 0.2


def test_a_chunk_that_shows_nothing_is_not_valid(clips: Clips) -> None:
    """Catches validity of the whole clip in place of a chunk's."""
    videos = clips.videos[:8].clone()
    videos[:, 21:] = 0.35
    reading = read(videos)
    assert reading.valid_by_chunk.tolist() == [[True, True, False]] * 8


def test_a_chunk_of_one_video_frame_has_no_speed(clips: Clips) -> None:
    """Catches 0 / 0 in the first chunk of clips whose chunks are one latent frame."""
    reading = read(clips.videos[:2, :9], chunk=1)
    assert reading.speed_by_chunk[:, 0].tolist() == [0, 0]
    assert reading.speed_by_chunk.isfinite().all()
