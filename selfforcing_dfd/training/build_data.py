"""From a config's data section to a data set that fits the rest of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import find_file
from selfforcing_dfd.config import Config, require
from selfforcing_dfd.data.shards import SampleOrder, ShardReader
from selfforcing_dfd.stages import STAGES, stage_of

BASIS = "assets/tiny/codec.safetensors"


def build_reader(config: Config) -> ShardReader:
    """The data set. Raises ConfigError for clips, text or noise that do not fit the settings."""
    shards = config.data.shards
    reader = ShardReader(Path(shards))
    stage = stage_of(config)
    captions_do = [known.name for known in STAGES.values() if not known.needs_clips]
    require(
        reader.has_clips or not stage.needs_clips,
        f"run.stage is {stage.name}, but {shards} holds prompts without clips, which do for "
        f"{' and '.join(captions_do)}; write shards of clips with `selfforcing-dfd pack`",
    )
    setting = stage.uses_clips(config)
    require(
        reader.has_clips or not setting,
        f"{setting}, but {shards} holds prompts without clips; write shards of clips with "
        "`selfforcing-dfd pack`, or change that setting",
    )
    setting = stage.needs_noise(config)
    require(
        reader.has_noise or not setting,
        f"{setting}, but {shards} holds no noise: add it with "
        f"`selfforcing-dfd invert {shards} --config CONFIG`, or change that setting",
    )
    return reader


def check_shapes(config: Config, reader: ShardReader, network: Mapping[str, Any]) -> None:
    """ConfigError for latents or text of another shape than the network's; network: its config."""
    shards = config.data.shards
    index = reader.index
    wanted = (config.rollout.frames, network["in_channels"])
    require(
        tuple(index.latent_shape[:2]) == wanted,
        f"{shards} holds latents {tuple(index.latent_shape)} [F, C, H, W], but rollout.frames is "
        f"{wanted[0]} and the network has {wanted[1]} channels; change these or pack the clips "
        "again",
    )
    require(
        index.text_shape[1] == network["text_dim"],
        f"{shards} holds text of width {index.text_shape[1]}, but the network's text width is "
        f"{network['text_dim']}; pack with the text encoder that belongs to the weights",
    )


def codec_file(config: Config) -> Path:
    """The basis beside the shards if the packer refitted it, else the shipped one."""
    beside = Path(config.data.shards) / "codec.safetensors"
    return beside if beside.exists() else find_file(BASIS)


def build_order(config: Config, reader: ShardReader, aside: Mapping[str, int]) -> SampleOrder:
    """The order of the samples. aside: see `SampleOrder`, by key."""
    numbers = {entry.key: number for number, entry in enumerate(reader.index.samples)}
    left_out = {numbers[key]: since for key, since in aside.items()}
    return SampleOrder(len(reader), config.run.seed, left_out)
