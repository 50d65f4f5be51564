"""Clips of the tiny world and a curation folder of them, made once."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clip_files import write_clip

from selfforcing_dfd.curate.cluster import ClusterSettings, cluster_clips
from selfforcing_dfd.curate.embed import EmbedSettings, embed_clips
from selfforcing_dfd.curate.folder import Embedded, read_embedded
from selfforcing_dfd.curate.intake import Intake
from selfforcing_dfd.curate.pick import PickSettings, show_clusters
from selfforcing_dfd.tiny import world

NUM_CLIPS = 24
NUM_FRAMES = 9


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of 9 frames with three captions each, and a file that is no video."""
    folder = tmp_path_factory.mktemp("curation") / "clips"
    folder.mkdir()
    for number in range(NUM_CLIPS):
        factors, _ = world.clip_number(number, 0, "long")
        video = world.render(factors, NUM_FRAMES)[0]
        write_clip(folder / f"{number:06d}.mp4", (255 * video).round().to(torch.uint8))
        for level, caption in world.captions_by_level(factors).items():
            (folder / f"{number:06d}.{level}.txt").write_text(caption + "\n")
    (folder / "bad.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="session")
def intake(tiny_clips: Path) -> Intake:
    return Intake(tiny_clips, NUM_FRAMES, Fraction(16))


@pytest.fixture(scope="session")
def made(intake: Intake) -> Path:
    """A curation folder with features, four clusters, and sheets with three picks each."""
    folder = intake.source.parent / "curation"
    embedded = embed_clips(intake, intake.clips(), folder, EmbedSettings())
    clusters = cluster_clips(embedded, ClusterSettings(clusters=4))
    show_clusters(embedded, clusters, PickSettings(candidates=5, pictures=2, picks=3))
    return folder


@pytest.fixture
def curation(made: Path, tmp_path: Path) -> Embedded:
    """A copy of that folder, beside the same clips, to change at will."""
    folder = made.parent / f"copy-{tmp_path.name}"
    shutil.copytree(made, folder)
    return read_embedded(folder)
