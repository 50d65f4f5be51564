"""From a config's data section to a data set that fits the rest of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfforcing_dfd.config import Config, require
from selfforcing_dfd.data.order import SampleOrder
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.tiny import codec_beside
from selfforcing_dfd.models.picture import takes_picture
from selfforcing_dfd.stages import STAGES, stage_of


def build_reader(config: Config) -> ShardReader:
    """The data set. Raises ConfigError for clips, text or noise that do not fit the settings."""
    shards = config.data.shards
    reader = open_shards(config)
    check_captions(config, reader)
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


def open_shards(config: Config) -> ShardReader:
    """The shards of the config, with the captions that it asks for."""
    return ShardReader(config.data.shards, config.data.captions)


def check_captions(config: Config, reader: ShardReader) -> None:
    """ConfigError where it is open which captions are meant, or noise is of others."""
    shards = config.data.shards
    chosen = config.data.captions
    levels = reader.levels
    require(
        bool(chosen) or len(levels) < 2,
        f"{shards} holds captions of level {', '.join(levels)}; choose one with data.captions=LEVEL"
        ", or data.captions=mixed: the less a caption says, the more clips data forcing ties to it",
    )
    found_for = reader.index.about.get("noise_captions", chosen)
    setting = stage_of(config).needs_noise(config)
    require(
        not setting or found_for == chosen or not levels,
        f"{setting}, but the noise in {shards} was found for {found_for} captions, and "
        f"data.captions is {chosen or 'not set'}; use data.captions={found_for}, or find it again "
        f"with `selfforcing-dfd invert {shards} --config CONFIG`",
    )


def check_shapes(config: Config, reader: ShardReader, network: Mapping[str, Any]) -> None:
    """ConfigError for latents, text or pictures that do not fit `network`, a config of one."""
    shards = config.data.shards
    index = reader.index
    wanted = (config.rollout.frames, network["out_channels"])
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
    check_pictures(config, reader, network)


def check_pictures(config: Config, reader: ShardReader, network: Mapping[str, Any]) -> None:
    """ConfigError where an image-to-video network of Wan2.1 and the data do not fit each other."""
    if not takes_picture(network):
        return
    shards = config.data.shards
    given = config.rollout.given
    require(
        given == 0,
        f"rollout.given is {given}, but this network takes its picture in further input channels "
        "and makes every frame, as Wan2.1-I2V does; use rollout.given=0",
    )
    picture = reader[0].picture
    command = f"`selfforcing-dfd images {shards} --model WAN_I2V_FOLDER`"
    require(
        picture is not None,
        f"the network takes a picture (Wan2.1-I2V), but {shards} holds none; add them to its clips "
        f"with {command}",
    )
    width = 0 if picture is None else picture[1].shape[-1]
    require(
        width == network["image_dim"],
        f"{shards} holds pictures as states of width {width}, but the network's are "
        f"{network['image_dim']} wide; make them again with {command}, naming the folder that "
        "belongs to the weights",
    )


def codec_file(config: Config) -> Path:
    """The basis beside the shards if the packer refitted it, else the shipped one."""
    return codec_beside(config.data.shards)


def build_order(config: Config, reader: ShardReader, aside: Mapping[str, int]) -> SampleOrder:
    """The order of the samples. aside: see `SampleOrder`, by key."""
    numbers = {entry.key: number for number, entry in enumerate(reader.index.samples)}
    left_out = {numbers[key]: since for key, since in aside.items()}
    return SampleOrder(len(reader), config.run.seed, left_out)
