"""Whole studies at tiny size: what is run, resumed, kept and shared."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError
from selfforcing_dfd.study import work
from selfforcing_dfd.study.plan import CAUSAL_ROWS, load_plan, runs_of
from selfforcing_dfd.study.results import load_study
from selfforcing_dfd.study.tables import score_table
from selfforcing_dfd.training.exclusive import lock_folders
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.tracking import read_metrics
from tests.study.conftest import make_study

ARMS = ("control", "prefix")
RUNS = [(start, draw, arm) for draw in (0, 1) for start in ("one", "two") for arm in ARMS]


def one_draw(plan: Path) -> None:
    """Half of the runs."""
    plan.write_text(plan.read_text().replace("draws: [0, 1]", "draws: [0]"))


def results_of(folder: Path) -> dict[str, Any]:
    """Every run's result, by its path from `results`."""
    root = folder / "runs" / "results"
    return {
        path.relative_to(root).as_posix(): json.loads(path.read_text())
        for path in sorted(root.glob("*/*/*.json"))
    }


def test_a_study_is_run_once_however_often_it_is_stopped(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Catches a finished run that is trained or measured again, and a stopped one that is lost.

    The process dies in the third run, after its training and before its result.
    """
    every = runs_of(load_plan(str(plan)))
    assert [(run.start, run.draw, run.arm) for run in every] == RUNS
    one_draw(plan)
    measured: list[str] = []
    measure_run = work.measure_run

    def dies(given: Any, run: Any) -> Any:
        measured.append(run.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure_run(given, run)

    monkeypatch.setattr(work, "measure_run", dies)
    with pytest.raises(KeyboardInterrupt):
        work.run_study(str(plan))
    runs = runs_of(load_plan(str(plan)))
    trained = [run for run in runs if (run_folder(run.config) / "student.safetensors").exists()]
    assert len(trained) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json*")}
    before |= {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}

    assert main(["study", "--plan", str(plan)]) == 0
    assert len(runs) == 4
    assert sorted(measured) == sorted([run.name for run in runs] + [runs[2].name])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for run in runs:
        lines = read_metrics(run_folder(run.config) / "metrics.jsonl")
        assert [line["kind"] for line in lines] == ["fake", "student"] * 2
    capsys.readouterr()

    assert main(["study", "--plan", str(plan)]) == 0
    assert len(measured) == 5
    assert "16 results, 16 are there, 0 to make" in capsys.readouterr().out


class Forks:
    """In place of what starts processes anew: forks, which import nothing again.

    What they are given is pickled, as it is for processes of another start.
    """

    @staticmethod
    def Process(target: Callable[..., None], args: tuple[Any, ...]) -> Any:
        given = pickle.dumps((target, args))
        return multiprocessing.get_context("fork").Process(target=go, args=(given,))


def go(given: bytes) -> None:
    gc.disable()  # what the parent left behind is not to be collected in a fork: it crashed
    target, args = pickle.loads(given)
    target(*args)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of one draw, done by two processes; its folder."""
    folder = tmp_path_factory.mktemp("done")
    plan = make_study(folder)
    one_draw(plan)
    with pytest.MonkeyPatch.context() as patch:
        started = SimpleNamespace(get_context=lambda kind: Forks)
        patch.setattr(work, "multiprocessing", started)
        patch.setattr(work, "POLL_S", 0.2)
        assert main(["study", "--plan", str(plan), "--jobs", "2"]) == 0
    return folder


def test_results_hold_the_way_of_a_run(done: Path):
    """Catches a result without what made it, and costs that are not those up to the point."""
    results = results_of(done)
    assert len(results) == 4
    one = results["one/0/prefix.json"]
    assert [point["student_update"] for point in one["points"]] == [1, 2]
    lines = read_metrics(done / "runs/runs/one/0/prefix/metrics.jsonl")
    spent = [line["core_seconds"] for line in lines]
    assert [point["core_seconds"] for point in one["points"]] == [sum(spent[:2]), sum(spent)]
    assert one["threads"] == 1
    assert set(one["weights"]) == {"student", "fake", "teacher"}
    assert len(one["log"]["gap"]) == len(one["log"]["contrast_ratio"]) == 2
    assert len(one["stream"]) == 2
    assert "stream" not in results["one/0/control.json"]
    assert (
        results["two/0/prefix.json"]["data"] == one["data"] != results["one/0/control.json"]["data"]
    )
    assert results["two/0/prefix.json"]["weights"]["student"] != one["weights"]["student"]
    files = [done / "runs" / "results" / "one" / f"{name}.json" for name in CAUSAL_ROWS]
    rows = [json.loads(file.read_text())["row"]["scores"] for file in files]
    assert all(rows.count(row) == 1 for row in rows)  # the same weights, sampled in four ways
    assert not (done / "runs/runs/one/0/prefix/checkpoints").exists()


def test_the_page_shows_the_numbers_in_the_repository(done: Path):
    """Catches a page that shows other numbers than the file beside it, or leaves an arm out.

    The arm that starts from stored noise pays for it, and a fresh checkout writes the same page.
    """
    results = results_of(done)
    study = load_study(done / "docs" / "study" / "plan.json")
    noise = json.loads((done / "shards-made" / "noise.json").read_text())["core_seconds"]
    for run in study.runs:
        points = results[f"{run.start}/{run.draw}/{run.arm}.json"]["points"]
        before = noise if run.arm == "prefix" else 0
        spent = [point["core_seconds"] + before for point in points]
        assert run.core_seconds == pytest.approx(spent, abs=1e-4)
        assert run.gflop == sorted(run.gflop)
        scores = [point["row"]["scores"]["coverage"]["value"] for point in points]
        assert run.scores["coverage"] == pytest.approx(scores, abs=1e-4)
    page = (done / "docs" / "study.md").read_text()
    for line in score_table(study, "updates"):
        assert f"| {' | '.join(line)} |" in page
    for name in ("data", "teacher", "causal", "start", "control", "prefix", "prefix_first"):
        assert f"\n| {name} |" in page
    for name in CAUSAL_ROWS:
        assert f"\n- `{name}`: " in page
        assert f"\n| {name} |" in page
    assert "| control | 3 | `run.stage=dmd` |" in page
    assert (done / "docs/study/trajectories.svg").stat().st_size > 5000
    (done / "runs").rename(done / "elsewhere")
    assert main(["study", "--plan", str(done / "plan.yaml"), "--tables-only"]) == 0
    (done / "elsewhere").rename(done / "runs")
    assert (done / "docs" / "study.md").read_text() == page


def test_a_result_of_other_settings_or_weights_is_refused(
    done: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches runs of old and new weights in one table."""
    command = ["study", "--plan", str(done / "plan.yaml"), "--only", "control"]
    text = (done / "plan.yaml").read_text()
    (done / "plan.yaml").write_text(text.replace("updates: 2\n", "updates: 3\n", 1))
    assert main(command) == EXIT_USER_ERROR
    printed = capsys.readouterr().err
    assert "run.student_updates: there 2, now 3" in printed
    assert "delete" in printed
    (done / "plan.yaml").write_text(text)
    student = done / "one" / "student.safetensors"
    before = student.read_bytes()
    student.write_bytes((done / "two" / "student.safetensors").read_bytes())
    assert main(command) == EXIT_USER_ERROR
    assert "start.json was made in another way, student: there" in capsys.readouterr().err
    student.write_bytes(before)
    assert main(command) == 0
    assert main([*command[:-1], "prefix"]) == 0  # references belong to no arm


def test_a_setting_that_came_later_had_its_default(done: Path, capsys: pytest.CaptureFixture[str]):
    """Catches hours of runs that a new setting makes worthless, and one that was not as now."""
    result = done / "runs/results/one/0/control.json"
    before = result.read_text()
    older = json.loads(before)
    del older["settings"]["gan.weight"]
    result.write_text(json.dumps(older))
    command = ["study", "--plan", str(done / "plan.yaml"), "--only", "control"]
    assert main(command) == 0
    older["settings"]["gan.weight"] = 0.5
    result.write_text(json.dumps(older))
    assert main(command) == EXIT_USER_ERROR
    assert "gan.weight: there 0.5, now 0.0" in capsys.readouterr().err
    result.write_text(before)


def test_a_run_that_another_process_does_is_left_to_it(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches two processes that train one run: the second takes the next one."""
    one_draw(plan)
    first = runs_of(load_plan(str(plan)))[0]
    with lock_folders(run_folder(first.config)):
        assert main(["study", "--plan", str(plan), "--only", "control"]) == 0
    assert "one, draw 0, control: another process does it" in capsys.readouterr().out
    assert not first.result.exists()
    assert list(results_of(tmp_path)) == ["two/0/control.json"]


def test_a_run_that_fails_does_not_stop_the_others(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches a night's study that ends at its first bad arm, and a failure nobody hears of."""
    one_draw(plan)
    fake = tmp_path / "one" / "fake.safetensors"
    broken = bytearray(fake.read_bytes())
    broken[-4:] = b"\x00\x00\xc0\x7f"  # not a number
    fake.write_bytes(broken)
    assert main(["study", "--plan", str(plan), "--only", "control"]) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert "1 of 14 results failed, the first: one, draw 0, control: " in captured.err
    assert list(results_of(tmp_path)) == ["two/0/control.json"]


def test_a_run_begun_with_other_weights_is_not_measured_as_one_of_these(
    done: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches weights that were replaced after a run was trained and before it was measured.

    Other clips to measure with are no reason to refuse the training.
    """
    plan = done / "plan.yaml"
    result = done / "runs/results/two/0/control.json"
    before = result.read_bytes()
    result.unlink()
    student = done / "two" / "student.safetensors"
    weights = student.read_bytes()
    student.write_bytes((done / "one" / "student.safetensors").read_bytes())
    run = runs_of(load_plan(str(plan)), ["control"])[1]
    with pytest.raises(UserError, match=r"begun\.json was made in another way, student: there"):
        work.make_run(load_plan(str(plan)), run, measure_only=True)
    student.write_bytes(weights)
    fewer = dataclasses.replace(load_plan(str(plan)), clips=4)
    again = work.make_run(fewer, runs_of(fewer, ["control"])[1], measure_only=True)
    assert again is not None
    assert again["points"][0]["row"]["scores"]["valid"]["n"] == 4
    result.write_bytes(before)
    capsys.readouterr()


def test_a_run_of_an_older_version_is_measured(done: Path):
    """Catches hours of training that a study throws away because they have no record yet."""
    plan = load_plan(str(done / "plan.yaml"))
    run = runs_of(plan, ["control"])[0]
    folder = run_folder(run.config)
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"
    (folder / "run.json").rename(folder / "away.json")
    fewer = dataclasses.replace(plan, clips=4)
    assert work.make_run(fewer, runs_of(fewer, ["control"])[0], measure_only=False) is not None
    assert not (folder / "run.json").exists()
    (folder / "away.json").rename(folder / "run.json")


def test_only_what_is_trained_is_measured_on_request(plan: Path, tmp_path: Path):
    """Catches --measure-only that trains."""
    with pytest.raises(UserError, match="no arm nothing; the arms are control, prefix"):
        work.run_study(str(plan), ["nothing"])
    assert work.run_study(str(plan), measure_only=True) == ""
    assert results_of(tmp_path) == {}
    assert (tmp_path / "runs/results/teacher.json").exists()
