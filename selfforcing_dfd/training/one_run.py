"""One run: the data it needs, its training, and the weights it exports."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd.common import find_file
from selfforcing_dfd.config import Config, to_yaml
from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.tiny import holds_tiny_world, make_tiny_shards
from selfforcing_dfd.processes.ranks import on_first_rank
from selfforcing_dfd.processes.world import find_world
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.training.build import build_trainer
from selfforcing_dfd.training.build_data import BASIS, codec_file
from selfforcing_dfd.training.exports import export
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.guards import Guards, latent_statistics
from selfforcing_dfd.training.inversion import build_inversion
from selfforcing_dfd.weights.runs import CONFIG_FILE, STUDENT_FILE

logger = logging.getLogger(__name__)


def prepare_data(config: Config) -> None:
    """Make the tiny-world clips and their noise that the config asks for, unless they exist."""
    folder = Path(config.data.shards)
    tiny = config.data.tiny
    if not tiny.clips:
        return
    if not folder.exists():
        tqdm.write(f"making {tiny.clips} tiny-world clips with {tiny.level} captions in {folder}")
        make_tiny_shards(
            folder, tiny.clips, tiny.seed, tiny.level, config.rollout.frames, find_file(BASIS)
        )
    if tiny.noise_steps and not ShardReader(folder).has_noise:
        tqdm.write(f"finding the noise of {tiny.clips} clips with the teacher's ODE")
        inversion = build_inversion(config, tiny.noise_steps)
        store_noise(folder, inversion.invert, noise_fingerprint=inversion.fingerprint)


def train(config: Config, resume: bool) -> None:
    """One run from its weights, or from its newest checkpoint, to its exported weights."""
    folder = run_folder(config)
    exported = folder / STUDENT_FILE
    if resume and on_first_rank(exported.exists):
        on_first_rank(lambda: tqdm.write(f"{config.run.name}: already trained, {exported}"))
        return
    trainer = build_trainer(config, build_guards(config), resume)
    on_first_rank(lambda: write_settings(folder, config))
    trainer.run(config.run.name)
    export(trainer, folder, config)


def write_settings(folder: Path, config: Config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(to_yaml(config))


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
