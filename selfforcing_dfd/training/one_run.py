"""One run: the data it needs, its training, and the weights it exports."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd.common import Interrupted, atomic_file, find_file, move_aside
from selfforcing_dfd.config import Config
from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.places import is_remote
from selfforcing_dfd.data.shards import NonFiniteSampleError, ShardReader
from selfforcing_dfd.data.sources.tiny import holds_tiny_world, make_tiny_shards
from selfforcing_dfd.processes.ranks import add_up, on_first_rank
from selfforcing_dfd.processes.world import find_world
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.config_files import to_yaml
from selfforcing_dfd.tiny.codec import BASIS, TinyCodec
from selfforcing_dfd.training.build import build_trainer
from selfforcing_dfd.training.build_data import codec_file
from selfforcing_dfd.training.clock import Clock
from selfforcing_dfd.training.exports import CODEC_FILE, export
from selfforcing_dfd.training.finite import NonFiniteError
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.guards import Guards, latent_statistics
from selfforcing_dfd.training.healing import Failure, failure_of, without_samples
from selfforcing_dfd.training.identity import find_record, running_code, too_few
from selfforcing_dfd.training.inversion import build_inversion
from selfforcing_dfd.training.journal import note
from selfforcing_dfd.training.loop import Look, Trainer
from selfforcing_dfd.training.neighbours import Neighbours
from selfforcing_dfd.training.plan import utilisation_of
from selfforcing_dfd.weights.run_record import (
    RunRecord,
    changed_result,
    describe_result,
    write_record,
)
from selfforcing_dfd.weights.runs import (
    CONFIG_FILE,
    FAKE_ADAPTER_FILE,
    FAKE_FILE,
    STUDENT_ADAPTER_FILE,
    STUDENT_FILE,
)

logger = logging.getLogger(__name__)

RESULTS = (STUDENT_FILE, FAKE_FILE, STUDENT_ADAPTER_FILE, FAKE_ADAPTER_FILE, CODEC_FILE)
"""What a run exports."""


def prepare_data(config: Config) -> None:
    """Make the tiny-world clips and their noise that the config asks for, unless they exist."""
    folder = Path(config.data.shards)
    tiny = config.data.tiny
    if not tiny.clips or is_remote(config.data.shards):
        return
    if not folder.exists():
        tqdm.write(f"making {tiny.clips} tiny-world clips with {tiny.level} captions in {folder}")
        make_tiny_shards(
            folder, tiny.clips, tiny.seed, tiny.level, config.rollout.frames, find_file(BASIS)
        )
    if tiny.noise_steps and not ShardReader(folder).has_noise:
        tqdm.write(f"finding the noise of {tiny.clips} clips with the teacher's ODE")
        inversion = build_inversion(config, tiny.noise_steps)
        store_noise(
            folder,
            inversion.invert,
            noise_fingerprint=inversion.fingerprint,
            captions=config.data.captions,
        )


def train(config: Config, resume: bool, look: Look | None = None) -> None:
    """One run from its weights, or from its newest checkpoint, to its exported weights.

    look: is called by the first process after every checkpoint that was due. Raises RunError for a
    folder of another run, and RetriesError for a run that meets values which are not finite too
    often.
    """
    folder = run_folder(config)
    record = on_first_rank(lambda: find_record(config, resume))
    if record.state == "finished":
        text = f"{config.run.name}: already trained, {folder / STUDENT_FILE}"
        on_first_rank(lambda: tqdm.write(text))
        return
    if record.state == "created":
        on_first_rank(partial(create, folder, record))
    while True:
        trainer = build_trainer(config, build_guards(config), resume, record.aside)
        trainer.utilisation = utilisation_of(config, trainer.world.device)
        trainer.neighbours = Neighbours() if trainer.world.device.type == "cpu" else None
        trainer.look = look
        record = on_first_rank(partial(begin, config, record, trainer.clock))
        failure = run_to_end(trainer, config)
        if failure is None:
            break
        record = on_first_rank(partial(go_back, config, record, failure))
        resume = True
        del trainer  # before its successor is built
    export_and_finish(trainer, config, record)


def create(folder: Path, record: RunRecord) -> None:
    """Note which run the folder is for."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, record)


