"""What a run says of its networks, in checkpoints and exports, and the exported weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.common import DTYPES
from selfforcing_dfd.config import Config
from selfforcing_dfd.data.places import file_beside
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.models.adapted import AdaptedNetwork
from selfforcing_dfd.models.identity import Identity, Role, TrainingData, recipe_of_rollout
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.training.loop import Trainer
from selfforcing_dfd.weights.adapters import merged, save_adapter
from selfforcing_dfd.weights.card import AS_PUBLISHED
from selfforcing_dfd.weights.runs import (
    FAKE_ADAPTER_FILE,
    FAKE_FILE,
    STUDENT_ADAPTER_FILE,
    STUDENT_FILE,
)
from selfforcing_dfd.weights.tensors import save_weights
from selfforcing_dfd.weights.write import file_metadata, network_config

CODEC_FILE = "codec.safetensors"


def identities(config: Config, reader: ShardReader) -> dict[str, Identity]:
    """What the networks are that a run trains, by role in the stage."""
    index = reader.index
    _, _, rows, columns = index.latent_shape
    data = TrainingData(index.fingerprints["codec"], index.fingerprints["text"], (rows, columns))
    makes = stage_of(config).makes
    role: Role = "causal_student" if makes == "shards" or makes == "decoder" else makes
    recipe = recipe_of_rollout(asdict(config.rollout)) if role == "causal_student" else None
    return {"student": Identity(role, recipe, data), "fake": Identity("fake_score", None, data)}


def describe_networks(
    config: Config, reader: ShardReader, networks: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """config.json of each trained network, by role: sizes, role, recipe and data."""
    stated = identities(config, reader)
    return {
        role: network_config(network.config, stated[role])
        for role, network in networks.items()
        if role in stated
    }


def export(trainer: Trainer, folder: Path, config: Config) -> None:
    """The averaged student, and the fake score where there is one, as single safetensors files.

    Of networks with adapters, the adapter, and of the student the whole as well. A codec that lies
    beside the shards is copied: the run can be streamed without its data.
    """
    about = {
        "run": config.run.name,
        "stage": config.run.stage,
        "student_updates": str(config.run.student_updates),
    }
    published = stage_of(config).as_published(config)
    if published:
        about[AS_PUBLISHED] = ", ".join(published)
    dtype = {**DTYPES, "int8": torch.int8}[config.checkpoint.export]
    stated = identities(config, trainer.reader)
    codec = file_beside(config.data.shards, CODEC_FILE)
    if trainer.world.is_first and codec is not None:
        shutil.copyfile(codec, folder / CODEC_FILE)
    if "fake" in trainer.learners:
        fake: Any = trainer.learners["fake"].network
        own = file_metadata(fake.config, stated["fake"])
        if isinstance(fake, AdaptedNetwork):
            save_adapter(folder / FAKE_ADAPTER_FILE, fake, about, dtype)
        else:
            save_weights(folder / FAKE_FILE, fake, about | own, dtype)
    student: Any = trainer.learners["student"].network
    stage = trainer.stage
    with trainer.ema.swap(student):
        if stage.trains_transformers:
            own = file_metadata(student.config, stated["student"])
        else:
            own = stage.metadata(config, trainer.reader)
        whole_student = student
        if isinstance(student, AdaptedNetwork):
            save_adapter(folder / STUDENT_ADAPTER_FILE, student, about, dtype)
            whole_student = merged(student)
        save_weights(folder / STUDENT_FILE, whole_student, about | own, dtype)
