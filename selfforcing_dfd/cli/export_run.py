"""From a finished run to a folder that others can use: a diffusers pipeline with its model card."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from selfforcing_dfd.config import Config, ConfigError, as_dict, load_config, require
from selfforcing_dfd.streaming.card import ModelFacts
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline
from selfforcing_dfd.training.build import student_of


def export_run(
    run: Path,
    wan: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    base_model: str = "",
    overwrite: bool = False,
) -> CausalWanPipeline:
    """Write the student of `run` (its averaged weights) with VAE and text encoder of `wan` to
    `folder`, as a pipeline.

    wan: a diffusers folder of Wan2.1, whose own transformer is left out. base_model: what the card
    names as the origin. dtype: in bfloat16 most of what a short distillation changed is smaller
    than a step, and is rounded away. Raises ConfigError for a run that is not finished or has
    several arms, and for a folder that is not empty.
    """
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(
            f"{folder} is not empty; choose another folder, or replace it with --overwrite"
        )
    config, weights = chosen_student(run)
    require(
        weights.is_file(),
        f"{weights} does not exist: the run is not finished; go on with train.py --resume",
    )
    pipeline = CausalWanPipeline.from_pretrained(wan, student=weights, dtype=dtype)
    facts = ModelFacts(run.resolve().name, training=as_dict(config))
    pipeline.save_pretrained(
        folder, dataclasses.replace(facts, base_model=base_model or facts.base_model)
    )
    return pipeline


def chosen_student(run: Path) -> tuple[Config, Path]:
    """Config and weights of a run, or of one arm. ConfigError for a comparison of several: which
    one is wanted?
    """
    settings = run / "config.yaml"
    if settings.is_file():
        names = list(load_config(str(settings)).arms)
        require(
            len(names) < 2, f"{run} compares {', '.join(names)}; name the folder of one of them"
        )
    return student_of(run)
