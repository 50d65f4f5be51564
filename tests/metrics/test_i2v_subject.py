"""VBench's i2v_subject by DINO: a small random ViT of the true kind, through the true library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from clip_files import write_clip
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError
from selfforcing_dfd.metrics.i2v_subject import (
    i2v_subject,
    picture_of,
    prepared_frame,
    prepared_picture,
    resized,
)
from selfforcing_dfd.rng import uniform


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As facebook/dino-vitb16 lies on a disk, two layers deep."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    ViTModel(ViTConfig(**sizes, num_attention_heads=2, patch_size=32)).save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)
    return folder


def features(pixels: Tensor) -> Tensor:
    """Eight numbers of a picture, in place of a network."""
    weights = uniform((3 * 49, 8), 0, "weights").double() - 0.5
    pooled = torch.nn.functional.adaptive_avg_pool2d(pixels.double(), 7)
    return pooled.flatten(1) @ weights


def frames(count: int) -> Tensor:
    return (255 * uniform((count, 30, 50, 3), 1, "frames")).to(torch.uint8)


def test_the_score_is_its_formula():
    """Catches a weight, a likeness or a first frame that is left out, and seams between batches."""
    video = frames(19)  # more than one batch
    picture = Image.fromarray(video[3].numpy())
    found = i2v_subject(features, picture, iter(video))
    own = normalize(features(torch.stack([prepared_frame(frame) for frame in video])))
    given = normalize(features(prepared_picture(picture)[None]))
    to_picture = (own @ given.T)[:, 0].clamp_min(0)
    neighbours = (own[1:] * own[:-1]).sum(1).clamp_min(0)
    expected = 0.4 * to_picture.max() + 0.3 * neighbours.mean() + 0.3 * neighbours.min()
    assert found == pytest.approx(float(expected), abs=1e-9)


def test_a_frozen_picture_has_the_highest_score():
    """Catches a score that falls for stillness: VBench's rewards it, which docs have to say."""
    still = frames(1).expand(5, -1, -1, -1)
    picture = Image.fromarray(still[0].numpy())
    assert i2v_subject(features, picture, iter(still)) == pytest.approx(1, abs=2e-3)
    assert i2v_subject(features, picture, iter(frames(5))) < 0.99
    with pytest.raises(ValueError, match="fewer than two"):
        i2v_subject(features, picture, iter(still[:1]))


def test_frames_and_pictures_are_prepared_alike():
    """Catches a crop off the middle, or colours in another order."""
    picture = Image.new("RGB", (832, 480), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 176, 480))  # outside of the middle
    as_frame = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    one = prepared_picture(picture)
    other = prepared_frame(as_frame.view(480, 832, 3))
    assert one.shape == other.shape == (3, 224, 224)
    assert torch.allclose(one, other, atol=0.02)
    red = (1 - 0.485) / 0.229
    assert float(one[0].mean()) == pytest.approx(red, abs=1e-3)
    assert resized(480, 832) == (256, 443)


def test_evaluate_adds_the_score(dino, tmp_path, capsys):
    """Catches a picture of another video, and a number without its weights' hash."""
    for folder in ("videos", "images"):
        (tmp_path / folder).mkdir()
    for name, video in (("b", frames(4)), ("a", frames(4).flip(1))):
        write_clip(tmp_path / "videos" / f"{name}.mp4", video.repeat_interleave(2, 1), 16)
        Image.fromarray(video[0].repeat_interleave(2, 0).numpy()).save(
            tmp_path / "images" / f"{name}.png"
        )
    out = tmp_path / "evaluation.json"
    words = ["evaluate", str(tmp_path / "videos"), "--out", str(out)]
    words += ["--images", str(tmp_path / "images")]
    assert main(words) == EXIT_USER_ERROR
    assert "--images and --dino go together" in capsys.readouterr().err
    assert main([*words, "--dino", str(dino)]) == 0
    content = json.loads(out.read_text())
    values = [video["i2v_subject"] for video in content["videos"]]
    assert content["i2v_subject"]["value"] == pytest.approx(sum(values) / 2, abs=1e-6)
    assert len(content["i2v_subject"]["encoder"]["weights_sha256"]) == 64
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(UserError, match=r"has no picture for a.mp4; want a with"):
        picture_of(tmp_path / "videos" / "a.mp4", tmp_path / "images")
