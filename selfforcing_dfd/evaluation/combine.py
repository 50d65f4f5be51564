"""Several runs in one report: a claim from one run is no claim.

Runs differ in the student that training began from, in the seed of its draws, or in both.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfforcing_dfd.evaluation import tables
from selfforcing_dfd.evaluation.document import (
    PAGE_FILE,
    REPORT_FILE,
    is_for_reporting,
    notes_on,
    printed,
    save,
)
from selfforcing_dfd.evaluation.page import Page
from selfforcing_dfd.evaluation.tables import DATA, Mark, ReportError, Row, Run
from selfforcing_dfd.evaluation.worlds import world_named
from selfforcing_dfd.tiny.bootstrap import Score
from selfforcing_dfd.weights.run_record import read_record
from selfforcing_dfd.weights.runs import CONFIG_FILE, STUDENT_FILE

MAY_DIFFER = {
    "base",
    "run.name",
    "run.out",
    "run.seed",
    "run.device",
    "weights.student",
    "weights.fake",
    "report.seed",
    "data.shards",
    "data.tiny.seed",
    "data.workers",
}
"""Settings in which reports that are combined may differ."""

KEYS = (
    "world",
    "background",
    "seed",
    "start",
    "evaluation_seed",
    "rows",
    "config",
    "num_clips",
    "environment",
)


def combine(folders: Sequence[Path], out: Path) -> str:
    """One table from the reports of several runs, and the verdict over them.

    It has means and ranges over runs. Writes report.json, .md and .html to `out` and returns the
    table. Raises ReportError for reports that do not belong together.
    """
    reports = [load_report(folder) for folder in folders]
    _check_belong_together(folders, reports)
    first = reports[0]
    world = world_named(first["world"])
    runs = [Run(report["start"], rows_of(report)) for report in reports]
    data = [row for run in runs for row in run.rows if row.name == DATA]
    by_name = zip(*[run.rows for run in runs], strict=True)
    rows = [combined_row(several, data) for several in by_name]
    num_clips = first["num_clips"]
    labels = _labels(reports)
    evaluation_seeds = sorted({report["evaluation_seed"] for report in reports})
    links = {}
    for label, folder in zip(labels, folders, strict=True):
        links[label] = Path(os.path.relpath(folder / PAGE_FILE, out)).as_posix()
    name = first["config"]["run"]["name"]
    page = Page(
        title=f"{name}, {len(runs)} runs",
        subtitle=f"{world.title}, {'; '.join(labels)}, {num_clips} clips a row and run",
        tried=f"The same comparison in {len(runs)} runs.",
        headline=world.headline(rows, num_clips, len(runs)),
        background=first["background"],
        world=world,
        findings=world.verdict(runs) or world.findings(rows),
        rows=rows,
        notes=notes_on(world, rows, num_clips, evaluation_seeds, len(runs)),
        sheets={},
        strip="",
        captions=(),
        panels=(),
        commands=[f"python train.py --config {folder / CONFIG_FILE}" for folder in folders],
        environment=first["environment"],
        settings="",
        links=links,
    )
    more = {
        "runs": [{"start": report["start"], "seed": report["seed"]} for report in reports],
        "evaluation_seeds": evaluation_seeds,
        "config": first["config"],
    }
    save(out, page, more)
    return printed(page, out)


def rows_of(report: Mapping[str, Any]) -> list[Row]:
    return [tables.from_json(row) for row in report["rows"]]


def _labels(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run: its seed, and its start where there are several."""
    if len({report["start"] for report in reports}) == 1:
        return [f"seed {report['seed']}" for report in reports]
    return [f"start {report['start']}, seed {report['seed']}" for report in reports]


def load_report(folder: Path) -> dict[str, Any]:
    """A run's report.json. Raises ReportError where there is none, or it is damaged or outdated."""
    path = folder / REPORT_FILE
    if not path.is_file():
        raise ReportError(f"no {path}; train with report.clips > 0, or name the run's own folder")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path} is not JSON ({error}); write the report again") from error
    missing = [key for key in KEYS if key not in report]
    if missing:
        raise ReportError(
            f"{path} has no {missing[0]}: it is not the report of one run, or an older version "
            f"wrote it; combine the runs' own reports, written by this version"
        )
    for name, run in report.get("trained", {}).items():
        arm = folder / name if report["config"]["arms"] else folder
        record = read_record(arm)
        result = {} if record is None else record.results.get(STUDENT_FILE, {})
        if result.get("sha256") != run["student"]:
            raise ReportError(
                f"{path} is of another student than {arm} has now; write the report again with "
                "train.py --resume"
            )
    return dict(report)


def _check_belong_together(folders: Sequence[Path], reports: Sequence[Mapping[str, Any]]) -> None:
    """Raise ReportError unless all are different runs with the same rows and settings."""
    if len(reports) < 2:
        raise ReportError(
            f"{len(reports)} reports to combine; name the folders of at least two runs"
        )
    runs = Counter((report["start"], report["seed"]) for report in reports)
    for (start, seed), times in runs.items():
        if times > 1:
            raise ReportError(
                f"seed {seed} of start {start or 'none'} is in {times} of the reports; each run "
                f"counts once, so leave one out"
            )
    if len({is_for_reporting(report["evaluation_seed"]) for report in reports}) > 1:
        raise ReportError(
            "some reports are of an evaluation seed for tuning, some of one for reporting; write "
            "all with report.seed on one side of 2000"
        )
    first = reports[0]
    for folder, report in zip(folders, reports, strict=True):
        names = [row["name"] for row in first["rows"]]
        others = [row["name"] for row in report["rows"]]
        if names != others:
            raise ReportError(
                f"{folder} has rows {', '.join(others)}; {folders[0]} has {', '.join(names)}"
            )
        wanted = _flat(first["config"])
        own = _flat(report["config"])
        for key in {**wanted, **own}:
            if own.get(key) != wanted.get(key) and key not in MAY_DIFFER:
                raise ReportError(
                    f"{folder} was made with {key}={own.get(key)}, {folders[0]} with "
                    f"{wanted.get(key)}; combine runs that differ in their start or seed alone"
                )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"section.setting": value}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def combined_row(several: Sequence[Row], data: Sequence[Row]) -> Row:
    """The same row of several runs, whose data rows are `data`.

    Each score is the mean, with the range over runs as its interval.
    """
    scores: dict[str, Score] = {}
    marks: dict[str, Mark] = {}
    for key in several[0].scores:
        values = [row.scores[key].value for row in several if key in row.scores]
        scores[key] = _over_runs([value for value in values if math.isfinite(value)])
        found = {row.mark(key, own) for row, own in zip(several, data, strict=True)}
        marks[key] = found.pop() if len(found) == 1 else "="
    per_mode = zip(*(row.modes for row in several), strict=True)
    return Row(
        name=several[0].name,
        about=several[0].about,
        scores=scores,
        modes=tuple(sum(counts) for counts in per_mode),
        seconds=sum(row.seconds for row in several),
        marks=marks,
    )


def _over_runs(values: Sequence[float]) -> Score:
    if not values:
        return Score(math.nan, math.nan, math.nan, 0)
    return Score(sum(values) / len(values), min(values), max(values), len(values))
