"""Samples and scores of a run while it trains: always the same captions, from the same noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selfforcing_dfd.config import Config, require
from selfforcing_dfd.evaluation.pictures import enlarged, tiled, write_mp4
from selfforcing_dfd.evaluation.report import measure
from selfforcing_dfd.evaluation.scores import SCORES, note_scores
from selfforcing_dfd.evaluation.sources import run_source
from selfforcing_dfd.evaluation.world import World
from selfforcing_dfd.evaluation.worlds import world_of
from selfforcing_dfd.stages.config_files import change
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.one_run import Look
from selfforcing_dfd.training.tracking import Tracker

OF_STUDENT = "ema"  # what a checkpoint calls the averaged weights


def watch(config: Config) -> Look | None:
    """What training calls after a checkpoint to sample from it; None where none are asked for.

    Raises ConfigError for an interval at which no checkpoint is written, and before training what
    drawing captions would raise.
    """
    every = config.report.every
    if not every:
        return None
    saved = config.checkpoint.every
    require(
        every % saved == 0,
        f"report.every is {every} and checkpoint.every {saved}; samples are made from checkpoints: "
        f"use a multiple of {saved}",
    )
    require(
        not config.model.lora_rank,
        f"report.every is {every} and model.lora_rank {config.model.lora_rank}; a checkpoint of an "
        "adapter cannot be sampled while training: use report.every=0",
    )
    world = world_of(config)
    clips = config.report.every_clips
    world.draw(config, clips)
    own = change(config, [f"report.follow_clips={min(config.report.follow_clips, clips)}"])
    return Watching(own, world)


@dataclass(frozen=True, slots=True)
class Watching:
    """Samples of one run, see `watch`."""

    config: Config
    world: World

    def __call__(self, student_update: int, checkpoint: Path, tracker: Tracker) -> None:
        """Generate clips of the averaged weights; write video and scores, and tell the trackers."""
        if student_update % self.config.report.every:
            return
        evaluation = self.world.draw(self.config, self.config.report.every_clips)
        decode = self.world.decoder(self.config)
        source = run_source("samples", self.config, checkpoint, OF_STUDENT)
        row, clips = measure(self.config, self.world, source, evaluation, decode)
        layout = self.world.layout
        folder = run_folder(self.config) / SCORES.parent
        grid = enlarged(tiled(clips, layout.sample_columns), layout.scale)
        write_mp4(folder / f"{student_update:06d}.mp4", grid, layout.fps)
        scores = {key: score.value for key, score in row.scores.items()}
        note_scores(run_folder(self.config) / SCORES, student_update, scores)
        tracker.log_samples(student_update, scores, grid)
