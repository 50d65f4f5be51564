"""The tiny codec piece by piece: any split gives the bits of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.tiny.codec import TinyCodec, num_video_frames
from selfforcing_dfd.tiny.world import draw_factors, render

SPLITS = [(9,), (1,) * 9, (1, 8), (3, 3, 3), (2, 1, 6), (4, 5)]


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return render(draw_factors(2, rng.generator(3, "codec test")))


@pytest.fixture(scope="module")
def codec(clips: Tensor) -> TinyCodec:
    return TinyCodec.fit(clips)


@pytest.mark.parametrize("split", SPLITS)
def test_decoding_in_pieces_is_decoding_at_once(codec, clips, split):
    """Catches a later piece whose first latent frame is taken for the first of the video."""
    latents = codec.encode(clips)
    decoder = codec.start_decoding()
    assert torch.equal(
        torch.cat([decoder.decode(part) for part in latents.split(split, dim=1)], 1),
        codec.decode(latents),
    )


@pytest.mark.parametrize("split", SPLITS)
def test_encoding_in_pieces_is_encoding_at_once(codec, clips, split):
    """Catches groups of four that are cut across pieces."""
    frames = [4 * part - 3 if i == 0 else 4 * part for i, part in enumerate(split)]
    encoder = codec.start_encoding()
    assert torch.equal(
        torch.cat([encoder.encode(part) for part in clips.split(frames, dim=1)], 1),
        codec.encode(clips),
    )


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 8, 8), (1, 16, 16), (1, 24, 40)])
@pytest.mark.parametrize("split", [(1,) * 7, (3, 3, 1), (1, 6), (2, 5)])
def test_any_batch_and_size_is_split_without_a_trace(codec, size, split):
    """Catches products over all latent frames at once.

    Products of few blocks round otherwise when there are fewer frames.
    """
    batch, height, width = size
    videos = rng.uniform((batch, 25, height, width, 3), 0, "codec sizes").float()
    latents = rng.normal((batch, 7, 16, height // 8, width // 8), 0, "codec sizes")
    encoder = codec.start_encoding()
    decoder = codec.start_decoding()
    frames = [num_video_frames(part, i == 0) for i, part in enumerate(split)]
    encoded = torch.cat([encoder.encode(part) for part in videos.split(frames, dim=1)], 1)
    decoded = torch.cat([decoder.decode(part) for part in latents.split(split, dim=1)], 1)
    assert torch.equal(encoded, codec.encode(videos))
    assert torch.equal(decoded, codec.decode(latents))


def test_first_chunk_has_nine_video_frames_and_later_ones_twelve(codec, clips):
    """Catches a count by chunks of twelve, which drops or repeats three frames."""
    decoder = codec.start_decoding()
    counts = [decoder.decode(part).shape[1] for part in codec.encode(clips).split(3, dim=1)]
    assert counts == [num_video_frames(3, first=i == 0) for i in range(3)] == [9, 12, 12]
    assert sum(counts) == clips.shape[1] == num_video_frames(9, first=True)
    with pytest.raises(ValueError, match="0 latent frames; want one or more"):
        num_video_frames(0, first=True)


def test_no_latents_leave_the_first_ones_to_come(codec, clips):
    """Catches an empty piece that counts as the first.

    The first latent frame would then give four video frames.
    """
    latents = codec.encode(clips)
    decoder = codec.start_decoding()
    assert decoder.decode(latents[:, :0]).shape[1] == 0
    assert torch.equal(decoder.decode(latents), codec.decode(latents))


def test_decoders_share_nothing(codec, clips):
    """Catches state on the codec, which all streams share.

    Two interleaved decoders give what each gives alone.
    """
    latents = codec.encode(clips)
    one = codec.start_decoding()
    other = codec.start_decoding()
    pieces = [(one.decode(part), other.decode(part.flip(0))) for part in latents.split(3, dim=1)]
    assert torch.equal(torch.cat([piece for piece, _ in pieces], 1), codec.decode(latents))
    assert torch.equal(torch.cat([piece for _, piece in pieces], 1), codec.decode(latents.flip(0)))


def test_a_clone_goes_on_from_where_it_was_made(codec, clips):
    """Catches a clone that starts again or follows the original.

    One is made before the first latent frame, one after.
    """
    latents = codec.encode(clips)
    decoder = codec.start_decoding()
    fresh = decoder.clone()
    first = decoder.decode(latents[:, :1])
    later = decoder.clone()
    rest = decoder.decode(latents[:, 1:])
    assert torch.equal(fresh.decode(latents[:, :1]), first)
    assert torch.equal(later.decode(latents[:, 1:]), rest)


def test_bits_do_not_depend_on_the_layout_in_memory(codec):
    """Catches products of a slice that is not copied.

    A kernel for transposed rows may round otherwise.
    """
    latents = rng.normal((1, 7, 16, 1, 3), 0, "codec layout")
    channels_last = latents.movedim(2, -1).contiguous().movedim(-1, 2)
    # not aligned
    shifted = torch.cat([latents.new_zeros(1), latents.flatten()])[1:].view(latents.shape)
    for same in (channels_last, shifted):
        assert torch.equal(codec.decode(same), codec.decode(latents))


def test_decoder_and_encoder_follow_the_device(codec):
    """Catches bases left on the host, or moved for every piece.

    The device `meta` has shapes without numbers.
    """
    decoder = codec.start_decoding()
    encoder = codec.start_encoding()
    video = decoder.decode(torch.zeros(1, 3, 16, 2, 3, device="meta"))
    encoder.encode(video)
    for part in (decoder, encoder):
        moved = part.codec.first
        assert moved.device.type == "meta"
        assert part.codec.to("meta").first is moved
    assert codec.first.device.type == "cpu"


def test_pieces_of_the_wrong_length_are_refused(codec, clips):
    """Catches a clip that loses its last frames without a word."""
    encoder = codec.start_encoding()
    with pytest.raises(ValueError, match=r"4 video frames are not 1 \+ 4 n; use 1 or 5"):
        encoder.encode(clips[:, :4])
    encoder.encode(clips[:, :5])
    with pytest.raises(
        ValueError, match=r"5 video frames follow the first ones; want a multiple of 4"
    ):
        encoder.encode(clips[:, 5:10])
    # refusals left no trace
    assert torch.equal(encoder.encode(clips[:, 5:9]), codec.encode(clips)[:, 2:3])


def test_a_piece_refused_for_its_size_is_not_the_first(codec, clips):
    """Catches an encoder that counts a piece it refused.

    The next piece would lose its single first frame.
    """
    encoder = codec.start_encoding()
    with pytest.raises(
        ValueError, match="video frames are 60 x 64; height and width must be multiples of 8"
    ):
        encoder.encode(clips[:, :5, :60])
    assert torch.equal(encoder.encode(clips), codec.encode(clips))


def test_wrong_channels_are_refused(codec, clips):
    """Catches channels and frames confused.

    Channels-first videos can pass for videos of another size.
    """
    with pytest.raises(
        ValueError, match=r"latents are \(2, 16, 9, 8, 8\); want \[B, F, 16, h, w\], channels third"
    ):
        codec.decode(codec.encode(clips).transpose(1, 2))
    with pytest.raises(ValueError, match=r"want \[B, T, H, W, 3\], colours last"):
        codec.encode(clips.movedim(-1, 2))
