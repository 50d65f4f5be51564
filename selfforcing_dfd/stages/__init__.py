"""The training stages, and configs that know their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from selfforcing_dfd.config import Config, require
from selfforcing_dfd.models.identity import check_given
from selfforcing_dfd.stages import (
    causal,
    decoder,
    dfd,
    dmd,
    dp_dmd,
    init,
    pairs,
    regression,
    teacher,
)
from selfforcing_dfd.stages import config_files as settings
from selfforcing_dfd.stages.base import STAGES, Stage, stage_of
from selfforcing_dfd.stages.presets import SETTING, expanded, settings_of
from selfforcing_dfd.stages.published import AS_PUBLISHED, PublishedConfig

__all__ = [
    "STAGES",
    "arms_of",
    "causal",
    "change",
    "decoder",
    "dfd",
    "dmd",
    "dp_dmd",
    "init",
    "load_as_published",
    "load_config",
    "pairs",
    "regression",
    "stage_of",
    "teacher",
]


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """A config file with overrides on top, checked by its stage. Raises ConfigError."""
    sections = {key: kind for stage in STAGES.values() for key, kind in stage.sections.items()}
    with settings.explained(name):
        asked = expanded(overrides)
    config = settings.load(name, asked, sections)
    preset = config.of(dfd.DFDConfig).preset
    if preset and not any(override.startswith(SETTING) for override in overrides):
        config = settings.load(name, [*settings_of(preset), *asked], sections)
    return checked(config, name)


def load_as_published(name: str, overrides: Sequence[str] = ()) -> Config:
    """`load_config` with all deviations of the public code, under the overrides.

    Raises ConfigError where no run of the config is of a stage that knows one of them.
    """
    config = load_config(name, [*AS_PUBLISHED, *overrides])
    knowing = [key for key, stage in STAGES.items() if PublishedConfig in stage.sections.values()]
    stages = sorted({run.run.stage for run in arms_of(config)})
    with settings.explained(name):
        settings.require(
            any(stage in knowing for stage in stages),
            f"--as-published changes nothing in stage {', '.join(stages)}; it is for "
            f"{', '.join(sorted(knowing))}: leave it out",
        )
    return config


def change(config: Config, overrides: Sequence[str]) -> Config:
    """The same settings with overrides on top. Raises ConfigError."""
    with settings.explained(config.run.name):
        return settings.change(config, expanded(overrides))


def arms_of(config: Config) -> Iterator[Config]:
    """The runs of a config: one for each arm, in runs/name/arm, or the config itself."""
    if not config.arms:
        yield config
    for arm, overrides in config.arms.items():
        alone = dataclasses.replace(config, arms={})
        arm_of_run = [f"run.name={config.run.name}/{arm}", *overrides]
        yield checked(change(alone, arm_of_run), f"arm {arm}")


def checked(config: Config, name: str) -> Config:
    """The config, if its stage takes it. Raises ConfigError."""
    with settings.explained(name):
        require(
            bool(config.data.shards),
            "data.shards is empty: name a folder written by `selfforcing-dfd pack`",
        )
        stage = stage_of(config)
        check_given_frames(config, stage)
        stage.check(config)
    return config


def check_given_frames(config: Config, stage: type[Stage]) -> None:
    """ConfigError where frames are given and the stage, or one of its settings, takes none."""
    given = config.rollout.given
    check_given("rollout.given", given, config.rollout.chunk_frames)
    takers = [name for name, known in sorted(STAGES.items()) if known.takes_given]
    require(
        stage.takes_given or not given,
        f"rollout.given is {given}, but stage {stage.name} makes every frame: use rollout.given=0, "
        f"or one of the stages {', '.join(takers)}",
    )
    noise = stage.needs_noise(config) if given else ""
    require(
        not noise,
        f"rollout.given is {given} and {noise}: the noise stored with clips is of clips that are "
        "made as a whole; use rollout.given=0, or settings without stored noise",
    )
