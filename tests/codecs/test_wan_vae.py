"""Wan's VAE in pieces: bit for bit diffusers' full decode and encode, for any split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.wan_vae import CodecError, WanCodec

SPLITS = [(4,), (1, 3), (3, 1), (1, 1, 1, 1), (2, 1, 1)]


@pytest.fixture(scope="module")
def codec() -> WanCodec:
    """The real class with the real plan of layers, an eighth as wide and deep."""
    torch.manual_seed(0)
    return WanCodec(AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1))


@pytest.fixture(scope="module")
def video() -> Tensor:
    return rng.uniform((1, 13, 16, 24, 3), 0, "video").float()


@pytest.fixture(scope="module")
def latents(codec: WanCodec, video: Tensor) -> Tensor:
    return codec.encode(video)


def by_diffusers(vae: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised latents and decoded video of the unchanged class."""
    mean, deviation = (
        torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    with torch.no_grad():
        mode = vae.encode((2 * video - 1).permute(0, 4, 1, 2, 3)).latent_dist.mode()
        normal = (mode - mean) / deviation
        decoded = vae.decode(normal * deviation + mean).sample
    return normal.transpose(1, 2), (decoded.permute(0, 2, 3, 4, 1) + 1) / 2


@pytest.fixture(scope="module")
def larger(codec: WanCodec) -> tuple[Tensor, Tensor, Tensor]:
    """A video of 32 x 48 with what diffusers makes of it."""
    video = rng.uniform((1, 13, 32, 48, 3), 0, "larger video").float()
    return video, *by_diffusers(codec.vae, video)


@pytest.fixture(scope="module")
def bare() -> WanCodec:
    """The VAE without the two 1 x 1 x 1 convolutions outside encoder and decoder.

    Their last bits depend on how many frames they get. diffusers gives them all latent frames at
    once; a stream gives them one at a time.
    """
    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    vae.quant_conv = torch.nn.Identity()
    vae.post_quant_conv = torch.nn.Identity()
    return WanCodec(vae)


def decoded_in_pieces(codec: WanCodec, latents: Tensor, split: tuple[int, ...]) -> Tensor:
    decoder = codec.start_decoding()
    return torch.cat([decoder.decode(part) for part in latents.split(split, dim=1)], dim=1)


def encoded_in_pieces(codec: WanCodec, video: Tensor, split: tuple[int, ...]) -> Tensor:
    lengths = [4 * part - 3 if i == 0 else 4 * part for i, part in enumerate(split)]
    encoder = codec.start_encoding()
    return torch.cat([encoder.encode(part) for part in video.split(lengths, dim=1)], dim=1)


@pytest.mark.parametrize("split", SPLITS)
def test_pieces_are_the_whole_to_the_bit(codec, video, latents, split):
    """Catches features lost between pieces, and video frames that are grouped wrongly.

    For example a later frame that is taken for the first.
    """
    assert torch.equal(decoded_in_pieces(codec, latents, split), codec.decode(latents))
    assert torch.equal(encoded_in_pieces(codec, video, split), latents)


@pytest.mark.parametrize("split", SPLITS)
def test_pieces_are_diffusers_whole_to_the_bit(bare, video, split):
    """Catches caches passed otherwise than within diffusers' own call, and wrong normalisation."""
    latents, decoded = by_diffusers(bare.vae, video)
    assert torch.equal(encoded_in_pieces(bare, video, split), latents)
    assert torch.equal(decoded_in_pieces(bare, latents, split), decoded)


@pytest.mark.parametrize("split", SPLITS)
def test_pieces_are_the_unchanged_vaes_whole_to_the_bit(codec, larger, split):
    """Catches a difference in the parts of the VAE that the tests above leave out.

    At this size (4 x 6 latents) a 1 x 1 x 1 convolution rounds alike for any number of frames.
    """
    video, latents, decoded = larger
    assert torch.equal(encoded_in_pieces(codec, video, split), latents)
    assert torch.equal(decoded_in_pieces(codec, latents, split), decoded)


def test_whole_is_diffusers_whole(codec, video, latents):
    """Catches wrong means, deviations or projections.

    1e-5 is ten times the rounding of sums taken in another order.
    """
    wanted, decoded = by_diffusers(codec.vae, video)
    assert (latents - wanted).abs().max() < 1e-5
    assert (codec.decode(latents) - decoded).abs().max() < 1e-5


def test_a_batch_is_its_videos(codec, video):
    """Catches samples of a batch that are mixed.

    In a batch convolutions sum in another order; 1e-5 is ten times that rounding.
    """
    batch = torch.cat([video, video.flip(1)])
    latents = codec.encode(batch)
    for i in range(2):
        assert (latents[i : i + 1] - codec.encode(batch[i : i + 1])).abs().max() < 1e-5
        assert (codec.decode(latents)[i] - codec.decode(latents[i : i + 1])[0]).abs().max() < 1e-5


def test_first_chunk_has_nine_video_frames_and_later_ones_twelve(codec, latents):
    """Catches frames counted as four a latent frame throughout."""
    decoder = codec.start_decoding()
    assert [decoder.decode(latents[:, :3]).shape[1] for _ in range(3)] == [9, 12, 12]


def test_interleaved_decoders_equal_each_alone(codec, latents):
    """Catches features kept on the module, which two streams share."""
    inputs = (latents, latents.flip(1))
    decoders = [codec.start_decoding() for _ in inputs]
    parts: list[list[Tensor]] = [[], []]
    for frame in range(latents.shape[1]):
        for decoder, given, made in zip(decoders, inputs, parts, strict=True):
            made.append(decoder.decode(given[:, frame : frame + 1]))
    for given, made in zip(inputs, parts, strict=True):
        assert torch.equal(torch.cat(made, dim=1), codec.decode(given))


def test_a_clone_goes_on_alone(codec, latents):
    """Catches a snapshot that shares tensors with the running stream."""
    decoder = codec.start_decoding()
    decoder.decode(latents[:, :2])
    copy = decoder.clone()
    again = decoder.clone()
    ahead = decoder.decode(latents[:, 2:])
    assert torch.equal(copy.decode(latents[:, 2:]), ahead)
    decoder.decode(latents[:, :1])
    assert torch.equal(again.decode(latents[:, 2:]), ahead)


def test_module_keeps_nothing_and_memory_does_not_grow(codec, latents):
    """Catches the module's own feature map, and features that pile up with the video's length."""
    before = {name: value for name, value in vars(codec.vae).items() if "feat_map" in name}
    decoder = codec.start_decoding()
    sizes = []
    for _ in range(6):
        decoder.decode(latents[:, :1])
        sizes.append(decoder.num_bytes)
    assert {name: value for name, value in vars(codec.vae).items() if "feat_map" in name} == before
    assert sizes[2] > 0
    assert len(set(sizes[2:])) == 1


def test_channels_last_changes_the_last_bits_only(codec, video, latents):
    """Catches a memory format that permutes what it should only lay out differently.

    Float32 sums in another order: 1e-4 is a hundred times what was seen, a permutation gives about
    1.
    """
    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    other = WanCodec(vae, channels_last=True)
    assert (other.decode(latents) - codec.decode(latents)).abs().max() < 1e-4
    assert (other.encode(video) - latents).abs().max() < 1e-4


def test_channels_last_reaches_all_weights():
    """Catches two-dimensional convolutions that keep the old layout.

    Those of the upsamplers would undo the layout for all layers after them.
    """
    vae: Any = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    WanCodec(vae, channels_last=True)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    weights = [
        module.weight
        for module in vae.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d)
    ]
    assert len(weights) > 50
    assert all(weight.is_contiguous(memory_format=formats[weight.ndim]) for weight in weights)


