from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_clips import Clips
from torch import Tensor

from selfforcing_dfd.rng import generator, normal
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.readout import read
from selfforcing_dfd.tiny.world import draw_factors, render


def psnr(one: Tensor, other: Tensor) -> float:
    return float(-10 * (one - other).square().mean().log10())


def test_bases_are_orthonormal(codec: TinyCodec) -> None:
    """Catches a basis that is no rotation.

    float32 sums of 768 products are good to 1e-6.
    """
    for basis in (codec.first, codec.rest):
        torch.testing.assert_close(basis.T @ basis, torch.eye(16), atol=1e-5, rtol=0)


def test_latents_survive_decoding(codec: TinyCodec) -> None:
    """Catches any misplaced block or scale.

    encode(decode(z)) = z for any z, as the bases are orthonormal.
    """
    latents = normal((2, 3, 16, 2, 4), 0, "test latents")
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, atol=1e-4, rtol=0)


def test_fresh_clips_survive_encoding(codec: TinyCodec, clips: Clips) -> None:
    """Catches a codec that is good only on the clips that it was fitted on.

    Measured on others: 39.7 dB for first frames, 36.1 dB for the rest.
    """
    again = codec.decode(codec.encode(clips.videos))
    assert psnr(again[:, :1], clips.videos[:, :1]) > 38
    assert psnr(again[:, 1:], clips.videos[:, 1:]) > 35


def test_latents_have_unit_variance(codec: TinyCodec, clips: Clips) -> None:
    """Catches a forgotten scale. Sizes and contrasts of 64 clips make it vary by 4 %."""
    latents = codec.encode(clips.videos)
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert latents[:, 0].std().item() == pytest.approx(latents[:, 1:].std().item(), rel=0.05)


def test_latent_distances_are_pixel_distances(codec: TinyCodec) -> None:
    """Catches whitening in place of one scale.

    With latents in the range of `rest`, |z - z'| = scale |v - v'| exactly.
    """
    one, other = normal((2, 1, 3, 16, 2, 2), 0, "test distance")
    other[:, 0] = one[:, 0]  # the first latent frame has its own gain
    ratio = (one - other).norm() / (codec.decode(one) - codec.decode(other)).norm()
    assert ratio.item() == pytest.approx(codec.scale, rel=1e-4)


def test_a_static_clip_has_equal_latents_in_all_latent_frames(
    codec: TinyCodec, clips: Clips
) -> None:
    """Catches bases whose channels mean different things, or the missing factor 2.

    `rest` spends channels on motion that a lone frame cannot have, so equality is only near: 7 %
    was measured, 140 % is what an unrotated basis gives.
    """
    latents = codec.encode(clips.videos[:, :1].repeat(1, 9, 1, 1, 1))
    assert (latents[:, 0] - latents[:, 1]).norm() < 0.1 * latents[:, 1].norm()
    # The two later latent frames encode the same pixels; matrix products of other shapes may round
    # otherwise.
    torch.testing.assert_close(latents[:, 1], latents[:, 2], atol=1e-4, rtol=0)


def test_latent_frames_are_local(codec: TinyCodec, clips: Clips) -> None:
    """Catches a latent frame that depends on other video frames, which streaming must not have.

    A change of video frames 5 to 8 changes latent frame 2 alone, and the other way round.
    """
    video = clips.videos[:2, :13]
    changed = video.clone()
    changed[:, 5:9] = changed[:, 5:9].flip(2)
    moved = (codec.encode(video) - codec.encode(changed)).abs().amax(dim=(0, 2, 3, 4)) > 1e-4
    assert moved.tolist() == [False, False, True, False]
    latents = codec.encode(video)
    zeroed = latents.clone()
    zeroed[:, 2] = 0
    moved = (codec.decode(latents) - codec.decode(zeroed)).abs().amax(dim=(0, 2, 3, 4)) > 1e-4
    assert moved.tolist() == [5 <= frame < 9 for frame in range(13)]


def test_any_size_of_whole_blocks_is_taken_block_by_block(codec: TinyCodec, clips: Clips) -> None:
    """Catches rows and columns confused, which square clips hide."""
    part = clips.videos[:2, :5, 16:32, 8:64]
    whole = codec.encode(clips.videos[:2, :5])
    torch.testing.assert_close(codec.encode(part), whole[..., 2:4, 1:8], atol=1e-4, rtol=0)


def test_saving_keeps_the_fingerprint_and_fitting_elsewhere_changes_it(
    codec: TinyCodec, tmp_path: Path
) -> None:
    """The fingerprint guards against mixing latents of different codecs."""
    codec.save(tmp_path / "codec.safetensors")
    assert TinyCodec.load(tmp_path / "codec.safetensors").fingerprint == codec.fingerprint
    assert dataclasses.replace(codec, scale=codec.scale * 1.001).fingerprint != codec.fingerprint


def test_fitting_again_gives_as_good_a_codec(clips: Clips) -> None:
    """Catches a `fit` that no longer makes the shipped codec.

    36 dB, and equal latents in all frames of a static clip. It has few clips to fit, so 3 dB and
    twice the difference are allowed.
    """
    fitted = TinyCodec.fit(render(draw_factors(16, generator(0, "test fit"))))
    again = fitted.decode(fitted.encode(clips.videos[:16]))
    assert psnr(again, clips.videos[:16]) > 33
    static = fitted.encode(clips.videos[:16, :1].repeat(1, 5, 1, 1, 1))
    assert (static[:, 0] - static[:, 1]).norm() < 0.2 * static[:, 1].norm()


@pytest.mark.parametrize("frames", [0, 2, 32])
def test_frame_counts_that_do_not_fit_are_refused(codec: TinyCodec, frames: int) -> None:
    """Catches video frames dropped in silence."""
    with pytest.raises(ValueError, match=f"{frames} video frames are not 1 \\+ 4 n"):
        codec.encode(torch.zeros(1, frames, 16, 16, 3))
    assert codec.num_latent_frames(33) == 9


def test_sizes_that_do_not_fit_are_refused(codec: TinyCodec) -> None:
    """Catches a crop in silence, or torch's own message about shapes."""
    with pytest.raises(ValueError, match="20 x 16"):
        codec.encode(torch.zeros(1, 5, 20, 16, 3))


def test_the_codec_keeps_what_is_read(codec: TinyCodec, clips: Clips) -> None:
    """Catches a codec that changes a count; all reports are made after it.

    Saturation was measured to move by .007.
    """
    reading = read(codec.decode(codec.encode(clips.videos)))
    assert reading.valid.all()
    for name in ("shape", "hue", "direction", "speed", "size"):
        assert torch.equal(getattr(reading, name), getattr(clips.factors, name)), name
    assert (reading.saturation - clips.factors.saturation).abs().mean() < 0.015
    assert (reading.speed_px - clips.reading.speed_px).abs().mean() < 0.01
    # Codec steps at latent frames must not look like seams between chunks.
    assert reading.seam_excess.mean().abs() < 0.05
