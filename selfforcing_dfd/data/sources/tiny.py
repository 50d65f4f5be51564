"""The tiny world as a data set: rendered to mp4 clips with captions, then packed like any clips."""

from __future__ import annotations

import tempfile
from pathlib import Path

from selfforcing_dfd.data.pack import pack
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.tiny.codec import FINGERPRINT, TIME, TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, Detail, write_clips


def make_tiny_shards(
    folder: Path, num_clips: int, seed: int, detail: Detail, num_latent_frames: int, basis: Path
) -> None:
    """Write shards of fresh clips.

    detail: how much the captions say. basis: the tiny codec's file.
    """
    num_video_frames = 1 + TIME * (num_latent_frames - 1)
    with tempfile.TemporaryDirectory() as clips:
        write_clips(clips, num_clips, seed, detail, num_video_frames)
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = FileSource(clips, num_video_frames, (SIDE, SIDE))
        pack(source, folder, TinyCodec.load(basis), TinyText())


def holds_tiny_world(shards: Path | str) -> bool:
    """Whether the tiny codec made these shards. Raises ShardError where there are none."""
    return ShardReader(shards).index.fingerprints["codec"].startswith(FINGERPRINT)
