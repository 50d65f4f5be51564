"""The journey itself: plan, budget, then every step that is not done yet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from selfforcing_dfd.common import atomic_file
from selfforcing_dfd.journey.budget import budget_of, table
from selfforcing_dfd.journey.checkpoint import Checkpoint, JourneyError
from selfforcing_dfd.journey.recipes import Plan, make_plan
from selfforcing_dfd.journey.record import Done, Record
from selfforcing_dfd.journey.request import Request
from selfforcing_dfd.journey.steps import Say, Step, Train, steps_of
from selfforcing_dfd.journey.upload import check_repository
from selfforcing_dfd.stages.config_files import to_yaml
from selfforcing_dfd.training.exclusive import lock_folders
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.starts import check_start


def distil(
    request: Request, checkpoint: Checkpoint, train: Train, say: Say, dry_run: bool = False
) -> None:
    """From a checkpoint and videos to an exported student. Raises UserError.

    Steps that are done with the same inputs are skipped, so the same command goes on after a stop.
    dry_run: only say what would be done and what it costs.
    """
    check_processes()
    if request.push_to:
        check_repository(request.push_to)
    plan = make_plan(request, checkpoint)
    check_weights(plan)
    for line in described(request, plan):
        say(line)
    if dry_run:
        return
    with lock_folders(request.out):
        write_configs(request, plan)
        record = Record(request.out)
        for step in steps_of(request, plan, train, say):
            do(step, record, say)
    say(f"done: {request.exported}, measured in {request.evaluation}")


def check_processes() -> None:
    """JourneyError where several processes were started: only training shares its work."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise JourneyError(
            f"{size} processes were started, and distil is one, which starts others itself: "
            f"use --gpus {size}. On several machines train its runs alone: torchrun ... "
            "-m selfforcing_dfd train --config OUT/configs/student.yaml --resume, then the same "
            "distil command goes on"
        )


def check_weights(plan: Plan) -> None:
    """ConfigError for weights that are not there and that no step makes."""
    made = {str(run_folder(config)) for config in plan.runs.values()}
    for config in plan.runs.values():
        waits = any(
            str(Path(path).parent) in made
            for path in (config.weights.causal, config.weights.fake, config.weights.student)
        )
        if not waits:
            check_start(config)


def described(request: Request, plan: Plan) -> list[str]:
    """What will be done and what all of it costs."""
    source = request.clips(plan.num_video_frames, plan.size, False)
    budget = budget_of(request, plan, source)
    intake = budget.intake
    height, width = plan.size
    clips = (
        f"{intake.files} files with {intake.frames} frames: at most {intake.clips} clips of "
        f"{plan.num_video_frames} frames of {height}x{width}"
    )
    if intake.unusable:
        clips += f"; {intake.unusable} files cannot be used"
    no_fake = "" if "noised_real" in plan.recipe else "; it has no fake score to warm up"
    return [
        f"checkpoint  {plan.checkpoint.in_words()}",
        f"recipe      {plan.recipe}: {plan.why}{no_fake}",
        f"videos      {clips}",
        f"folder      {request.out}",
        "",
        "the whole budget",
        *table(budget, request.gpus),
        "",
    ]


def write_configs(request: Request, plan: Plan) -> None:
    """A file of settings for every run, which `train --config` takes."""
    for name, config in plan.runs.items():
        with atomic_file(request.configs / f"{name}.yaml") as partial:
            partial.write_text(to_yaml(config), encoding="utf-8")


def do(step: Step, record: Record, say: Say) -> None:
    """One step, unless it is done with the same inputs and its results are still there."""
    inputs = step.inputs()
    before = record.steps.get(step.name)
    if before is not None:
        changed = record.changed_inputs(step.name, inputs)
        lost = record.lost_result(step.name)
        if before.finished and not changed and not lost:
            say(f"{step.name}: already done")
            return
        if step.refuses_change:
            refuse_change(step, record, changed, lost)
        say(f"{step.name}: {reason_for(before, changed, lost)}")
    say(f"{step.name}: {step.about}")
    record.begin(step.name, inputs)
    record.note(step.name, inputs, step.run())


def reason_for(before: Done, changed: Sequence[str], lost: str) -> str:
    """Why a step is done once more, or goes on."""
    if changed:
        return f"again, since {', '.join(changed)} changed"
    return f"again, since {lost} is missing or changed" if before.finished else "goes on"


def refuse_change(step: Step, record: Record, changed: Sequence[str], lost: str) -> None:
    """JourneyError where a step's results, which took long, are not those of its inputs."""
    if changed:
        raise JourneyError(
            f"{record.folder} holds what step {step.name} made of other inputs: "
            f"{', '.join(changed)} changed; use another --out"
        )
    if lost and (record.folder / lost).exists():
        raise JourneyError(
            f"{record.folder / lost} is not what step {step.name} wrote; bring it back, or remove "
            f"{(record.folder / lost).parent} to have it made again"
        )
