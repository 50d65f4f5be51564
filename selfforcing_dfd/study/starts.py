"""Starts of a study that are not shipped: what is missing, and the stages that make it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from selfforcing_dfd.common import UserError, atomic_file, find_file
from selfforcing_dfd.config import Config
from selfforcing_dfd.stages import load_config, stage_of
from selfforcing_dfd.study.plan import Plan, StartStage, StudyRun, load_plan
from selfforcing_dfd.training.exclusive import lock_folders
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.one_run import prepare_data, train
from selfforcing_dfd.training.starts import check_start
from selfforcing_dfd.weights.runs import STUDENT_FILE

SUFFIX = ".safetensors"


def make_starts(plan_name: str) -> list[str]:
    """Train what the plan's starts still lack, and say in lines what was done.

    What is there stays, a run that was stopped goes on. Raises UserError for a plan that does not
    say how its starts are made.
    """
    plan = load_plan(plan_name)
    if not plan.made:
        raise UserError(
            f"plan {plan_name} does not say how its starts are made; write the stages into its "
            "section `made`, or the folders of weights that you have into `starts`"
        )
    lines = []
    for stage in plan.made:
        config = config_of(stage)
        wanted = outputs(stage, config)
        if all(path.exists() for path in wanted):
            lines.append(f"{stage.config}: {wanted[0].parent} is there")
            continue
        check_start(config)
        with lock_folders(run_folder(config)):
            prepare_data(config)
            train(config, resume=True)
        for file, place in stage.copy.items():
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(Path(place)) as partial:
                shutil.copyfile(run_folder(config) / f"{file}{SUFFIX}", partial)
        lines.append(f"{stage.config}: {', '.join(map(str, wanted))}")
    return lines


def config_of(stage: StartStage) -> Config:
    return load_config(stage.config, stage.set)


def outputs(stage: StartStage, config: Config) -> list[Path]:
    """What a stage leaves: the run's student, or the copies that are asked for."""
    return [Path(place) for place in stage.copy.values()] or [run_folder(config) / STUDENT_FILE]


def require_starts(plan_name: str, plan: Plan, runs: Sequence[StudyRun]) -> None:
    """UserError with the command that makes what is missing, where the plan knows how."""
    starts = [start for run in runs for start in stage_of(run.config).starts(run.config).values()]
    missing = sorted({each.path for each in starts if not find_file(each.path).exists()})
    if missing and plan.made:
        raise UserError(
            f"weights of starts are missing: {', '.join(missing)}; make them first, with "
            f"selfforcing-dfd study --plan {plan_name} --starts (minutes to hours)"
        )
