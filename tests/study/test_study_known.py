"""Runs that the repository knows are taken from there, and only if they would be made alike."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from test_study_runs import one_draw, results_of

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR
from selfforcing_dfd.study.known import difference, repeated
from selfforcing_dfd.study.measure import in_short, provenance
from selfforcing_dfd.study.plan import StudyRun, load_plan, runs_of
from selfforcing_dfd.study.results import Trajectory, between, load_study
from selfforcing_dfd.study.work import prepare


def test_known_runs_are_taken_and_the_others_made(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches a known run that is made again, another's numbers, and a page that changes by it."""
    one_draw(plan)
    starts = f"{{one: {tmp_path}/one, two: {tmp_path}/two}}"
    plan.write_text(plan.read_text().replace(starts, f"{{one: {tmp_path}/one}}"))
    command = ["study", "--plan", str(plan)]
    assert main([*command, "--known"]) == EXIT_USER_ERROR
    assert "so no run is known; drop --known" in capsys.readouterr().err
    assert main(command) == 0
    numbers = tmp_path / "docs" / "study" / "plan.json"
    page = (tmp_path / "docs" / "study.md").read_text()
    before = load_study(numbers)
    shutil.rmtree(tmp_path / "runs")
    text = numbers.read_text()
    content = json.loads(text)
    lost = content["runs"][1]
    lost["made"]["settings"]["score.guidance"] = 0.5  # so nobody knows the plan's
    numbers.write_text(json.dumps(content))
    capsys.readouterr()
    assert main([*command, "--known"]) == 0
    told = capsys.readouterr().out
    assert f"taken from {numbers}: 1; refused: 1" in told
    trained = sorted((tmp_path / "runs" / "runs").glob("*/*/*/student.safetensors"))
    assert [path.parent.name for path in trained] == [lost["arm"]]
    assert len(results_of(tmp_path)) == 2
    after = load_study(numbers)
    for old, new in zip(before.runs, after.runs, strict=True):
        assert (old.scores, old.updates, old.gflop) == (new.scores, new.updates, new.gflop)
        assert (old.logged, old.stream, old.made) == (new.logged, new.stream, new.made)
    assert (tmp_path / "docs" / "study.md").read_text().count("\n") == page.count("\n")


def test_a_run_that_would_be_made_in_another_way_is_refused(plan: Path, tmp_path: Path):
    """Catches numbers of other settings or weights, and of a version that did not say what made it.

    A setting that came later had its default before.
    """
    prepare(load_plan(str(plan)))
    run = runs_of(load_plan(str(plan)))[0]
    known = known_trajectory(run)
    assert difference(run, known) == ""
    later = deepcopy(known)
    del later.made["settings"]["score.guidance"]
    assert "score.guidance" in difference(run, later)
    other = deepcopy(known)
    other.made["settings"]["score.guidance"] = 0.5
    assert "score.guidance" in difference(run, other)
    other = deepcopy(known)
    other.made["weights"]["student"] = "0"
    assert "student" in difference(run, other)
    other = deepcopy(known)
    other.made["data"] = "0"
    assert difference(run, other) == "the shards hold other clips"
    assert difference(run, replace(known, made={})) == "it is not known what made it"
    early = replace(known, updates=[2])
    assert difference(run, early) == "it was measured at [2], the plan wants [1, 2]"
    assert difference(replace(run, streams=True), known) == "it has no streams"


def test_what_was_logged_comes_back_as_its_means():
    """Catches means that move to other updates."""
    logged: dict[str, list[float | None]] = {"gap": [1.0, 2.0, None]}
    run = Trajectory("one", 0, "prefix", [2, 5, 6], [0, 0, 0], [0, 0, 0], {}, logged=logged)
    assert between(repeated(run, "gap"), run.updates) == [1.0, 2.0, None]


def known_trajectory(run: StudyRun) -> Trajectory:
    """A run as the repository has it, without scores."""
    made = in_short(provenance(run.config))
    return Trajectory(run.start, run.draw, run.arm, [1, 2], [0, 0], [0, 0], {}, made=made)
