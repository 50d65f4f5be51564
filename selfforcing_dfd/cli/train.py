"""`train.py`: prepare the data, train one stage or every arm of a comparison, report."""

from __future__ import annotations

import logging
from contextlib import ExitStack

from selfforcing_dfd.config import Config, as_dict, require
from selfforcing_dfd.models.adapted import base_of
from selfforcing_dfd.processes.ranks import on_first_rank
from selfforcing_dfd.processes.world import World, find_world, joined
from selfforcing_dfd.stages import arms_of, stage_of
from selfforcing_dfd.stages.base import ShardStage
from selfforcing_dfd.training.agreement import require_agreement
from selfforcing_dfd.training.build import build_networks
from selfforcing_dfd.training.build_data import build_reader
from selfforcing_dfd.training.exclusive import lock_folders
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.loop import Look
from selfforcing_dfd.training.needs import has_shards
from selfforcing_dfd.training.one_run import prepare_data, train
from selfforcing_dfd.training.same_run import config_fingerprint
from selfforcing_dfd.training.sequences import in_groups, share_sequences
from selfforcing_dfd.training.starts import check_start
from selfforcing_dfd.weights.tensors import model_fingerprint


def run(config: Config, resume: bool = False) -> None:
    """Train every arm of `config` (or its one run) and write the report. Raises UserError.

    In one process, or in all that torchrun or `accelerate launch` started. What is done once, the
    first of them does, while the others wait.
    """
    with joined(config.run.device, config.run.timeout_s) as world, ExitStack() as held:
        level = logging.WARNING if world.is_first else logging.ERROR
        logging.basicConfig(level=level, format="%(levelname)s %(message)s")
        runs = list(arms_of(config))
        check_processes(config, world)
        # what does not fit the last arm is said before the first is trained
        for arm in runs:
            check_start(arm)
            # tiny-world shards without noise are those of an interrupted start; it is found below
            if has_shards(arm) and not arm.data.tiny.noise_steps:
                build_reader(arm)
        folders = [run_folder(config), *map(run_folder, runs)]
        on_first_rank(lambda: held.enter_context(lock_folders(*folders)))
        on_first_rank(lambda: prepare_data(config))
        for arm in runs:
            build_reader(arm)
        looks = [look_of(arm) for arm in runs]
        for arm, look in zip(runs, looks, strict=True):
            train_or_make(arm, resume, look)
        if config.report.clips:
            on_first_rank(lambda: report(config))


def check_processes(config: Config, world: World) -> None:
    """ConfigError where a plan for several GPUs is about to run on another number of them."""
    planned = config.run.gpus
    require(
        planned in (1, world.size),
        f"run.gpus is {planned}, but {world.size} process{'es' * (world.size > 1)} would train; "
        f"start with torchrun --nproc_per_node {planned}, or leave run.gpus to --dry-run",
    )


def look_of(config: Config) -> Look | None:
    """What samples from a run while it trains, where the config asks for it."""
    if not config.report.every or issubclass(stage_of(config), ShardStage):
        return None
    from selfforcing_dfd.evaluation.watch import watch

    return watch(config)


def report(config: Config) -> None:
    from selfforcing_dfd.evaluation.gate import check_gate
    from selfforcing_dfd.evaluation.report import write_report

    print(write_report(config))
    check_gate(config)


def train_or_make(config: Config, resume: bool, look: Look | None) -> None:
    """One run: of a stage that trains, or of one that writes shards."""
    stage = stage_of(config)
    if issubclass(stage, ShardStage):
        make_shards(config, stage, resume)
    else:
        train(config, resume, look)


def make_shards(config: Config, stage: type[ShardStage], resume: bool) -> None:
    """Run a stage that writes shards. PackError if they exist or another config began them."""
    world = in_groups(find_world(config.run.device), config.model.sequence_ranks)
    networks = build_networks(config, world.device)
    fingerprints = {role: model_fingerprint(network) for role, network in networks.items()}
    reader = build_reader(config)
    _, _, rows, columns = reader.index.latent_shape
    bases = {role: base_of(network) for role, network in networks.items()}
    share_sequences(world, bases, (rows, columns), config.run.timeout_s)
    settings = config_fingerprint(as_dict(config))
    require_agreement({**fingerprints, "data": reader.index_hash, "settings": settings})
    text = stage.make_shards(config, networks, fingerprints, reader, resume)
    if world.is_first:
        print(text)
