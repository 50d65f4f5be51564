"""Which world a run belongs to, and a report on video that is not of the tiny world."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import av
import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_models import fill_weights, save_network

from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.common import UserError
from selfforcing_dfd.config import Config, ConfigError, NetworkConfig
from selfforcing_dfd.data.pack import pack
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.data.sources.tiny import make_tiny_shards
from selfforcing_dfd.evaluation.report import sample_videos, write_report
from selfforcing_dfd.evaluation.video_world import clip_statistics
from selfforcing_dfd.evaluation.worlds import TINY, VIDEO, world_of
from selfforcing_dfd.rng import generator
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.stages.config_files import to_yaml
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, draw_factors, render, write_clips
from selfforcing_dfd.training.build import build_network
from tests.run_files import finish

BASIS = Path(__file__).parents[2] / "assets" / "tiny" / "codec.safetensors"
CLIPS = 4
FRAMES = 3  # latent frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a real, untrained Wan VAE, that VAE, and an untrained teacher and student."""
    folder = tmp_path_factory.mktemp("video")
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    vae.save_pretrained(folder / "wan" / "vae")
    write_clips(folder / "clips", CLIPS, 0, "long", 9)
    codec = WanCodec.from_pretrained(folder / "wan")
    shards = folder / "shards"
    pack(FileSource(folder / "clips", 9, (SIDE, SIDE)), shards, codec, TinyText())
    return folder


SIZES = NetworkConfig(num_heads=2, head_dim=16, num_layers=1, ffn_dim=32, freq_dim=32)


def config_of(folder: Path, *overrides: str) -> Config:
    text = f"""
    run: {{name: demo, stage: dmd, out: {folder}/runs, device: cpu}}
    rollout: {{frames: {FRAMES}, ladder: [1000, 500]}}
    weights: {{teacher: {folder}/teacher.safetensors}}
    data: {{shards: {folder}/shards}}
    report: {{clips: 8, teacher_steps: 1, model: {folder}/wan}}
    """
    (folder / "demo.yaml").write_text(text)
    config = load_config(str(folder / "demo.yaml"), overrides)
    network = build_network(SIZES)
    fill_weights(network, seed=0)
    for path in ("teacher.safetensors", "runs/demo/student.safetensors"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        save_network(folder / path, network)
    finish(folder / "runs" / "demo", config.run.student_updates, to_yaml(config))
    return config


def test_world_is_that_of_the_shards(folder: Path, tmp_path: Path):
    """Catches the tiny report on a Wan run: its read-out would call every clip invalid."""
    config = config_of(folder)
    assert world_of(config) is VIDEO
    make_tiny_shards(tmp_path / "tiny", 2, 0, "short", FRAMES, BASIS)
    shards = dataclasses.replace(config.data, shards=str(tmp_path / "tiny"))
    assert world_of(dataclasses.replace(config, data=shards)) is TINY


@pytest.fixture(scope="module")
def reported(folder: Path) -> tuple[Config, str]:
    config = config_of(folder)
    return config, write_report(config)


def test_video_report_has_basics_and_pictures(reported: tuple[Config, str]):
    """Catches a report that only the tiny world can have."""
    config, table = reported
    run = Path(config.run.out) / "demo"
    saved = json.loads((run / "report.json").read_text())
    assert saved["world"] == "video"
    assert saved["headline"] == ""
    assert table.startswith("\ndemo: Video")
    assert [row["name"] for row in saved["rows"]] == ["data", "teacher", "student"]
    metrics = {"saturation", "contrast", "sharpness", "motion", "spread"}
    for row in saved["rows"]:
        assert set(row["scores"]) == metrics
        assert all(score["value"] is not None for score in row["scores"].values())
        with av.open(str(run / "samples" / f"{row['name']}.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) == 9
    assert "do not judge quality" in " ".join(table.split())


def test_data_row_shows_the_clips_of_the_captions(folder: Path):
    """Catches real clips that belong to other captions than the samples beside them."""
    config = config_of(folder)
    evaluation = VIDEO.draw(config, CLIPS)
    reader = ShardReader(config.data.shards)
    decode = VIDEO.decoder(config)
    shown = torch.cat(list(VIDEO.real_clips(config, evaluation, decode)))
    assert sorted(evaluation.captions) == sorted(reader.captions)
    for caption, text, video in zip(evaluation.captions, evaluation.text, shown, strict=True):
        sample = reader[reader.captions.index(caption)]
        assert torch.equal(text, sample.text)
        assert torch.equal(video, decode(sample.latents[None])[0])


def test_a_set_of_image_to_video_holds_first_frames(folder: Path):
    """Catches frames of other clips than the captions', and captions that are asked for alone."""
    plain = config_of(folder)
    config = dataclasses.replace(plain, rollout=dataclasses.replace(plain.rollout, given=1))
    evaluation = VIDEO.draw(config, CLIPS)
    reader = ShardReader(config.data.shards)
    first_of = {reader[number].caption: reader[number].latents[:1] for number in range(len(reader))}
    assert evaluation.given is not None
    for caption, given in zip(evaluation.captions, evaluation.given, strict=True):
        assert torch.equal(given, first_of[caption])
    with pytest.raises(UserError, match=r"rollout\.given is 1: .* a caption has none"):
        VIDEO.ask(config, [reader.captions[0]])


def test_sample_takes_captions_of_the_shards(reported: tuple[Config, str], tmp_path: Path):
    """Catches text made up for a prompt that nothing here can encode."""
    config, _ = reported
    run = Path(config.run.out) / "demo"
    caption = ShardReader(config.data.shards).captions[0]
    path = sample_videos(run, [caption], tmp_path / "one.mp4")
    assert path.with_suffix(".txt").read_text().splitlines() == [f"{caption} | {caption}"] * 2
    with pytest.raises(UserError, match="holds no text for 'a lion'"):
        sample_videos(run, ["a lion"])


def test_missing_vae_is_named(folder: Path):
    """Catches a traceback about a config.json after hours of training."""
    config = config_of(folder, "report.model=")
    with pytest.raises(ConfigError, match=r"has no folder vae; set report\.model"):
        write_report(config)


@pytest.mark.parametrize(
    ("fault", "metric"),
    [("grey", "saturation"), ("pale", "contrast"), ("blurred", "sharpness"), ("frozen", "motion")],
)
def test_each_collapse_lowers_its_own_number(fault: str, metric: str):
    """Catches numbers that cannot tell a grey clip from a frozen one."""
    clips = render(draw_factors(6, generator(0, "test video world")), 9)
    shifts = range(-3, 4)
    moved = [clips.roll((down, right), dims=(2, 3)) for down in shifts for right in shifts]
    changed = {
        "grey": clips.mean(dim=-1, keepdim=True).expand_as(clips),
        "pale": 0.3 * clips + 0.7 * 0.35,
        "blurred": torch.stack(moved).mean(dim=0),
        "frozen": clips[:, :1].expand_as(clips),
    }[fault]
    before = clip_statistics(clips)[metric]
    after = clip_statistics(changed)[metric]
    assert after.shape == (6,)
    assert (after < 0.85 * before).all()
