"""The tiny world's data set: rendered, written as mp4 clips with captions, packed like anybody's
own clips.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from selfforcing_dfd.data.pack import pack
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.tiny.codec import TIME, TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, Level, write_clips


def make_tiny_shards(
    folder: Path, num_clips: int, seed: int, level: Level, num_latent_frames: int, basis: Path
) -> None:
    """Shards of `num_clips` fresh clips with captions of one level, encoded with the codec in the
    file `basis`.
    """
    num_video_frames = 1 + TIME * (num_latent_frames - 1)
    with tempfile.TemporaryDirectory() as clips:
        write_clips(clips, num_clips, seed, level, num_video_frames)
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = FileSource(clips, num_video_frames, (SIDE, SIDE))
        pack(source, folder, TinyCodec.load(basis), TinyText())
