"""A run that is trained as the public code trains says so in all that it leaves behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from selfforcing_dfd.evaluation.sources import run_source
from selfforcing_dfd.stages.published import AS_PUBLISHED, NAMES
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.identity import check_same, new_record, settings_of
from selfforcing_dfd.training.plan import plan
from selfforcing_dfd.weights.card import ModelFacts, model_card
from selfforcing_dfd.weights.run_record import RunError, read_record
from selfforcing_dfd.weights.runs import STUDENT_FILE
from selfforcing_dfd.weights.sources import read_weights
from tests.training.conftest import config_in, finished_run

ONE = ["run.stage=dmd", "run.student_updates=1", "score.fake_per_student=1"]
OF_MATCHING = ", ".join(NAMES[:3])


def test_a_run_as_published_says_so(tmp_path: Path, world: Path):
    """Catches a student whose weights, record, report or plan hide how it was trained."""
    config = finished_run(tmp_path, world, *ONE, *AS_PUBLISHED)
    folder = run_folder(config)
    record = read_record(folder)
    assert record is not None
    assert settings_of(record)["published"] == dict.fromkeys(NAMES, True)
    assert read_weights(folder / STUDENT_FILE).about["as_published"] == OF_MATCHING
    assert OF_MATCHING in run_source("dmd", config, folder / STUDENT_FILE).about
    assert f"published   as the public code: {OF_MATCHING}" in plan(config)
    plain = config_in(tmp_path, world, *ONE)
    with pytest.raises(RunError, match=r"published\.context_gradient"):
        check_same(folder, record, new_record(plain))
    assert "as the public code" not in plan(plain)


def test_runs_from_before_these_settings_are_the_same_runs(tmp_path: Path, world: Path):
    """Catches results that are refused because they know nothing of a setting that is off."""
    now = new_record(config_in(tmp_path, world, *ONE))
    lines = now.config.splitlines(keepends=True)
    first = lines.index("published:\n")
    before = dataclasses.replace(now, config="".join(lines[:first] + lines[first + 5 :]))
    assert "published" not in settings_of(before)
    check_same(tmp_path, before, now)


def test_a_card_says_so():
    """Catches an export whose card tells of the usual training."""
    assert f"differs from its papers: {OF_MATCHING}." in model_card(
        ModelFacts("x", training={"run": {"stage": "dmd"}}, published=OF_MATCHING)
    )
    assert "papers" not in model_card(ModelFacts("x", training={"run": {"stage": "dmd"}}))
