"""Studies of students that make a clip at once, and studies without the goal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_effects import with_own_controls

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.config import ConfigError
from selfforcing_dfd.study.goal import GOAL
from selfforcing_dfd.study.plan import load_plan, runs_of
from selfforcing_dfd.study.results import load_study
from selfforcing_dfd.study.tables import sections, summary
from tests.study.conftest import one_run_each

WHOLE = "chunk_frames: 6"  # the only chunk is the clip


def test_students_of_whole_clips_have_a_study(plan: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a stream or a follow test of a student that has no past, and a judgment by them."""
    one_run_each(
        plan,
        """
  control: {set: [run.stage=dmd]}
  noised_real: {set: [dfd.pairing=noised_real], control: control, paper: some number}
""",
        WHOLE,
    )
    assert main(["study", "--plan", str(plan)]) == 0
    told = capsys.readouterr().out
    assert "`noised_real` against `control`: one pair of runs, too few to say." in told
    document = plan.parent / "docs" / "study.md"
    text = document.read_text()
    assert "## Each arm against the one that it changes" in text
    assert "## Free streaming" not in text
    assert "goal" not in text
    study = load_study(plan.parent / "docs" / "study" / "plan.json")
    assert len(study.runs) == 2
    assert all("follow" not in run.scores for run in study.runs)
    assert list(study.starts["one"]) == ["start"], "a causal teacher is no reference here"
    assert study.start_streams == {"one": []}


def test_a_student_of_whole_clips_cannot_stream(plan: Path):
    """Catches an error in the middle of a study."""
    one_run_each(plan, "  control: {set: [run.stage=dmd], stream: true}\n", WHOLE)
    with pytest.raises(ConfigError, match="arm control has stream: true, but makes a clip at once"):
        runs_of(load_plan(str(plan)))


def test_a_study_without_the_goal_begins_with_what_arms_showed():
    """Catches a verdict by a goal that the plan does not have."""
    study = dataclasses.replace(with_own_controls(), goal=False)
    parts = list(sections(study))
    assert parts[2] == "## Each arm against the one that it changes"
    assert GOAL not in parts
    assert parts.count("## Each arm against the one that it changes") == 1
    assert "- `short` against `short_control`" in summary(study)
    judged = list(sections(dataclasses.replace(study, goal=True)))
    assert GOAL in judged
    assert judged.count("## Each arm against the one that it changes") == 1
