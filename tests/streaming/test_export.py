"""From a run's folder to an export: which student it is, and what its report says about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfforcing_dfd.streaming.export import export_run, measured_results, the_only_arm
from selfforcing_dfd.streaming.parts import LoadError


def score(value: float | None, low: float | None = None, high: float | None = None) -> Any:
    return {"value": value, "low": low, "high": high, "n": 256}


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """A finished comparison with its report; the arms' folders hold settings only."""
    run = tmp_path / "compare"
    for arm in ("control", "prefix"):
        (run / arm).mkdir(parents=True)
        (run / arm / "config.yaml").write_text("run: {stage: dfd}\n")
    (run / "config.yaml").write_text("arms: {control: [], prefix: []}\n")
    rows = [
        {"name": "data", "scores": {"valid": score(1.0), "kl_prior_sample": score(0.04)}},
        {
            "name": "prefix",
            "scores": {"valid": score(0.991, 0.98, 1.0), "kl_prior_sample": score(None)},
        },
    ]
    (run / "report.json").write_text(json.dumps({"num_clips": 256, "rows": rows}))
    return run


def test_the_card_shows_what_was_measured(comparison):
    """Catches `Nothing yet` in a card although a report lies beside the run."""
    assert measured_results(comparison / "prefix") == {
        "clips measured": "256",
        "valid": "0.991 (0.98 to 1); data 1",
    }
    assert measured_results(comparison / "control") == {}, "the report has no row for it"


def test_one_student_is_exported(comparison, tmp_path):
    """Catches an arm that is chosen for the user, and a run that is not finished."""
    assert the_only_arm(comparison / "prefix") == comparison / "prefix"
    with pytest.raises(LoadError, match="compares control, prefix; name the folder of one"):
        the_only_arm(comparison)
    with pytest.raises(LoadError, match="the run is not finished; continue it with"):
        export_run(comparison / "prefix", tmp_path / "wan", tmp_path / "export")


def test_a_folder_in_use_is_kept(comparison, tmp_path):
    """Catches an export over somebody's files."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine").touch()
    with pytest.raises(LoadError, match="is not empty; choose another folder"):
        export_run(comparison / "prefix", tmp_path / "wan", tmp_path / "export")
