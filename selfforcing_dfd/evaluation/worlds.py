"""Which world a run belongs to."""

from __future__ import annotations

from pathlib import Path

from selfforcing_dfd.config import Config
from selfforcing_dfd.data.places import is_remote
from selfforcing_dfd.data.sources.tiny import holds_tiny_world
from selfforcing_dfd.evaluation.tables import ReportError
from selfforcing_dfd.evaluation.tiny_world import TinyWorld
from selfforcing_dfd.evaluation.video_world import VideoWorld
from selfforcing_dfd.evaluation.world import World

TINY: World = TinyWorld()
VIDEO: World = VideoWorld()


def world_of(config: Config) -> World:
    """The world of a run's shards, by the codec that made them.

    Shards that do not exist are the tiny world's if the config would make them. Raises ShardError
    for others.
    """
    shards = config.data.shards
    if config.data.tiny.clips and not is_remote(shards) and not Path(shards).exists():
        return TINY
    return TINY if holds_tiny_world(shards) else VIDEO


def world_named(name: str) -> World:
    """The world whose name a report.json says. Raises ReportError for an unknown one."""
    for world in (TINY, VIDEO):
        if world.name == name:
            return world
    raise ReportError(f"the report's world is {name!r}; this version knows tiny and video")