def test_the_vae_of_another_wan_is_refused():
    """Catches the VAE of Wan2.2 5B, which would fail later with a message about shapes.

    Its pixels come in patches.
    """
    with pytest.raises(
        CodecError, match=r"patch_size 2, as Wan2\.2 5B has; want the one of Wan2\.1"
    ):
        WanCodec(
            AutoencoderKLWan(
                base_dim=8, in_channels=12, out_channels=12, patch_size=2, num_res_blocks=1
            )
        )


def test_saved_folder_is_read_again(codec, latents, tmp_path: Path):
    """Catches weights that are not read, and a folder layout that only its author has."""
    codec.vae.save_pretrained(tmp_path / "model" / "vae")
    for folder in (tmp_path / "model", tmp_path / "model" / "vae"):
        again = WanCodec.from_pretrained(folder)
        assert again.fingerprint == codec.fingerprint
        assert torch.equal(again.decode(latents), codec.decode(latents))
    with pytest.raises(CodecError, match=r"holds no vae/config.json; want a diffusers folder"):
        WanCodec.from_pretrained(tmp_path)


def test_what_does_not_fit_is_refused(codec, video, latents):
    """Catches clips that lose frames or rows without a word."""
    with pytest.raises(CodecError, match=r"12 video frames are not 1 \+ 4 n; use 9 or 13"):
        codec.encode(video[:, :12])
    with pytest.raises(
        CodecError, match=r"video frames are 16 x 20; height and width must be multiples of 8"
    ):
        codec.encode(video[:, :, :, :20])
    for wrong in (latents[:, :, :8], latents[:, :0]):
        with pytest.raises(CodecError, match=r"want \[B, F, 16, h, w\], F one or more"):
            codec.decode(wrong)
    with pytest.raises(CodecError, match=r"want \[B, T, H, W, 3\], colours last"):
        codec.encode(video.movedim(-1, 2))
    encoder = codec.start_encoding()
    encoder.encode(video[:, :5])
    with pytest.raises(
        CodecError, match=r"5 video frames follow the first ones; want a multiple of 4"
    ):
        encoder.encode(video[:, :5])
