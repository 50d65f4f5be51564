"""Pictures as Wan2.1-I2V takes them, against diffusers' own pipeline on the same tiny weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from tiny_pictures import IMAGE_DIM, save_image_encoder
from tiny_wan import HEIGHT, WIDTH, tiny_vae
from transformers import CLIPImageProcessor, CLIPVisionModel

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.pictures import (
    PictureEncoder,
    PictureEncoderError,
    check_picture_encoder,
)
from selfforcing_dfd.codecs.wan_vae import WanCodec

FRAMES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_image_encoder(tmp_path_factory.mktemp("i2v"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> PictureEncoder:
    return PictureEncoder.from_pretrained(folder, WanCodec(tiny_vae()))


def shown() -> torch.Tensor:
    """One picture in 255 steps, [1, H, W, 3]."""
    blocks = rng.uniform((1, HEIGHT // 8, WIDTH // 8, 3), 0, "picture").float()
    return (255 * blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)).round() / 255


def diffusers_pipeline(folder: Path) -> Any:
    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_vae(),
        scheduler=None,
        image_processor=CLIPImageProcessor.from_pretrained(folder / "image_processor"),
        image_encoder=CLIPVisionModel.from_pretrained(folder / "image_encoder"),
        transformer=None,
    )


def test_channels_and_tokens_are_those_of_diffusers_pipeline(encoder, folder):
    """Catches another mask, grey that is black, channels in another order, another CLIP layer.

    Tolerance: the VAE computes the same convolutions in pieces, in float32.
    """
    pipeline = diffusers_pipeline(folder)
    picture = shown()
    image = 2 * picture.permute(0, 3, 1, 2) - 1
    _, wanted = pipeline.prepare_latents(
        image, 1, 16, HEIGHT, WIDTH, 1 + 4 * (FRAMES - 1), torch.float32, torch.device("cpu")
    )
    found = encoder.encode(picture, FRAMES)
    assert wanted.shape == (1, 20, FRAMES, HEIGHT // 8, WIDTH // 8)
    torch.testing.assert_close(found.channels, wanted.transpose(1, 2), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        pixels = (255 * picture[0]).to(torch.uint8).numpy()
        states = pipeline.encode_image(pixels, torch.device("cpu"))
    assert states.shape == (1, 5, IMAGE_DIM)
    assert torch.equal(found.tokens, states)


def test_a_clips_picture_is_its_own_first_latent_frame(encoder):
    """Catches a first frame that went through the VAE twice, and tokens of another row's picture.

    Frames after it are those of the picture that the first latent frame decodes to.
    """
    clips = rng.normal((2, FRAMES, 16, HEIGHT // 8, WIDTH // 8), 0, "clips").float()
    latents, tokens = encoder.of_clips(clips)
    assert torch.equal(latents[:, 0], clips[:, 0])
    for row in range(2):
        decoded = encoder.codec.decode(clips[row : row + 1, :1])[:, 0]
        torch.testing.assert_close(tokens[row : row + 1], encoder.tokens(decoded))
        one = encoder.latents(decoded, FRAMES)
        torch.testing.assert_close(latents[row : row + 1, 1:], one[:, 1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)


def test_a_missing_encoder_is_told_with_its_cure(folder, tmp_path):
    """Catches an error of transformers that names no command."""
    with pytest.raises(PictureEncoderError, match=r"image_encoder/config.json.*hf download Wan-AI"):
        check_picture_encoder(tmp_path)
    copy = save_image_encoder(tmp_path / "copy")
    (copy / "image_encoder" / "model.safetensors").unlink()
    with pytest.raises(PictureEncoderError, match=r"has no image_encoder/\*.safetensors"):
        check_picture_encoder(copy)
    with pytest.raises(PictureEncoderError, match=f"width {IMAGE_DIM}, the network wants 1280"):
        check_picture_encoder(folder, 1280)


def test_another_model_is_no_image_encoder(tmp_path):
    """Catches random weights in place of missing ones, and an encoder of another kind."""
    copy = save_image_encoder(tmp_path)
    config = copy / "image_encoder" / "config.json"
    stated = json.loads(config.read_text())
    config.write_text(json.dumps({**stated, "model_type": "siglip"}))
    with pytest.raises(PictureEncoderError, match="'siglip' model"):
        check_picture_encoder(copy)
    config.write_text(json.dumps({**stated, "num_hidden_layers": 4}))
    with pytest.raises(PictureEncoderError, match=r"image_encoder lacks .*layers.3"):
        PictureEncoder.from_pretrained(copy, WanCodec(tiny_vae()))
