"""Reports of several seeds put together."""

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


def seed_folder(root: Path, seed: int, rows: Sequence[Row], **settings: Any) -> Path:
    """A folder with a seed's report of these rows."""
    folder = root / f"seed{seed}"
    folder.mkdir(parents=True)
    config = {"run": {"name": "demo", "seed": seed}, "report": {"clips": 256}} | settings
    report = {
        "world": "tiny",
        "background": "",
        "seed": seed,
        "num_clips": 256,
        "config": config,
        "environment": {"python": "3"},
    }
    report["rows"] = [tables.to_json(one) for one in rows]
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def seeds(root: Path, kls: Sequence[float]) -> list[Path]:
    """Reports in which an arm has the given KL; .1 below the control's 1.5 is enough for help."""
    folders = []
    for seed, kl in enumerate(kls):
        arm = row("arm", **USUAL | {"kl_prior_sample": (kl, 0.05)})
        grey = row("grey", **USUAL | {"contrast": (0.3, 0.02)})
        folders.append(seed_folder(root, seed, [row("data"), row("control", **USUAL), arm, grey]))
    return folders


def test_combined_report_counts_seeds_and_shows_their_range(tmp_path: Path):
    """Catches a claim from one lucky seed."""
    table = combine(seeds(tmp_path, [1.0, 1.2, 1.5]), tmp_path / "all")
    saved = json.loads((tmp_path / "all" / "report.json").read_text())
    findings = {finding["name"]: finding for finding in saved["findings"]}
    assert (
        "arm helped in 2 of 3 seeds, made no clear difference in 1 of 3 seeds"
        in findings["arm"]["text"]
    )
    assert findings["arm"]["outcome"] == ""
    assert "grey harmed in every seed" in findings["grey"]["text"]
    assert findings["grey"]["outcome"] == "harmed"
    arm = next(one for one in saved["rows"] if one["name"] == "arm")
    assert arm["scores"]["kl_prior_sample"] == pytest.approx(
        {"value": 3.7 / 3, "low": 1.0, "high": 1.5, "n": 3}
    )
    assert "1.23 [1.00 1.50]" in table
    tags = parsed((tmp_path / "all" / "report.html").read_text())
    assert "../seed1/report.html" in tags.addresses
    assert "arm helped in 2 of 3 seeds" in (tmp_path / "all" / "report.md").read_text()


def test_combined_marks_hold_in_every_seed(tmp_path: Path):
    """Catches marks by the range of means, which is a point for the data: all would differ."""
    combine(seeds(tmp_path, [1.0, 0.2, 1.5]), tmp_path / "all")
    saved = json.loads((tmp_path / "all" / "report.json").read_text())
    marks = {one["name"]: one["marks"] for one in saved["rows"]}
    assert marks["control"]["kl_prior_sample"] == "↑"
    assert marks["arm"]["kl_prior_sample"] == "="  # .2 touches the data's .1 in one seed
    assert marks["grey"]["contrast"] == "↓"
    assert marks["data"]["contrast"] == ""


def test_combine_refuses_reports_that_do_not_belong_together(tmp_path: Path):
    """Catches a mean over different experiments, or over the same seed twice."""
    rows = [row("data"), row("control")]
    first = seed_folder(tmp_path, 0, rows)
    with pytest.raises(ReportError, match="at least two seeds"):
        combine([first], tmp_path / "all")
    with pytest.raises(ReportError, match="seed 0 is in 2 of the reports"):
        combine([first, first], tmp_path / "all")
    with pytest.raises(ReportError, match=r"was made with dfd.p=0.3"):
        combine([first, seed_folder(tmp_path, 1, rows, dfd={"p": 0.3})], tmp_path / "all")
    with pytest.raises(ReportError, match="has rows data"):
        combine([first, seed_folder(tmp_path, 2, rows[:1])], tmp_path / "all")
    with pytest.raises(ReportError, match=r"train with report.clips > 0"):
        combine([first, tmp_path / "nowhere"], tmp_path / "all")
    unknown = json.loads((first / "report.json").read_text()) | {"world": "moon", "seed": 2}
    (tmp_path / "seed2" / "report.json").write_text(json.dumps(unknown))
    with pytest.raises(ReportError, match="world is 'moon'"):
        combine([tmp_path / "seed2", first], tmp_path / "all")
    (tmp_path / "seed2" / "report.json").write_text("{")
    with pytest.raises(ReportError, match="is not JSON"):
        combine([first, tmp_path / "seed2"], tmp_path / "all")
    assert not (tmp_path / "all").exists()
