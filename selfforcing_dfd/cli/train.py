"""What `train.py` does: make sure there is data, train one stage or every arm of a comparison,
report.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd import rng
from selfforcing_dfd.common import find_device
from selfforcing_dfd.config import Config, ConfigError, find_file, require, to_yaml
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.data.format import LATENT, NEGATIVE_NAME, NOISE, TEXT, PackError, npy
from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.shards import ShardError, ShardReader
from selfforcing_dfd.data.sources.tiny import holds_tiny_world, make_tiny_shards
from selfforcing_dfd.data.write import Job, Record, Refuse, write_folder
from selfforcing_dfd.models.identity import Identity, Role, TrainingData, recipe_of_rollout
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import sample
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.training.build import (
    arms,
    build_invert,
    build_teacher,
    build_trainer,
    check_start,
    run_folder,
)
from selfforcing_dfd.training.build_data import BASIS, build_reader, codec_file
from selfforcing_dfd.training.exclusive import ExclusiveError, lock_folders, refuse_many_processes
from selfforcing_dfd.training.finite import NonFiniteError
from selfforcing_dfd.training.guards import GuardError, Guards, latent_statistics
from selfforcing_dfd.training.loop import Interrupted, Trainer
from selfforcing_dfd.training.tracking import TrackingError
from selfforcing_dfd.weights.checkpoint_files import CheckpointError
from selfforcing_dfd.weights.tensors import model_fingerprint, save_weights
from selfforcing_dfd.weights.write import file_metadata

logger = logging.getLogger(__name__)

__all__ = ["USER_ERRORS", "Interrupted", "run"]

PAIRS_PER_SHARD = 256
CODEC_FILE = "codec.safetensors"

USER_ERRORS = (
    ConfigError,
    CheckpointError,
    ExclusiveError,
    ShardError,
    PackError,
    GuardError,
    NonFiniteError,
    TrackingError,
)


def run(config: Config, resume: bool = False) -> None:
    """Train every arm of `config` (or its one run) and write the report. Errors in USER_ERRORS
    explain themselves.
    """
    refuse_many_processes()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    runs = list(arms(config))
    require(
        config.run.gpus == 1,
        f"run.gpus is {config.run.gpus}, but training runs on one GPU; it is for --dry-run",
    )
    for arm in runs:
        check_start(arm)
    with lock_folders(run_folder(config), *map(run_folder, runs)):
        prepare_data(config)
        for arm in runs:
            build_reader(arm)  # what does not fit the last arm is said before the first is trained
        for arm in runs:
            if arm.run.stage == "pairs":
                make_pairs(arm, resume)
            else:
                train(arm, resume)
        if config.report.clips:
            from selfforcing_dfd.evaluation.report import write_report

            print(write_report(config))


def prepare_data(config: Config) -> None:
    """Render and pack tiny-world clips, and find their noise, where the config asks for it and it
    is not there yet.
    """
    folder, tiny = Path(config.data.shards), config.data.tiny
    if not tiny.clips:
        return
    if not folder.exists():
        print(f"making {tiny.clips} tiny-world clips with {tiny.level} captions in {folder}")
        make_tiny_shards(
            folder, tiny.clips, tiny.seed, tiny.level, config.rollout.frames, find_file(BASIS)
        )
    if tiny.noise_steps and not ShardReader(folder).has_noise:
        print(f"finding the noise of {tiny.clips} clips with the teacher's ODE")
        teacher = model_fingerprint(build_teacher(config))
        store_noise(
            folder,
            build_invert(config, tiny.noise_steps),
            noise_fingerprint=f"{teacher}-{tiny.noise_steps}",
        )


def make_pairs(config: Config, resume: bool = False) -> None:
    """Noise and what the guided teacher's ODE makes of it, for each caption of the shards, as
    shards of their own.

    PackError if `pairs.out` exists, or holds what another config has begun. resume: go on with
    complete shards.
    """
    reader, pairs = build_reader(config), config.pairs
    device = find_device(config.run.device, "run.device")
    teacher = build_teacher(config, device)
    solver = f"{model_fingerprint(teacher)}-{pairs.steps}-{pairs.guidance:g}-{config.flow.shift:g}-{config.run.seed}"
    negative = {"negative": reader.index.about["negative"]} if reader.negative is not None else {}
    job = Job(
        name=pairs.out,
        num_items=min(pairs.num or len(reader), len(reader)),
        latent_shape=reader.index.latent_shape,
        text_shape=reader.index.text_shape,
        fingerprints={**reader.index.fingerprints, "noise": solver},
        about={"source": {"shards": config.data.shards, "sha256": reader.index_hash}, **negative},
        shard_size=PAIRS_PER_SHARD,
        files={NEGATIVE_NAME: (reader.folder / NEGATIVE_NAME).read_bytes()} if negative else {},
    )

    def records(first: int, refuse: Refuse) -> Iterator[Record]:
        micro = config.batch.micro
        for start in tqdm(
            range(first, job.num_items, micro), desc="pairs", unit="batch", disable=None
        ):
            yield from pair_records(
                config, teacher, reader, range(start, min(start + micro, job.num_items)), device
            )

    summary = write_folder(pairs.out, job, records, unfinished="resume" if resume else "keep")
    print(f"{summary.folder}: {summary.num_samples} pairs in {summary.num_shards} shards")


def pair_records(
    config: Config,
    teacher: WanTransformer,
    reader: ShardReader,
    numbers: range,
    device: torch.device,
) -> Iterator[Record]:
    """One batch of `make_pairs`: pair n starts from noise that depends on the seed and n alone."""
    pairs, samples = config.pairs, [reader[number] for number in numbers]
    noise = torch.stack(
        [rng.normal(reader.index.latent_shape, config.run.seed, "pairs", n) for n in numbers]
    ).to(device)
    text = torch.stack([sample.text for sample in samples]).to(device)
    negative = (
        None if reader.negative is None else Conditioning(reader.negative.to(text).expand_as(text))
    )
    made = sample(
        teacher, noise, Conditioning(text), pairs.steps, config.flow.shift, pairs.guidance, negative
    )
    for number, one, latents, start in zip(numbers, samples, made, noise, strict=True):
        about = {
            "caption": one.caption,
            "source": f"pair {number}",
            "steps": pairs.steps,
            "guidance": pairs.guidance,
        }
        arrays = {LATENT: latents, NOISE: start}
        stored = {name: npy(array, "float16", f"pair {number}") for name, array in arrays.items()}
        members = {
            **stored,
            TEXT: reader.members(number)[TEXT],
            "json": json.dumps(about, ensure_ascii=False).encode(),
        }
        yield Record(number, one.key, one.caption, members)


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
    about = {
        "run": config.run.name,
        "stage": config.run.stage,
        "student_updates": str(config.run.student_updates),
    }
    dtype = {"float16": torch.float16, "float32": torch.float32}[config.checkpoint.export]
    index = trainer.reader.index
    data = TrainingData(
        codec=index.fingerprints["codec"],
        text=index.fingerprints["text"],
        latent_size=(index.latent_shape[2], index.latent_shape[3]),
    )
    if "fake" in trainer.learners:
        fake: Any = trainer.learners["fake"].network
        metadata = about | file_metadata(fake.config, Identity("fake_score", None, data))
        save_weights(folder / "fake.safetensors", fake, metadata, dtype)
    student: Any = trainer.learners["student"].network
    metadata = about | file_metadata(student.config, student_identity(config, data))
    codec = Path(config.data.shards) / CODEC_FILE
    if codec.is_file():  # the packer's, perhaps refitted: the run can be streamed without its data
        shutil.copyfile(codec, folder / CODEC_FILE)
    with trainer.ema.swap(student):
        save_weights(folder / "student.safetensors", student, metadata, dtype)


def student_identity(config: Config, data: TrainingData) -> Identity:
    """What the run's `student` is: in stage teacher it is a teacher."""
    if config.run.stage == "teacher":
        return Identity("teacher", None, data)
    role: Role = "causal_student"
    return Identity(role, recipe_of_rollout(asdict(config.rollout)), data)


def build_guards(config: Config) -> Guards | None:
    """Guards for distribution matching: of pixels where the tiny codec made the data, else of the
    latents themselves.

    A decoded clip of Wan's VAE would cost seconds and gigabytes at every student update.
    """
    if config.run.stage not in ("dmd", "dfd"):
        return None
    guards = config.guards
    if holds_tiny_world(config.data.shards):
        codec = TinyCodec.load(codec_file(config)).to(find_device(config.run.device, "run.device"))
        return Guards(codec.decode, guards.tolerance, guards.stop)
    logger.info("guards watch latents: %s are not of the tiny codec", config.data.shards)
    return Guards(as_it_is, guards.tolerance, guards.stop, latent_statistics)


def as_it_is(latents: Tensor) -> Tensor:
    return latents
