"""Several seeds in one report: a claim from one seed is no claim."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from selfforcing_dfd.evaluation import tables
from selfforcing_dfd.evaluation.document import PAGE_FILE, REPORT_FILE, notes_on, printed, save
from selfforcing_dfd.evaluation.page import Page
from selfforcing_dfd.evaluation.tables import (
    CONTROL,
    DATA,
    Finding,
    Mark,
    Outcome,
    ReportError,
    Row,
)
from selfforcing_dfd.evaluation.tiny_verdict import compared
from selfforcing_dfd.evaluation.world import World
from selfforcing_dfd.evaluation.worlds import world_named
from selfforcing_dfd.tiny.bootstrap import Score
from selfforcing_dfd.weights.runs import CONFIG_FILE

MAY_DIFFER = {
    "base",
    "run.name",
    "run.out",
    "run.seed",
    "run.device",
    "data.shards",
    "data.tiny.seed",
    "data.workers",
}
"""Settings in which reports that are combined over seeds may differ."""

STATED_MEANS = {
    "kl_prior_sample": "KL(prior || sample)",
    "valid": "validity",
    "contrast": "contrast",
}
"""Scores that the verdict over seeds repeats; only worlds with a rule get this far."""

KEYS = ("world", "background", "seed", "rows", "config", "num_clips", "environment")


def combine(folders: Sequence[Path], out: Path) -> str:
    """One table from the reports of several seeds.

    It has means, ranges over seeds, and in how many seeds each arm had which outcome. Writes
    report.json, .md and .html to `out` and returns the table. Raises ReportError for reports that
    do not belong together.
    """
    reports = [load_report(folder) for folder in folders]
    seeds = _check_belong_together(folders, reports)
    first = reports[0]
    world = world_named(first["world"])
    per_seed = [[tables.from_json(row) for row in report["rows"]] for report in reports]
    data = [row for rows in per_seed for row in rows if row.name == DATA]
    rows = [combined_row(several, data) for several in zip(*per_seed, strict=True)]
    num_clips = first["num_clips"]
    page = Page(
        title=f"{first['config']['run']['name']}, seeds {', '.join(map(str, seeds))}",
        subtitle=f"{world.title}, {len(seeds)} seeds, {num_clips} clips a row and seed",
        tried=f"The same comparison with {len(seeds)} seeds.",
        background=first["background"],
        world=world,
        findings=combined_findings(world, rows, per_seed),
        rows=rows,
        notes=notes_on(world, rows, num_clips, len(seeds)),
        sheets={},
        comparison="",
        captions=(),
        panels=(),
        commands=[f"python train.py --config {folder / CONFIG_FILE}" for folder in folders],
        environment=first["environment"],
        settings="",
        links={
            f"seed {seed}": Path(os.path.relpath(folder / PAGE_FILE, out)).as_posix()
            for seed, folder in zip(seeds, folders, strict=True)
        },
    )
    save(out, page, {"seeds": seeds, "config": first["config"]})
    return printed(page, out)


def load_report(folder: Path) -> dict[str, Any]:
    """A run's report.json. Raises ReportError where there is none or it is damaged."""
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
            f"{path} has no {missing[0]}: it is not the report of one seed, or an older version "
            f"wrote it; combine the runs' own reports, written by this version"
        )
    return dict(report)


def _check_belong_together(
    folders: Sequence[Path], reports: Sequence[Mapping[str, Any]]
) -> list[int]:
    """The seeds, all different, of reports with the same rows and settings; else ReportError."""
    if len(reports) < 2:
        raise ReportError(
            f"{len(reports)} reports to combine; name the folders of at least two seeds"
        )
    seeds = [report["seed"] for report in reports]
    for seed, times in Counter(seeds).items():
        if times > 1:
            raise ReportError(
                f"seed {seed} is in {times} of the reports; each seed counts once, so leave one out"
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
                    f"{wanted.get(key)}; combine runs that differ in their seed alone"
                )
    return seeds


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
    """The same row of several seeds, whose data rows are `data`.

    Each score is the mean, with the range over seeds as its interval.
    """
    scores: dict[str, Score] = {}
    marks: dict[str, Mark] = {}
    for key in several[0].scores:
        values = [row.scores[key].value for row in several if key in row.scores]
        scores[key] = _over_seeds([value for value in values if math.isfinite(value)])
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


def _over_seeds(values: Sequence[float]) -> Score:
    if not values:
        return Score(math.nan, math.nan, math.nan, 0)
    return Score(sum(values) / len(values), min(values), max(values), len(values))


def combined_findings(
    world: World, rows: Sequence[Row], per_seed: Sequence[Sequence[Row]]
) -> list[Finding]:
    """For every arm, in how many seeds the rule found which outcome, with means.

    Where no rule was applied, what sets the rows' ranges apart from the data's.
    """
    found = [world.findings(seed) for seed in per_seed]
    control = tables.find(rows, CONTROL)
    if control is None or not all(finding.outcome for seed in found for finding in seed):
        return world.findings(rows)
    findings = []
    for several in zip(*found, strict=True):
        name = several[0].name
        arm = next(row for row in rows if row.name == name)
        counted = Counter(finding.outcome for finding in several).most_common()
        times = ", ".join(_in_seeds(word, count, len(per_seed)) for word, count in counted)
        means = ", ".join(
            f"{title} {compared(arm, control, key)}" for key, title in STATED_MEANS.items()
        )
        unanimous: Outcome | Literal[""] = several[0].outcome if len(counted) == 1 else ""
        findings.append(Finding(name, unanimous, f"{name} {times}: mean {means}."))
    return findings


def _in_seeds(outcome: str, count: int, num_seeds: int) -> str:
    phrases = {"mixed": "was mixed", "no clear difference": "made no clear difference"}
    seeds = "every seed" if count == num_seeds else f"{count} of {num_seeds} seeds"
    return f"{phrases.get(outcome, outcome)} in {seeds}"
