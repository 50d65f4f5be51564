"""The tiny world as a data set: clips are drawn when they are packed, and never lie on disk."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.common import find_file
from selfforcing_dfd.data.levels import LEVELS, Level
from selfforcing_dfd.data.pack import pack
from selfforcing_dfd.data.places import file_beside
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.source import Item, Source, Video
from selfforcing_dfd.tiny.codec import BASIS, CODEC_FILE, FINGERPRINT, TIME, TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, Levels, captions_by_level, clip_number, render


class TinySource(Source):
    """Fresh clips; clip i depends on the seed and i alone. level: how much captions say."""

    def __init__(self, num_clips: int, seed: int, level: Levels, num_video_frames: int) -> None:
        self.num_clips = num_clips
        self.seed = seed
        self.level: Levels = level
        self.num_video_frames = num_video_frames

    @property
    def title(self) -> str:
        return f"tiny world, seed {self.seed}"

    @cached_property
    def names(self) -> list[str]:
        return [f"{number:06d}" for number in range(self.num_clips)]

    @property
    def about(self) -> dict[str, Any]:
        return {"num_clips": self.num_clips, "seed": self.seed, "captions": self.level}

    @property
    def holds(self) -> Video:
        return Video((self.num_video_frames, SIDE, SIDE))

    @property
    def levels(self) -> tuple[Level, ...]:
        return LEVELS if self.level == "all" else ()

    def read(self, number: int) -> Item:
        level = "long" if self.level == "all" else self.level
        factors, caption = clip_number(number, self.seed, level)
        video = (render(factors, self.num_video_frames)[0] * 255).round().to(torch.uint8)
        captions = captions_by_level(factors) if self.levels else {}
        return Item(caption, video, captions=captions)


def make_tiny_shards(
    folder: Path, num_clips: int, seed: int, level: Levels, num_latent_frames: int, basis: Path
) -> None:
    """Write shards of fresh clips.

    level: how much the captions say. basis: the tiny codec's file.
    """
    num_video_frames = 1 + TIME * (num_latent_frames - 1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = TinySource(num_clips, seed, level, num_video_frames)
    pack(source, folder, TinyCodec.load(basis), TinyText())


def codec_beside(shards: Path | str) -> Path:
    """The tiny codec's file beside shards if the packer refitted it, else the shipped one."""
    return file_beside(shards, CODEC_FILE) or find_file(BASIS)


def holds_tiny_world(shards: Path | str) -> bool:
    """Whether the tiny codec made these shards. Raises ShardError where there are none."""
    return ShardReader(shards).index.fingerprints["codec"].startswith(FINGERPRINT)
