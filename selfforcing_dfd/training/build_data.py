"""From a config's data section to a data set that fits the rest of it."""

from __future__ import annotations

from pathlib import Path

from selfforcing_dfd.config import Config, ConfigError, find_file
from selfforcing_dfd.data.shards import SampleOrder, ShardReader

BASIS = "assets/tiny/codec.safetensors"
NEED_NO_CLIPS = ("pairs", "dmd")
"""Stages that ask data for captions only."""


def noise_wish(config: Config) -> str:
    """The setting that needs noise stored with the clips; empty where none does."""
    if config.run.stage == "dfd" and config.dfd.pairing in ("inversion", "prefix"):
        return f"dfd.pairing is {config.dfd.pairing}"
    if config.run.stage == "init" and (config.flow.paired, config.flow.levels) != ("first", "any"):
        return f"flow.paired is {config.flow.paired} and flow.levels {config.flow.levels}"
    return ""


def build_reader(config: Config) -> ShardReader:
    """The data set; refuses latents, text or missing noise that do not fit the configured model,
    clip length and pairing.
    """
    reader = ShardReader(Path(config.data.shards))
    if not reader.has_clips and config.run.stage not in NEED_NO_CLIPS:
        raise ConfigError(
            f"run.stage is {config.run.stage}, but {config.data.shards} holds prompts without clips, which do for "
            f"{' and '.join(NEED_NO_CLIPS)}; write shards of clips with `python -m selfforcing_dfd pack`"
        )
    wish = noise_wish(config)
    if wish and not reader.has_noise:
        raise ConfigError(
            f"{wish}, but {config.data.shards} holds no noise: add it with "
            f"`python -m selfforcing_dfd invert {config.data.shards} --config CONFIG`, or change that setting"
        )
    wanted = (config.rollout.frames, config.model.channels)
    if tuple(reader.index.latent_shape[:2]) != wanted:
        raise ConfigError(
            f"{config.data.shards} holds latents {tuple(reader.index.latent_shape)} [F, C, H, W], but rollout.frames is "
            f"{wanted[0]} and model.channels is {wanted[1]}; change these or pack the clips again"
        )
    if reader.index.text_shape[1] != config.model.text_dim:
        raise ConfigError(
            f"{config.data.shards} holds text of width {reader.index.text_shape[1]}, but model.text_dim is "
            f"{config.model.text_dim}; use model.text_dim={reader.index.text_shape[1]} or pack with another text encoder"
        )
    return reader


def codec_file(config: Config) -> Path:
    """The basis beside the shards if the packer refitted it, else the shipped one."""
    beside = Path(config.data.shards) / "codec.safetensors"
    return beside if beside.exists() else find_file(BASIS)


def build_order(config: Config, reader: ShardReader) -> SampleOrder:
    return SampleOrder(len(reader), config.run.seed, reader.caption_ids, config.batch.group)
