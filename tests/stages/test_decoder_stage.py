"""Stage `decoder`: what it learns from, what it learns, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_wan import save_wan_folder, tiny_vae

from selfforcing_dfd import rng
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.cli.train import run
from selfforcing_dfd.codecs.fidelity import Comparison, Fidelity
from selfforcing_dfd.codecs.small_codec import SmallStream
from selfforcing_dfd.codecs.small_decoder import DecoderSize, SmallDecoder
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.common import EXIT_USER_ERROR, shipped
from selfforcing_dfd.config import Config, ConfigError
from selfforcing_dfd.data.pack import pack
from selfforcing_dfd.data.shards import Batch, ShardReader
from selfforcing_dfd.data.source import IMPORTED_CODEC
from selfforcing_dfd.data.sources.tiny import TinySource, make_tiny_shards
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.stages.decoder import DecoderStage, fits
from selfforcing_dfd.stages.decoder_teachers import DecoderTeacher, TinyTeacher, WanTeacher
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.training.build import build_trainer
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.plan import plan
from selfforcing_dfd.training.starts import check_start
from selfforcing_dfd.weights.decoders import read_decoder

Settings = Callable[..., Config]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "shards"
    make_tiny_shards(folder, 16, 0, "short", 3, shipped("assets/tiny/codec.safetensors"))
    return folder


@pytest.fixture
def settings(shards: Path, tmp_path: Path) -> Settings:
    def config(*overrides: str) -> Config:
        given = [f"data.shards={shards}", f"run.out={tmp_path}", "rollout.frames=3"]
        small = ["decoder.widths=[24,16,8]", "decoder.depths=[1,1,1]", "batch.size=4"]
        more = ["batch.micro=4", "run.student_updates=2", "run.name=small"]
        return load_config("tiny/decoder", [*given, *small, *more, *overrides])

    return config


def fidelity_of(network: Any, shards: Path, codec: TinyCodec) -> Fidelity:
    """Over all clips of the shards."""
    reader = ShardReader(shards)
    clips = torch.stack([reader[number].latents for number in range(len(reader))]).float()
    found = Comparison()
    found.add(SmallStream(network).decode(clips), codec.decode(clips))
    return found.result()


def test_it_learns_to_decode(settings: Settings, shards: Path, codec: TinyCodec) -> None:
    """Catches a loss without gradient, frames out of step, and an export that is not the student.

    Short: docs/speed.md states what the whole recipe reaches.
    """
    config = settings("run.student_updates=24", "optim.student.lr=8e-3", "ema.decay=0.5")
    start = build_trainer(settings("run.name=start")).learners["student"].network
    before = fidelity_of(start, shards, codec)
    run(config)
    found = read_decoder(run_folder(config))
    found.check_latents(codec.fingerprint)
    after = fidelity_of(found.network, shards, codec)
    assert after.psnr_db > before.psnr_db + 6
    assert after.flicker < before.flicker
    again = build_trainer(
        settings(f"decoder.start={run_folder(config) / 'student.safetensors'}", "run.name=again")
    )
    continued = fidelity_of(again.learners["student"].network, shards, codec)
    assert continued.psnr_db == pytest.approx(after.psnr_db, abs=1e-3)


def stage_of(teacher: DecoderTeacher, **options: Any) -> DecoderStage:
    student = SmallDecoder(DecoderSize(widths=(8, 8, 8), depths=(1, 1, 1)))
    student.init_weights(rng.generator(0, "student"))
    return DecoderStage({"student": student}, teacher, **options)


def wan_teacher() -> WanTeacher:
    return WanTeacher(WanCodec(tiny_vae()))


@pytest.mark.parametrize("world", ["tiny", "wan"])
def test_each_part_of_the_loss_counts(world: str, codec: TinyCodec) -> None:
    """Catches a part with no gradient, a weight that is not used, and a teacher that learns."""
    teacher = TinyTeacher(codec) if world == "tiny" else wan_teacher()
    latents = rng.normal((2, 3, 16, 4, 5), 0, "latents").float()
    batch = Batch(latents, torch.zeros(2, 1, 1), ("", ""), ("0", "1"), None)
    draw = Draw(0, 0, 2, 0, (0, 1))
    losses = {}
    for name, weights in {
        "all": (1.0, 1.0),
        "no features": (0.0, 1.0),
        "pixels": (0.0, 0.0),
    }.items():
        stage = stage_of(teacher, perceptual=weights[0], temporal=weights[1])
        part = stage.loss("student", batch, draw, 0)
        part.loss.backward()
        values = {key: float(value.mean()) for key, value in part.values.items()}
        wanted = values["pixel_loss"]
        wanted += weights[0] * values["perceptual_loss"] + weights[1] * values["temporal_loss"]
        assert float(part.loss.detach()) == pytest.approx(wanted, rel=1e-5)
        assert all(values.values())
        gradient = stage.trained["student"].get_parameter("colours.weight").grad
        assert gradient is not None
        losses[name] = gradient
    assert not torch.allclose(losses["all"], losses["no features"])
    assert not torch.allclose(losses["no features"], losses["pixels"])
    video = teacher.decode(latents).requires_grad_()
    features = teacher.features(video)
    assert [each.shape[2] for each in features] == ([9, 9] if world == "wan" else [16])
    (gradient,) = torch.autograd.grad(sum(each.sum() for each in features), video)
    assert bool(gradient.flatten(2).abs().sum(2).all())  # every frame is seen


class KnownTeacher:
    """Shows latents as they are, as grey pictures, and sees pixels as they are."""

    fingerprint = "known"

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.movedim(2, -1)[..., :1].expand(*latents.shape[:2], 2, 3, 3)

    def features(self, videos: torch.Tensor) -> list[torch.Tensor]:
        return [videos, 2 * videos]


class OffBy(torch.nn.Module):
    """A decoder that shows the teacher's frames plus an error for each."""

    def __init__(self, errors: torch.Tensor) -> None:
        super().__init__()
        self.errors = torch.nn.Parameter(errors)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return KnownTeacher().decode(latents) + self.errors.view(1, -1, 1, 1, 1), []