def begin(config: Config, record: RunRecord, clock: Clock) -> RunRecord:
    """Note that training begins or goes on. RunError for a run that is longer already."""
    folder = run_folder(config)
    done = clock.student_updates
    if done > config.run.student_updates:
        raise too_few(folder, config.run.student_updates, done)
    code = running_code()
    known = record.code
    if not known or {**known[-1], "since": 0} != {**code, "since": 0}:
        known = (*known, {**code, "since": done})
    record = replace(record, state="training", config=to_yaml(config), code=known)
    write_record(folder, record)
    with atomic_file(folder / CONFIG_FILE) as partial_file:
        partial_file.write_text(record.config, encoding="utf-8")
    note(folder, "training", student_update=done, of=config.run.student_updates)
    return record


def run_to_end(trainer: Trainer, config: Config) -> Failure | None:
    """Train; None at the end, else what went wrong. Interrupted where somebody asked to stop."""
    try:
        trainer.run(config.run.name)
    except Interrupted:
        done = trainer.clock.student_updates
        on_first_rank(lambda: note(run_folder(config), "stopped", student_update=done))
        raise
    except (NonFiniteError, NonFiniteSampleError) as error:  # all processes are here
        (num_asked_to_stop,) = add_up([trainer.stop_requested])
        if num_asked_to_stop:
            raise
        return failure_of(trainer, error)
    finally:
        trainer.tracker.close()
    return None


def go_back(config: Config, record: RunRecord, failure: Failure) -> RunRecord:
    """The record with the samples at fault set aside. RetriesError if it was done too often."""
    folder = run_folder(config)
    facts = {"message": failure.message, "samples": failure.keys, "since": failure.since}
    note(folder, "not finite", **facts)
    record = without_samples(record, failure, config.run.retries)
    write_record(folder, record)
    note(folder, "went back", retry=record.retries, of=config.run.retries)
    return record


def export_and_finish(trainer: Trainer, config: Config, record: RunRecord) -> None:
    """Export the weights and note what they are.

    A file in their place that this run did not export is kept as `damaged-NAME`.
    """
    folder = run_folder(config)
    unknown = on_first_rank(partial(move_unknown, folder, record))
    export(trainer, folder, config)
    on_first_rank(partial(finish, config, record, unknown))


def move_unknown(folder: Path, record: RunRecord) -> dict[str, Path]:
    """Move results aside that are not what this run exported; their new places by name."""
    moved = {}
    for name in RESULTS:
        path = folder / name
        if path.exists() and changed_result(folder, record, name):
            moved[name] = move_aside(path)
    return moved


def finish(config: Config, record: RunRecord, unknown: Mapping[str, Path]) -> None:
    """Note the results; of files that were moved aside, drop those that they equal."""
    folder = run_folder(config)
    results = {name: describe_result(folder / name) for name in RESULTS if (folder / name).exists()}
    for name, aside in unknown.items():
        if describe_result(aside) == results.get(name):
            aside.unlink()
        else:
            logger.warning("%s was not what this run exports; it is now %s", name, aside.name)
    done = config.run.student_updates
    record = replace(record, state="finished", results=results, student_updates=done)
    write_record(folder, record)
    note(folder, "finished", student_update=done, results=results)


def build_guards(config: Config) -> Guards | None:
    """Guards for distribution matching.

    They look at pixels where the tiny codec made the data, else at the latents. Decoding a clip
    with Wan's VAE would cost seconds and gigabytes at every student update.
    """
    if not stage_of(config).has_guards:
        return None
    guards = config.guards
    if holds_tiny_world(config.data.shards):
        codec = TinyCodec.load(codec_file(config)).to(find_world(config.run.device).device)
        return Guards(codec.decode, guards.tolerance, guards.stop)
    logger.info("guards watch latents: %s are not of the tiny codec", config.data.shards)
    return Guards(as_it_is, guards.tolerance, guards.stop, latent_statistics)


def as_it_is(latents: Tensor) -> Tensor:
    return latents
