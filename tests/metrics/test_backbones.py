"""CLIP and DINO: small random models of the true architecture, through the true library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from selfforcing_dfd.common import UserError, sha256_of
from selfforcing_dfd.metrics.backbones import ClipEncoder, hash_of
from selfforcing_dfd.metrics.feature_files import encoder_of, text_alignment
from selfforcing_dfd.metrics.features import Sampled, unit
from selfforcing_dfd.rng import uniform

SIDE = 32
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WORDS = ("a", "disc", "square", "moves", "red", "slowly")


def frames() -> Sampled:
    """Three wide frames, so that resizing and cropping matter."""
    pictures = (255 * uniform((3, 40, 56, 3), 0, "frames")).to(torch.uint8)
    return Sampled(pictures, pictures, pictures, 1 / 8)


def save_words(folder: Path) -> None:
    """A tokenizer of whole words that ends prompts as CLIP's does."""
    names = ["<|startoftext|>", "<|endoftext|>", *WORDS]
    words = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, names[1]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A {names[1]}", special_tokens=[(names[0], 0), (names[1], 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=names[0], eos_token=names[1], pad_token=names[1]
    ).save_pretrained(folder)


def save_processor(folder: Path) -> CLIPImageProcessorPil:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor.save_pretrained(folder)
    return processor


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 16, "max_position_embeddings": 8, "eos_token_id": 1}
    vision = {**TOWER, "image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    save_processor(folder)
    save_words(folder)
    return folder


@torch.no_grad()
def test_clip_features_are_those_of_the_library(clip_folder: Path):
    """Catches the projected embedding under the name of the raw token, and the reverse."""
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = save_processor(clip_folder)
    pictures = list(frames().frames.numpy())
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, SIDE, SIDE)
    raw = encoder_of(f"clip={clip_folder}")(frames())
    states = model.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(raw, states[:, 0])
    projected = encoder_of(f"clip_projected={clip_folder}")(frames())
    outputs = model(
        input_ids=torch.tensor([[0, 2, 1]]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        pixel_values=pixels,
    )
    torch.testing.assert_close(unit(projected), outputs.image_embeds)
    assert raw.shape != projected.shape


@torch.no_grad()
def test_text_alignment_is_the_cosine_of_frames_and_prompt(clip_folder: Path):
    """Catches padding that changes a prompt, and prompts of other videos."""
    encoder = encoder_of(f"clip_projected={clip_folder}")
    assert isinstance(encoder, ClipEncoder)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    ids = torch.tensor([[0, 2, 6, 3, 5, 1]])  # a red disc moves
    wanted = unit(model.get_text_features(input_ids=ids).pooler_output)
    prompts = ["a red disc moves", "a square"]
    texts = encoder.texts(prompts)
    torch.testing.assert_close(texts[:1], wanted)
    pictures = unit(encoder(frames()))
    videos = torch.stack([pictures, pictures.flip(1)])
    score, values = text_alignment(encoder, videos, prompts)
    assert values[0] == pytest.approx(float((pictures @ wanted[0]).mean()), rel=1e-5)
    assert score.value == pytest.approx(sum(values) / 2)
    assert encoder.texts(["a " * 40]).isfinite().all(), "a long prompt is cut"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (ViTModel, ViTConfig(**TOWER, image_size=SIDE, patch_size=8)),
        (Dinov2Model, Dinov2Config(**TOWER, image_size=SIDE, patch_size=8)),
    ],
)
@torch.no_grad()
def test_dino_is_the_first_token_after_the_norm(kind: Any, config: Any, tmp_path: Path):
    """Catches a pooler that no training has touched: DINO has none, and ViTModel draws one."""
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained(tmp_path)
    processor = save_processor(tmp_path)
    pixels = processor(images=list(frames().frames.numpy()), return_tensors="pt")["pixel_values"]
    encoder = encoder_of(f"dino={tmp_path}")
    found = encoder(frames())
    torch.testing.assert_close(found, model(pixel_values=pixels).last_hidden_state[:, 0])
    assert found.mean(1).abs().max() < 1e-5, "a layer norm has mean 0"
    described = encoder.described()
    assert described["weights_sha256"] == sha256_of(tmp_path / "model.safetensors")
    assert described["model"] == config.model_type
    assert "transformers" in described["backend"]


def test_the_hash_covers_every_file():
    """Catches a second shard that may be exchanged."""
    assert hash_of(["a"]) == "a"
    assert len({hash_of(["a", "b"]), hash_of(["b", "a"]), hash_of(["a", "c"])}) == 3


def test_folders_that_hold_no_such_model_are_refused(clip_folder: Path, tmp_path: Path):
    """Catches weights drawn at random in place of those that are not there."""
    with pytest.raises(UserError, match="want pixels, motion"):
        encoder_of("resnet")
    with pytest.raises(UserError, match="want pixels, motion"):
        encoder_of("clip")
    with pytest.raises(UserError, match="has no config"):
        encoder_of(f"clip={tmp_path}")
    with pytest.raises(UserError, match="describes a 'clip' model"):
        encoder_of(f"dino={clip_folder}")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        encoder_of(f"clip={tmp_path}")
    (tmp_path / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes())
    encoder = encoder_of(f"clip_projected={tmp_path}")
    assert isinstance(encoder, ClipEncoder)
    with pytest.raises(UserError, match="no tokenizer"):
        encoder.texts(["a"])
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["vision_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="lacks the weights vision_model"):
        encoder_of(f"clip={tmp_path}")
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="no image processor"):
        encoder_of(f"clip={tmp_path}")