def test_the_loss_by_hand() -> None:
    """Catches frames out of step, changes that are not compared, and a share of something else.

    Frames are .1, .2 and .6 bright, the second one is shown .06 too bright.
    """
    frames = torch.tensor([0.1, 0.2, 0.6]).view(1, 3, 1, 1, 1)
    latents = frames.expand(2, 3, 16, 2, 3)
    draw = Draw(0, 0, 2, 0, (0, 1))
    for error, pixels, share, changes in ((0.0, 0, 0, 0), (0.06, 0.02, 0.02 / 0.3, 0.06)):
        student = OffBy(torch.tensor([0.0, error, 0.0]))
        stage = DecoderStage({"student": student}, KnownTeacher(), perceptual=0.5, temporal=2.0)
        batch = Batch(latents, torch.zeros(2, 1, 1), ("", ""), ("0", "1"), None)
        found = stage.loss("student", batch, draw, 0)
        values = {name: value.tolist() for name, value in found.values.items()}
        assert values["pixel_loss"] == pytest.approx([pixels] * 2, abs=1e-6)
        assert values["perceptual_loss"] == pytest.approx([share] * 2, abs=1e-5)
        assert values["temporal_loss"] == pytest.approx([changes] * 2, abs=1e-6)
        wanted = pixels + 0.5 * share + 2 * changes
        assert float(found.loss.detach()) == pytest.approx(wanted, abs=1e-5)


def test_features_are_what_wans_encoder_sees() -> None:
    """Catches pictures in another range than the encoder's own, and another layer's input."""
    teacher = wan_teacher()
    videos = rng.normal((1, 5, 16, 16, 3), 0, "videos").float().mul(0.2).add(0.5).clamp(0, 1)
    seen: list[torch.Tensor] = []
    layers = teacher.codec.vae.encoder.down_blocks
    halvings = [layer for layer in layers if type(layer).__name__ == "WanResample"]
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for layer in halvings
    ]
    teacher.codec.encode(videos[:, :1])  # a first frame has no past, as the features' first frame
    for hook in hooks:
        hook.remove()
    for ours, own in zip(teacher.features(videos), seen[:2], strict=True):
        torch.testing.assert_close(ours[:, :, :1], own.float(), rtol=1e-4, atol=1e-4)


