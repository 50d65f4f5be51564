"""Several seeds in one report: a claim that holds in one seed alone is none."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from selfforcing_dfd.evaluation import tables
from selfforcing_dfd.evaluation.document import REPORT_FILE, notes_on, printed, save
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
from selfforcing_dfd.tiny.metrics import Score

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


def combine(folders: Sequence[Path], out: Path) -> str:
    """One table from the reports of several seeds: means, ranges over seeds, and in how many seeds
    each arm did what.

    Writes report.json, .md and .html to `out` and returns the table. Raises ReportError for reports
    that do not belong together.
    """
    reports = [load_report(folder) for folder in folders]
    seeds = _check_belong_together(folders, reports)
    per_seed = [[tables.from_json(row) for row in report["rows"]] for report in reports]
    data = [row for one in per_seed for row in one if row.name == DATA]
    rows = [combined_row(several, data) for several in zip(*per_seed, strict=True)]
    title = f"{reports[0]['config']['run']['name']}, seeds {', '.join(map(str, seeds))}"
    num_clips = reports[0]["num_clips"]
    page = Page(
        title=title,
        subtitle=f"Tiny world, {len(seeds)} seeds, {num_clips} clips a row and seed",
        findings=combined_findings(rows, per_seed),
        rows=rows,
        notes=notes_on(rows, num_clips, len(seeds)),
        sheets={},
        captions=(),
        panels=(),
        commands=[f"python train.py --config {folder / 'config.yaml'}" for folder in folders],
        environment=reports[0]["environment"],
        settings="",
        links={
            f"seed {seed}": Path(os.path.relpath(folder / "report.html", out)).as_posix()
            for seed, folder in zip(seeds, folders, strict=True)
        },
    )
    save(out, page, {"seeds": seeds, "config": reports[0]["config"]})
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
    missing = [
        key for key in ("seed", "rows", "config", "num_clips", "environment") if key not in report
    ]
    if missing:
        raise ReportError(
            f"{path} has no {missing[0]}: not one seed's report; combine the runs' own reports"
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
        names, others = ([row["name"] for row in r["rows"]] for r in (first, report))
        if names != others:
            raise ReportError(
                f"{folder} has rows {', '.join(others)}; {folders[0]} has {', '.join(names)}"
            )
        own, wanted = _flat(report["config"]), _flat(first["config"])
        differing = [
            key
            for key in {**wanted, **own}
            if own.get(key) != wanted.get(key) and key not in MAY_DIFFER
        ]
        if differing:
            key = differing[0]
            raise ReportError(
                f"{folder} was made with {key}={own.get(key)}, {folders[0]} with {wanted.get(key)}; "
                f"combine runs that differ in their seed alone"
            )
    return seeds


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"section.setting": value}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def combined_row(several: Sequence[Row], data: Sequence[Row]) -> Row:
    """The same row of several seeds, whose data rows are `data`: each score's mean, with the range
    over seeds.
    """
    scores: dict[str, Score] = {}
    marks: dict[str, Mark] = {}
    for key in several[0].scores:
        values = [row.scores[key].value for row in several if key in row.scores]
        values = [value for value in values if math.isfinite(value)]
        mean, low, high = (
            (sum(values) / len(values), min(values), max(values)) if values else (math.nan,) * 3
        )
        scores[key] = Score(mean, low, high, len(values))
        said = {row.mark(key, own) for row, own in zip(several, data, strict=True)}
        marks[key] = said.pop() if len(said) == 1 else "="
    modes = tuple(sum(counts) for counts in zip(*(row.modes for row in several), strict=True))
    return Row(
        several[0].name, several[0].about, scores, modes, sum(row.seconds for row in several), marks
    )


def combined_findings(rows: Sequence[Row], per_seed: Sequence[Sequence[Row]]) -> list[Finding]:
    """For every arm, in how many seeds the rule found what; without a control, what sets its range
    off the data's.
    """
    found = [tables.findings(one) for one in per_seed]
    control = tables.find(rows, CONTROL)
    if control is None or not all(finding.outcome for finding in found[0]):
        return tables.findings(rows)
    findings = []
    for several in zip(*found, strict=True):
        name = several[0].name
        arm = next(row for row in rows if row.name == name)
        counted = Counter(finding.outcome for finding in several).most_common()
        said = ", ".join(_in_seeds(word, times, len(per_seed)) for word, times in counted)
        means = ", ".join(
            f"{title} {tables.compared(arm, control, key)}"
            for key, title in (
                ("kl_prior_sample", "KL(prior || sample)"),
                ("valid", "validity"),
                ("contrast", "contrast"),
            )
        )
        unanimous: Outcome | Literal[""] = several[0].outcome if len(counted) == 1 else ""
        findings.append(Finding(name, unanimous, f"{name} {said}: mean {means}."))
    return findings


def _in_seeds(word: str, times: int, num_seeds: int) -> str:
    said = {"mixed": "was mixed", "no clear difference": "made no clear difference"}.get(word, word)
    return f"{said} in {'every seed' if times == num_seeds else f'{times} of {num_seeds} seeds'}"
