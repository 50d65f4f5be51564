"""Tiny-world clips and their shards, made once; a test that changes them works on a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_pack import pack_tiny
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.data.sources.video import read_video
from selfforcing_dfd.tiny import world
from selfforcing_dfd.tiny.codec import TinyCodec

NUM_CLIPS = 12
NUM_VIDEO_FRAMES = 9
SIZE = (64, 64)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clips"
    world.write_clips(folder, NUM_CLIPS, seed=0, level="short", num_frames=NUM_VIDEO_FRAMES)
    return folder


@pytest.fixture(scope="session")
def codec(clips: Path) -> TinyCodec:
    videos = [read_video(path, NUM_VIDEO_FRAMES) for path in sorted(clips.glob("*.mp4"))[:4]]
    return TinyCodec.fit(torch.stack(videos).float() / 255)


@pytest.fixture(scope="session")
def packed(clips: Path, codec: TinyCodec) -> Path:
    """12 samples in shards of 5, 5 and 2."""
    out = clips.parent / "shards"
    pack_tiny(clips, out, codec, shard_size=5)
    return out


@pytest.fixture
def own_shards(packed: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


@pytest.fixture
def own_clips(clips: Path, tmp_path: Path) -> Path:
    """Copies of the first four clips, which a test may damage."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(4):
        for ending in (".mp4", ".txt"):
            shutil.copyfile(clips / f"{number:06d}{ending}", folder / f"{number:06d}{ending}")
    return folder


@pytest.fixture
def frames() -> Tensor:
    """uint8 [9, 64, 64, 3]: a random field a frame, smooth enough for chroma at half size."""
    coarse = rng.uniform((9, 3, 3, 3), 0, "frames").float()
    smooth = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().byte().permute(0, 2, 3, 1).contiguous()


@pytest.fixture
def mixed(clips: Path, tmp_path: Path) -> Path:
    """Clips 0 to 11, of which 1, 4, 5 and 11 cannot be used.

    They lie before, between and after complete shards of 3.
    """
    folder = Path(shutil.copytree(clips, tmp_path / "mixed"))
    (folder / "000001.txt").unlink()
    (folder / "000004.mp4").write_bytes(b"no video")
    (folder / "000005.txt").write_text("")
    (folder / "000011.mp4").write_bytes(b"")
    return folder
