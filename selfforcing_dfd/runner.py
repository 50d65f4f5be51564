"""What `train.py` does: make sure there is data, train one stage or every arm of a comparison, report."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from selfforcing_dfd.build import (
    BASIS,
    arms,
    build_invert,
    build_trainer,
    check_start,
    codec_file,
    load_network,
    run_folder,
)
from selfforcing_dfd.config import Config, ConfigError, find_file, to_yaml
from selfforcing_dfd.data.pack import PackError, add_noise
from selfforcing_dfd.data.shards import ShardError, ShardReader
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.data import make_tiny_shards
from selfforcing_dfd.training.checkpoint import CheckpointError
from selfforcing_dfd.training.ema import model_fingerprint, save_weights
from selfforcing_dfd.training.guards import GuardError, Guards
from selfforcing_dfd.training.loop import Interrupted, Trainer
from selfforcing_dfd.training.tracking import NonFiniteError

__all__ = ["USER_ERRORS", "Interrupted", "run"]

USER_ERRORS = (ConfigError, CheckpointError, ShardError, PackError, GuardError, NonFiniteError)


def run(config: Config, resume: bool = False) -> None:
    """Train every arm of `config` (or its one run) and write the report. Errors in USER_ERRORS explain themselves."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    runs = list(arms(config))
    for arm in runs:
        check_start(arm)
    prepare_data(config)
    for arm in runs:
        train(arm, resume)
    if config.report.clips:
        from selfforcing_dfd.tiny.report import write_report

        print(write_report(config))


def prepare_data(config: Config) -> None:
    """Render and pack tiny-world clips, and find their noise, where the config asks for it and it is not there yet."""
    folder, tiny = Path(config.data.shards), config.data.tiny
    if not tiny.clips:
        return
    if not folder.exists():
        print(f"making {tiny.clips} tiny-world clips with {tiny.level} captions in {folder}")
        make_tiny_shards(folder, tiny.clips, tiny.seed, tiny.level, config.rollout.frames, find_file(BASIS))
    if tiny.noise_steps and not ShardReader(folder).has_noise:
        print(f"finding the noise of {tiny.clips} clips with the teacher's ODE")
        teacher = model_fingerprint(load_network(config.model, config.weights.teacher))
        add_noise(folder, build_invert(config, tiny.noise_steps), noise_fingerprint=f"{teacher}-{tiny.noise_steps}")


def train(config: Config, resume: bool) -> None:
    """One run from its weights, or from its newest checkpoint, to its exported weights."""
    folder = run_folder(config)
    exported = folder / "student.safetensors"
    if resume and exported.exists():
        print(f"{config.run.name}: already trained, {exported}")
        return
    trainer = build_trainer(config, build_guards(config), resume)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    trainer.run(config.run.name)
    export(trainer, folder, config)


def export(trainer: Trainer, folder: Path, config: Config) -> None:
    """The averaged student, and the fake score where there is one, as single safetensors files."""
    metadata = {"run": config.run.name, "stage": config.run.stage, "student_updates": str(config.run.student_updates)}
    if "fake" in trainer.learners:
        save_weights(folder / "fake.safetensors", trainer.learners["fake"].network, metadata, torch.float16)
    student = trainer.learners["student"].network
    with trainer.ema.swap(student):
        save_weights(folder / "student.safetensors", student, metadata, torch.float16)


def build_guards(config: Config) -> Guards | None:
    """Guards for distribution matching on data of the tiny codec; other codecs have none yet."""
    if config.run.stage not in ("dmd", "dfd"):
        return None
    codec = TinyCodec.load(codec_file(config))
    return Guards(codec.decode, config.guards.tolerance, config.guards.stop)
