"""Reports of several runs put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_page import parsed
from tiny_rows import USUAL, row

from selfforcing_dfd.evaluation import tables
from selfforcing_dfd.evaluation.combine import combine
from selfforcing_dfd.evaluation.tables import ReportError, Row


def run_folder(
    root: Path,
    seed: int,
    rows: Sequence[Row],
    start: str = "a",
    evaluation: int = 2000,
    **more: Any,
) -> Path:
    """A folder with a run's report of these rows. more: sections of its config."""
    folder = root / f"{start}{seed}"
    folder.mkdir(parents=True)
    settings = {
        "run": {"name": "demo", "seed": seed},
        "weights": {"student": start},
        "report": {"clips": 256, "seed": evaluation},
    }
    report = {
        "world": "tiny",
        "background": "",
        "seed": seed,
        "start": start,
        "evaluation_seed": evaluation,
        "num_clips": 256,
        "config": settings | more,
        "environment": {"python": "3"},
    }
    report["rows"] = [tables.to_json(one) for one in rows]
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def runs(root: Path, coverages: Sequence[float]) -> list[Path]:
    """Reports in which an arm has the given coverage; the control has .3."""
    folders = []
    for seed, coverage in enumerate(coverages):
        arm = row("arm", **USUAL | {"coverage": (coverage, 0.05)})
        grey = row("grey", **USUAL | {"contrast": (0.3 + seed / 100, 0.02)})
        rows = [row("data"), row("control", **USUAL), arm, grey]
        folders.append(run_folder(root, seed % 2, rows, "ab"[seed // 2]))
    return folders


def test_combined_report_judges_over_runs_and_shows_their_range(tmp_path: Path):
    """Catches a claim from one lucky run, and runs of another start that are taken for the same."""
    table = combine(runs(tmp_path, [0.85, 0.9, 0.8, 0.86]), tmp_path / "all")
    saved = json.loads((tmp_path / "all" / "report.json").read_text())
    findings = {finding["name"]: finding for finding in saved["findings"]}
    assert findings["arm"]["outcome"] == "helped"
    assert "arm helped against control in 4 runs from 2 starts" in findings["arm"]["text"]
    assert findings["grey"]["outcome"] == "harmed"
    arm = next(one for one in saved["rows"] if one["name"] == "arm")
    assert arm["scores"]["coverage"] == pytest.approx(
        {"value": 3.41 / 4, "low": 0.8, "high": 0.9, "n": 4}
    )
    assert "0.85 [0.80 0.90]" in table
    assert "(256 clips each, means over 4 runs)" in saved["headline"]
    assert " ".join(table.split()).startswith(saved["headline"])
    assert "The verdict's rule." in " ".join(table.split())
    assert saved["runs"][3] == {"start": "b", "seed": 1}
    assert "evaluation seed 2000, kept for reporting" in " ".join(table.split())
    tags = parsed((tmp_path / "all" / "report.html").read_text())
    assert "../b1/report.html" in tags.addresses
    assert "arm helped against control" in (tmp_path / "all" / "report.md").read_text()
    lucky = runs(tmp_path / "lucky", [0.9, 0.3, 0.31, 0.29])
    assert "arm made no clear difference" in combine(lucky, tmp_path / "lucky" / "all")


def test_combined_marks_hold_in_every_run(tmp_path: Path):
    """Catches marks by the range of means, which is a point for the data: all would differ."""
    combine(runs(tmp_path, [0.5, 0.97, 0.5]), tmp_path / "all")
    saved = json.loads((tmp_path / "all" / "report.json").read_text())
    marks = {one["name"]: one["marks"] for one in saved["rows"]}
    assert marks["control"]["coverage"] == "↓"
    assert marks["arm"]["coverage"] == "="  # .97 touches the data's .98 in one run
    assert marks["grey"]["contrast"] == "↓"
    assert marks["data"]["contrast"] == ""


def test_combine_refuses_reports_that_do_not_belong_together(tmp_path: Path):
    """Catches a mean over different experiments, or over the same run twice."""
    rows = [row("data"), row("control")]
    first = run_folder(tmp_path, 0, rows)
    with pytest.raises(ReportError, match="at least two runs"):
        combine([first], tmp_path / "all")
    with pytest.raises(ReportError, match="seed 0 of start a is in 2 of the reports"):
        combine([first, first], tmp_path / "all")
    with pytest.raises(ReportError, match=r"was made with dfd.p=0.3"):
        combine([first, run_folder(tmp_path, 1, rows, dfd={"p": 0.3})], tmp_path / "all")
    with pytest.raises(ReportError, match="has rows data"):
        combine([first, run_folder(tmp_path, 2, rows[:1])], tmp_path / "all")
    with pytest.raises(ReportError, match="seed for tuning, some of one for reporting"):
        combine([first, run_folder(tmp_path, 3, rows, evaluation=1000)], tmp_path / "all")
    with pytest.raises(ReportError, match=r"train with report.clips > 0"):
        combine([first, tmp_path / "nowhere"], tmp_path / "all")
    report = json.loads((first / "report.json").read_text())
    other = tmp_path / "a2" / "report.json"
    other.write_text(json.dumps(report | {"world": "moon", "seed": 2}))
    with pytest.raises(ReportError, match="world is 'moon'"):
        combine([tmp_path / "a2", first], tmp_path / "all")
    del report["evaluation_seed"]
    other.write_text(json.dumps(report))
    with pytest.raises(ReportError, match=r"has no evaluation_seed: .* an older version"):
        combine([first, tmp_path / "a2"], tmp_path / "all")
    other.write_text("{")
    with pytest.raises(ReportError, match="is not JSON"):
        combine([first, tmp_path / "a2"], tmp_path / "all")
    assert not (tmp_path / "all").exists()