def test_crops_are_squares_of_the_first_frames(codec: TinyCodec) -> None:
    """Catches rows in place of columns, the same corner for all, and frames that begin later."""
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    frames = torch.arange(5.0).view(1, 5, 1, 1, 1) * 1000
    latents = (rows * 100 + columns + frames).expand(8, 5, 16, 9, 12)
    stage = stage_of(TinyTeacher(codec), frames=2, crop=4)
    cut = stage.part_of(latents, Draw(0, 0, 8, 0, tuple(range(8))))
    assert cut.shape == (8, 2, 16, 4, 4)
    corners = cut[:, 0, 0, 0, 0]
    assert len(set(corners.tolist())) > 1
    square = (rows * 100 + columns)[:4, :4]
    assert torch.equal(cut[:, 0, 0], corners.view(8, 1, 1) + square)
    assert torch.equal(cut[:, 1, 3] - cut[:, 0, 3], torch.full((8, 4, 4), 1000.0))


def test_a_plan_says_what_it_does_and_costs(settings: Settings) -> None:
    """Catches a dry run that asks transformers for sizes, or hides what is missing."""
    text = plan(settings())
    assert "latent frames of each clip" in text
    assert "decoder with gradient" in text
    assert "no caption" not in text
    text = plan(load_config("wan1.3b/decoder"))
    assert "9,607,768 parameters" in text
    assert "decoder.vae: weights/Wan2.1-T2V-1.3B-Diffusers (MISSING)" in text
    assert "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in text
    assert "pack CLIPS --codec wan" in text


def test_what_does_not_fit_is_refused(settings: Settings, shards: Path, tmp_path: Path) -> None:
    """Catches settings without effect, and a VAE that did not make the latents."""
    for override, message in (
        ("model.lora_rank=4", r"model\.lora_rank is 4"),
        ("checkpoint.export=int8", "int8"),
        ("decoder.frames=1", r"decoder\.frames is 1"),
        ("decoder.frames=4", r"decoder\.frames is 4"),
        ("report.clips=2", r"report\.clips is 2"),
        ("decoder.widths=[4,4]", "want 3 numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(override)
    with pytest.raises(ConfigError, match=r"decoder\.vae is nowhere, which does not exist"):
        check_start(settings("decoder.vae=nowhere"))
    with pytest.raises(ConfigError, match=r"decoder\.crop is 9, but latents are 8 x 8"):
        build_trainer(settings("decoder.crop=9"))
    folder = save_wan_folder(tmp_path / "wan")
    with pytest.raises(ConfigError, match=r"holds latents of tiny-codec-.*is wan-vae-"):
        build_trainer(settings(f"decoder.vae={folder}"))


def test_imported_latents_are_wans() -> None:
    """Catches published latents, whose VAE is not hashed, refused or taken for the tiny ones."""
    assert fits("wan-vae-1", "wan-vae-1", True)
    assert fits(IMPORTED_CODEC, "wan-vae-1", True)
    assert not fits(IMPORTED_CODEC, "tiny-codec-1", False)
    assert not fits("wan-vae-2", "wan-vae-1", True)


def test_it_learns_from_wans_vae(settings: Settings, tmp_path: Path) -> None:
    """Catches a teacher on other latents than the shards', or in another dtype than asked for."""
    folder = save_wan_folder(tmp_path / "wan")
    vae = WanCodec.from_pretrained(folder)
    pack(TinySource(2, 0, "short", 9), tmp_path / "wan-shards", vae, TinyText())
    config = settings(
        f"data.shards={tmp_path / 'wan-shards'}",
        f"decoder.vae={folder}",
        "decoder.crop=4",
        "batch.size=2",
        "batch.micro=2",
        "model.compute=bfloat16",
    )
    run(config)
    found = read_decoder(run_folder(config))
    assert found.codec == vae.fingerprint
    found.check_latents("wan-vae-of-another-dtype")
    latents = ShardReader(tmp_path / "wan-shards")[0].latents[None]
    assert SmallStream(found.network).decode(latents).shape == (1, 9, 64, 64, 3)


def test_a_decoder_makes_no_clips_by_itself(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback for a run that has no transformer."""
    config = settings("run.student_updates=1")
    run(config)
    assert main(["sample", "--run", str(run_folder(config))]) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "is a run of stage decoder, which makes no clips by itself" in said
    assert f"--decoder-weights {run_folder(config)}" in said
