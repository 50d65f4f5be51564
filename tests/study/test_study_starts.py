"""Starts that are not shipped: the plan says how they are made, and a missing one is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR
from selfforcing_dfd.study.plan import load_plan
from selfforcing_dfd.weights.read import load_network

MADE = """
made:
  - config: {folder}/base.yaml
    set:
      - run.stage=dmd
      - run.out={folder}/starts
      - run.name=two
      - run.seed=7
      - run.student_updates=1
      - weights.student={folder}/one/student.safetensors
      - weights.fake={folder}/one/fake.safetensors
    copy: {{student: {folder}/two/student.safetensors, fake: {folder}/two/fake.safetensors}}
"""


def test_missing_starts_are_named_and_made(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches a study that nobody but its author can run, and starts that are trained twice."""
    shutil.rmtree(tmp_path / "two")
    plan.write_text(plan.read_text() + MADE.format(folder=tmp_path))
    assert main(["study", "--plan", str(plan)]) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert str(tmp_path / "two" / "student.safetensors") in said
    assert f"selfforcing-dfd study --plan {plan} --starts" in said
    assert main(["study", "--plan", str(plan), "--starts"]) == 0
    before = load_network(tmp_path / "one" / "student.safetensors")
    after = load_network(tmp_path / "two" / "student.safetensors")
    weights = dict(before.named_parameters())
    assert any(not weight.equal(weights[name]) for name, weight in after.named_parameters())
    assert (tmp_path / "two" / "fake.safetensors").exists()
    made = (tmp_path / "two" / "student.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["study", "--plan", str(plan), "--starts"]) == 0
    assert f"{tmp_path / 'two'} is there" in capsys.readouterr().out
    assert (tmp_path / "two" / "student.safetensors").stat().st_mtime_ns == made


def test_a_plan_that_makes_no_starts_says_so(plan: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a command that does nothing without a word, and options that it would ignore."""
    assert main(["study", "--plan", str(plan), "--starts"]) == EXIT_USER_ERROR
    assert "does not say how its starts are made" in capsys.readouterr().err
    assert main(["study", "--plan", str(plan), "--starts", "--known"]) == EXIT_USER_ERROR
    assert "--starts only makes starts" in capsys.readouterr().err
    assert load_plan(str(plan)).made == []
