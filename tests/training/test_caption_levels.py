"""Runs on shards whose clips have captions of three levels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from selfforcing_dfd.common import UserError, shipped
from selfforcing_dfd.config import Config, ConfigError
from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.order import read_at
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.tiny import make_tiny_shards
from selfforcing_dfd.evaluation.worlds import world_of
from selfforcing_dfd.training.build import build_trainer
from selfforcing_dfd.training.build_data import build_order, build_reader
from selfforcing_dfd.training.identity import data_fingerprint
from selfforcing_dfd.training.loop import Trainer
from selfforcing_dfd.weights.checkpoint_files import CheckpointError

BASIS = shipped("assets/tiny/codec.safetensors")
Settings = Callable[..., Config]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of eight clips with three captions each."""
    folder = tmp_path_factory.mktemp("levels") / "shards"
    make_tiny_shards(folder, 8, 0, "all", 9, BASIS)
    return folder


def trained(settings: Settings, three: Path, name: str, *overrides: str) -> Trainer:
    config = settings(
        "run.stage=dmd", f"data.shards={three}", f"run.name={name}", "batch.micro=2", *overrides
    )
    trainer = build_trainer(config, resume=True)
    trainer.run()
    return trainer


def weights(trainer: Trainer) -> Iterator[torch.Tensor]:
    return (value for each in trainer.learners.values() for value in each.network.parameters())


def test_mixed_captions_resume_bit_for_bit(settings: Settings, three: Path) -> None:
    """Catches levels drawn from a state that a resume forgets, and a level that changes nothing."""
    mixed = "data.captions=mixed"
    whole = trained(settings, three, "whole", mixed)
    trained(settings, three, "parts", mixed, "run.student_updates=2")
    parts = trained(settings, three, "parts", mixed)
    pairs = zip(weights(whole), weights(parts), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(CheckpointError, match=r"data\.captions"):
        trained(settings, three, "parts", "data.captions=long")
    other = trained(settings, three, "long", "data.captions=long")
    assert not torch.equal(next(weights(whole)), next(weights(other)))


def test_which_captions_are_meant_must_be_said(settings: Settings, three: Path) -> None:
    """Catches a run whose settings do not say how loose its captions are."""
    with pytest.raises(ConfigError, match=r"short, medium, long; choose one with data\.captions="):
        build_reader(settings(f"data.shards={three}"))
    with pytest.raises(UserError, match=r"short captions are asked for; .*data\.tiny\.level=all"):
        build_reader(settings("data.captions=short"))
    reader = build_reader(settings(f"data.shards={three}", "data.captions=medium"))
    assert all(len(caption.split()) == 4 for caption in reader.captions)


def test_noise_of_another_caption_is_refused(
    settings: Settings, three: Path, tmp_path: Path
) -> None:
    """Catches inversion whose noise was found under another caption than training reads."""
    out = tmp_path / "noise"
    store_noise(three, lambda latents, text, fresh: fresh, out=out, captions="long")
    inversion = (f"data.shards={out}", "dfd.pairing=inversion")
    assert build_reader(settings(*inversion, "data.captions=long")).has_noise
    for choice in ("short", "mixed"):
        with pytest.raises(ConfigError, match=rf"for long captions, and data.captions is {choice}"):
            build_reader(settings(*inversion, f"data.captions={choice}"))


def test_a_report_asks_with_the_captions_of_training(settings: Settings, three: Path) -> None:
    """Catches a student trained on long captions and judged on short ones."""
    for choice, words in (("long", 7), ("short", 3)):
        config = settings(f"data.shards={three}", f"data.captions={choice}")
        asked = world_of(config).draw(config, 3).captions
        assert [len(caption.split()) for caption in asked] == [words] * 3


def test_positions_draw_levels_and_samples_apart(settings: Settings, three: Path) -> None:
    """Catches a clip that always comes with one of its captions."""
    config = settings(f"data.shards={three}", "data.captions=mixed")
    reader = build_reader(config)
    order = build_order(config, reader, {})
    met = {(read.key, read.caption) for read in (read_at(reader, order, n) for n in range(96))}
    assert len(met) == 24
    fingerprints = {data_fingerprint(reader, False), data_fingerprint(ShardReader(three), False)}
    assert len(fingerprints) == 1
