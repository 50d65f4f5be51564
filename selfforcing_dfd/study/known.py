"""Runs of a study whose results are in the repository alone: taken from there, not made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.study.measure import about_run, provenance, stale, write_json
from selfforcing_dfd.study.plan import StudyRun
from selfforcing_dfd.study.results import Study, Trajectory


def take_known(runs: Sequence[StudyRun], study: Study) -> tuple[int, list[str]]:
    """Write the results of runs that the study's numbers hold; (how many, why others were not).

    A run is taken if settings, weights and data are those that would make it now. Numbers have the
    digits that the repository keeps. Results that are there stay.
    """
    known = {(run.start, run.draw, run.arm): run for run in study.runs}
    taken = 0
    refused = []
    for run in runs:
        trajectory = known.get((run.start, run.draw, run.arm))
        if trajectory is None or run.result.exists():
            continue
        why = difference(run, trajectory)
        if why:
            refused.append(f"{run.name}: {why}")
            continue
        write_json(run.result, result_of(run, trajectory, study.noise_core_seconds or 0.0))
        taken += 1
    return taken, refused


def difference(run: StudyRun, trajectory: Trajectory) -> str:
    """Why a run would not be made like this now; empty if it would."""
    if not trajectory.made:
        return "it is not known what made it"
    if tuple(trajectory.updates) != run.updates:
        return f"it was measured at {trajectory.updates}, the plan wants {list(run.updates)}"
    if run.streams and not trajectory.stream:
        return "it has no streams"
    return stale(trajectory.made, run.config, None, ())


def result_of(run: StudyRun, trajectory: Trajectory, noise_core_seconds: float) -> dict[str, Any]:
    """The result that `collect` reads as this trajectory.

    noise_core_seconds: of finding the clips' noise, which the trajectory's core seconds hold.
    """
    needs_noise = bool(stage_of(run.config).needs_noise(run.config))
    before = noise_core_seconds if needs_noise else 0.0
    points = [
        {
            "student_update": update,
            "core_seconds": trajectory.core_seconds[place] - before,
            "row": {"scores": scores_at(trajectory, place)},
        }
        for place, update in enumerate(trajectory.updates)
    ]
    made = provenance(run.config) | {"commit": trajectory.made["commit"]}
    about = {"start": run.start, "draw": run.draw, "arm": run.arm, "about": about_run(run.config)}
    result = {**about, **made, "needs_noise": needs_noise, "points": points}
    result["log"] = {key: repeated(trajectory, key) for key in trajectory.logged}
    return result | ({"stream": trajectory.stream} if trajectory.stream else {})


def scores_at(trajectory: Trajectory, place: int) -> dict[str, dict[str, float | None]]:
    return {key: {"value": values[place]} for key, values in trajectory.scores.items()}


def repeated(trajectory: Trajectory, key: str) -> list[float | None]:
    """A value for each student update: the mean since the point before, as often as there are."""
    values: list[float | None] = []
    before = 0
    for update, mean in zip(trajectory.updates, trajectory.logged[key], strict=True):
        values += [mean] * (update - before)
        before = update
    return values
