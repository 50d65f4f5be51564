"""A study's numbers: collected from its results, small enough for the repository, and read back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import UserError, atomic_file
from selfforcing_dfd.evaluation.tables import DATA, START, TEACHER, Row
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.dfd import DFDStage
from selfforcing_dfd.study.measure import GUARDS, about_run, in_short
from selfforcing_dfd.study.operations import noise_gflop, training_gflop
from selfforcing_dfd.study.plan import (
    CAUSAL_ROWS,
    LONG,
    RESULTS,
    START_FILE,
    FixedPoint,
    Plan,
    StudyRun,
    runs_of,
    settings_of_arm,
)
from selfforcing_dfd.study.work import noise_file, with_stored_noise
from selfforcing_dfd.tiny.bootstrap import Score
from selfforcing_dfd.weights.runs import STUDENT_FILE

DIGITS = 4  # after the point
KEPT = (
    "valid",
    "moving",
    "modes",
    "coverage",
    "kl_prior_sample",
    "kl_floor",
    "kl_hue",
    "kl_direction",
    "kl_speed",
    "follow",
    "follow_direction",
    "follow_hue",
    "follow_speed",
    "saturation",
    "contrast",
    "speed_px",
    "jitter_px",
    "seam_excess_px",
    "saturation_drift",
    "contrast_drift",
)
"""Scores that go into the repository; the results have all of them, with intervals."""

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Trajectory:
    """One run along its way; all lists are over its measured points.

    core_seconds, gflop: time and counted operations of training up to the point, with what was
    spent before on noise for the run.
    logged: means of the gap and of the guards' ratios since the point before.
    stream: scores of free streams, one training length after the other. made: settings that are not
    the defaults, hashes of weights and data, and the commit.
    """

    start: str
    draw: int
    arm: str
    updates: list[int]
    core_seconds: list[float]
    gflop: list[float]
    scores: dict[str, list[float | None]]
    logged: dict[str, list[float | None]] = field(default_factory=dict)
    stream: list[Scores] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmFacts:
    """What the tables say of an arm.

    forced: whether real clips anchor its teacher (a dose). from_start: whether it trains the
    start's own student on. family: of arms that are settings of one method. control: the arm of
    which it changes one thing. paper: what the paper found of that.
    """

    about: str
    tried: int
    settings: list[str]
    forced: bool = False
    from_start: bool = True
    family: str = ""
    control: str = ""
    paper: str = ""


@dataclass(frozen=True)
class Study:
    """All that tables and plots are made of. starts: rows of each start, by their names."""

    plan: str
    about: str
    updates: int
    dmd_updates: int
    clips: int
    evaluation_seed: int
    budget: str
    controls: list[str]
    long: int
    fixed: dict[str, FixedPoint]
    arms: dict[str, ArmFacts]
    references: dict[str, Scores]
    starts: dict[str, dict[str, Scores]]
    start_streams: dict[str, list[Scores]]
    runs: list[Trajectory]
    missing: int  # runs of the plan without a result
    commits: list[str]
    noise_core_seconds: float | None  # of finding clips' noise, 0 if not needed, None if not known
    goal: bool = True

    def runs_of(self, arm: str) -> list[Trajectory]:
        return [run for run in self.runs if run.arm == arm]

    def reference_rows(self, start: str) -> list[Row]:
        """Rows of data and teacher, then of the start's own student and causal teacher."""
        known = self.references | self.starts.get(start, {})
        return [self.row(name, scores) for name, scores in known.items()]

    def row(self, name: str, scores: Mapping[str, float | None]) -> Row:
        """Scores as a report's row; one run is one number, so intervals have no width."""
        known = {key: math.nan if value is None else value for key, value in scores.items()}
        return Row(name, "", {k: Score(v, v, v, self.clips) for k, v in known.items()})

    def point(self, run: Trajectory, index: int, name: str = "") -> Row:
        """The row of one point of a run."""
        scores = {key: values[index] for key, values in run.scores.items()}
        return self.row(name or run.arm, scores)


