"""The tiny codec piece by piece: any split gives the bits of the whole, and all state is the caller's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.tiny.codec import TinyCodec
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
    latents, decoder = codec.encode(clips), codec.start_decoding()
    assert torch.equal(
        torch.cat([decoder.decode(part) for part in latents.split(split, dim=1)], 1), codec.decode(latents)
    )


@pytest.mark.parametrize("split", SPLITS)
def test_encoding_in_pieces_is_encoding_at_once(codec, clips, split):
    """Catches groups of four that are cut across pieces."""
    frames = [4 * part - 3 if i == 0 else 4 * part for i, part in enumerate(split)]
    encoder = codec.start_encoding()
    assert torch.equal(torch.cat([encoder.encode(part) for part in clips.split(frames, dim=1)], 1), codec.encode(clips))


def test_first_chunk_has_nine_video_frames_and_later_ones_twelve(codec, clips):
    """Catches a count by chunks of twelve, which drops or repeats three frames."""
    decoder = codec.start_decoding()
    assert [decoder.decode(part).shape[1] for part in codec.encode(clips).split(3, dim=1)] == [9, 12, 12]


def test_decoders_share_nothing_and_clones_go_on_alone(codec, clips):
    """Catches state on the codec, which all streams share."""
    latents = codec.encode(clips)
    one, other = codec.start_decoding(), codec.start_decoding()
    first = one.decode(latents[:, :1])
    assert torch.equal(other.decode(latents[:, :1]), first)
    copy = one.clone()
    assert torch.equal(one.decode(latents[:, 1:3]), copy.decode(latents[:, 1:3]))


def test_pieces_of_the_wrong_length_are_refused(codec, clips):
    """Catches a clip that loses its last frames without a word."""
    encoder = codec.start_encoding()
    with pytest.raises(ValueError, match=r"4 video frames are not 1 \+ 4 n; use 1 or 5"):
        encoder.encode(clips[:, :4])
    encoder.encode(clips[:, :5])
    with pytest.raises(ValueError, match=r"5 video frames follow the first ones; want a multiple of 4"):
        encoder.encode(clips[:, 5:10])
