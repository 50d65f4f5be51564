"""Sizes of a config's networks before they are loaded: from their files, or from who makes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import find_file
from selfforcing_dfd.config import Config, NetworkConfig
from selfforcing_dfd.models.sizes import PUBLISHED_SIZES
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.base import Start
from selfforcing_dfd.training.needs import is_published, maker_of_run, shipped_config
from selfforcing_dfd.weights.read import describe


def known_sizes(config: Config) -> dict[str, NetworkConfig]:
    """The size of each network of the stage, by role; those that nothing tells are left out."""
    starts = stage_of(config).starts(config)
    found = {role: size_of(config, start) for role, start in starts.items()}
    return {role: size for role, size in found.items() if size is not None}


def size_of(config: Config, start: Start) -> NetworkConfig | None:
    """The size of the network that starts from these weights.

    From the file's header where the file is there; else from the published model's name, or from
    the shipped recipe that makes it. None where nothing tells.
    """
    if not start.path:
        return config.network
    path = find_file(start.path)
    if path.exists():
        files = (path, *path.glob("*"))
        changed_ns = max(file.stat().st_mtime_ns for file in files)
        return size_in(path, start.entry, start.head_dim, changed_ns)
    if is_published(start.path):
        name = "wan14b" if "14B" in start.path else "wan1.3b"
        name = "wan14b_i2v" if "I2V" in start.path else name
        return from_arguments(PUBLISHED_SIZES[name])
    maker = maker_of_run(str(Path(start.path).parent))
    if not maker:
        return None
    recipe = shipped_config(maker)
    return size_of(recipe, stage_of(recipe).starts(recipe)["student"])


@cache
def size_in(path: Path, entry: str, head_dim: int, changed_ns: int) -> NetworkConfig:
    """The size that a file or folder holds. changed_ns: when it was last changed.

    A plan asks for the same file many times, and the answer needs a network's shape.
    """
    return from_arguments(describe(path, entry, head_dim).sizes)


def from_arguments(sizes: Mapping[str, Any]) -> NetworkConfig:
    """A size from WanTransformer's arguments."""
    return NetworkConfig(
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["attention_head_dim"],
        num_layers=sizes["num_layers"],
        ffn_dim=sizes["ffn_dim"],
        channels=sizes["out_channels"],
        text_dim=sizes["text_dim"],
        freq_dim=sizes["freq_dim"],
        image_dim=sizes["image_dim"] or 0,
    )