def collect(name: str, plan: Plan) -> Study:
    """The study of all results that are there. Raises UserError without data or teacher."""
    folder = Path(plan.out) / RESULTS
    runs = runs_of(plan)
    found = {run.name: read_json(run.result) for run in runs if run.result.exists()}
    references = {
        each: _scores(read_json(folder / f"{each}.json")["row"])
        for each in (DATA, TEACHER)
        if (folder / f"{each}.json").exists()
    }
    for needed in (DATA, TEACHER):
        if needed not in references:
            raise UserError(
                f"no {folder / needed}.json; run the study first, it comes first of all"
            )
    noise = noise_cost(runs)
    starts = {
        start: read_json(folder / start / START_FILE)
        for start in plan.starts
        if (folder / start / START_FILE).exists()
    }
    arms = {arm: facts_of(plan, arm, runs) for arm in dict.fromkeys(run.arm for run in runs)}
    commits = {result["commit"] for result in found.values()}
    trained = [trajectory(run, found[run.name], noise or 0.0) for run in runs if run.name in found]
    of_starts = {
        start: {START: _scores(result["row"])} | causal_rows(folder / start)
        for start, result in starts.items()
    }
    start_streams = {start: result["stream"] for start, result in starts.items()}
    return Study(
        plan=name,
        about=plan.about,
        updates=plan.updates,
        dmd_updates=plan.dmd_updates,
        clips=plan.clips,
        evaluation_seed=plan.evaluation_seed,
        budget=plan.budget,
        controls=list(plan.controls),
        long=plan.long,
        fixed=dict(plan.fixed),
        arms=arms,
        references=references,
        starts=of_starts,
        start_streams=start_streams,
        runs=trained,
        missing=len(runs) - len(found),
        commits=sorted(commits),
        noise_core_seconds=noise,
        goal=plan.goal,
    )


def causal_rows(folder: Path) -> dict[str, Scores]:
    """Rows of a start's causal teacher that are there."""
    paths = {name: folder / f"{name}.json" for name in CAUSAL_ROWS}
    return {name: _scores(read_json(path)["row"]) for name, path in paths.items() if path.exists()}


def noise_cost(runs: Sequence[StudyRun]) -> float | None:
    """Core seconds of finding the clips' noise; 0 where no run needs it, None if not known."""
    noisy = with_stored_noise(runs)
    if not noisy:
        return 0.0
    path = noise_file(noisy[0])
    return float(read_json(path)["core_seconds"]) if path.exists() else None


def facts_of(plan: Plan, arm: str, runs: Sequence[StudyRun]) -> ArmFacts:
    run = next(run for run in runs if run.arm == arm)
    name = arm.removesuffix(LONG)
    return ArmFacts(
        about=about_run(run.config),
        tried=plan.arms[name].tried,
        settings=settings_of_arm(plan, name),
        forced=issubclass(stage_of(run.config), DFDStage),
        from_start=run.config.weights.student == f"{plan.starts[run.start]}/{STUDENT_FILE}",
        family=plan.arms[name].family,
        control=plan.arms[name].control,
        paper=plan.arms[name].paper,
    )


def trajectory(run: StudyRun, result: Mapping[str, Any], noise_core_seconds: float) -> Trajectory:
    """A run's result in short."""
    seconds = 0.0  # before training
    gflop = 0.0
    if result["needs_noise"]:
        seconds = noise_core_seconds
        gflop = noise_gflop(run.config)
    points = result["points"]
    updates = [point["student_update"] for point in points]
    scores = [_scores(point["row"]) for point in points]
    core_seconds = [seconds + point["core_seconds"] for point in points]
    counted = [gflop + each for each in training_gflop(run.config, updates)]
    log = result["log"]
    logged = {key: between(log[key], updates) for key in ("gap", *GUARDS) if key in log}
    return Trajectory(
        start=result["start"],
        draw=result["draw"],
        arm=result["arm"],
        updates=updates,
        core_seconds=core_seconds,
        gflop=counted,
        scores={key: [each[key] for each in scores] for key in scores[0]},
        logged=logged,
        stream=result.get("stream", []),
        made=in_short(result),
    )


def between(values: Sequence[float | None], updates: Sequence[int]) -> list[float | None]:
    """Means over the student updates since the point before; values[n] is of update n + 1."""
    means: list[float | None] = []
    for first, last in zip([0, *updates], updates, strict=False):
        known = [value for value in values[first:last] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


def _scores(row: Mapping[str, Any]) -> Scores:
    return {key: row["scores"][key]["value"] for key in KEPT if key in row["scores"]}


def read_json(path: Path) -> Any:
    """The file's content. Raises UserError for one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it to make it again") from error


def save_study(study: Study, path: Path) -> None:
    """Write the study, one run a line, with numbers rounded."""
    plain = rounded(dataclasses.asdict(study))
    runs = plain.pop("runs")
    lines = ",\n".join(json.dumps(run, allow_nan=False) for run in runs)
    head = json.dumps(plain, indent=1, allow_nan=False).removesuffix("\n}")
    with atomic_file(path) as partial:
        partial.write_text(f'{head},\n "runs": [\n{lines}\n]}}\n', encoding="utf-8")


def load_study(path: Path) -> Study:
    """Inverse of `save_study`, but for the rounding. Raises UserError for something else."""
    plain = read_json(path)
    try:
        plain["runs"] = [Trajectory(**run) for run in plain["runs"]]
        plain["arms"] = {name: ArmFacts(**facts) for name, facts in plain["arms"].items()}
        plain["fixed"] = {name: FixedPoint(**point) for name, point in plain["fixed"].items()}
        return Study(**plain)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} holds no study ({error}); collect it again") from error


def rounded(value: Any) -> Any:
    """Numbers with DIGITS digits; what is not finite is null."""
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
