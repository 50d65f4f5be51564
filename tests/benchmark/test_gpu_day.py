"""The kit for a day on a GPU: its records, its page, and all of it at small sizes on a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.expected import TABLES, Figure
from benchmarks.gpu.page import (
    NOT_MEASURED,
    RESULTS,
    lines_of_tests,
    measured,
    plain,
    read_results,
    render,
)
from benchmarks.gpu.record import AGAIN, LONG_S, Machine, Missing, Record
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.streams import GROUPS, known_options, rehearsed
from benchmarks.gpu.training import MicroBatches
from benchmarks.gpu.unit import counts
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages.base import StageLoss

ROOT = Path(__file__).parents[2]
KIT = ROOT / "benchmarks" / "gpu"
CPU = Machine(torch.device("cpu"), small=True)
FIGURES = [figure for figures in TABLES.values() for figure in figures]


@pytest.fixture(autouse=True)
def known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout may come without its history."""
    monkeypatch.setenv("COMMIT", "abc1234")


def record(folder: Path, limit_s: float = 60, only: str = "", go_on: bool = False) -> Record:
    return Record(folder / "probe.json", "probe", CPU, limit_s, only, go_on)


def fail() -> dict[str, Any]:
    raise ValueError("two\nlines")


def lack() -> dict[str, Any]:
    raise Missing("no such kernel")


def test_a_row_that_fails_does_not_end_the_stage(tmp_path: Path):
    """Catches an hour of a GPU lost to one setting, and a row that is not on disk."""
    rows = record(tmp_path)
    rows.row("a", lambda: {"ms": 2.0})
    rows.row("b", fail)
    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["rows"]["a"]["value"] == {"ms": 2.0}
    assert written["rows"]["b"]["error"] == "ValueError: two\nlines"
    rows.row("c", lack)
    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["rows"]["c"]["missing"] == "no such kernel"
    assert written["machine"]["small"]
    assert written["machine"]["torch"] == torch.__version__


def test_no_row_begins_after_the_limit(tmp_path: Path):
    """Catches a call that outlasts its ten minutes and is ended from outside, results and all."""
    rows = record(tmp_path, limit_s=0)
    rows.row("late", fail)
    assert rows.rows["late"]["missing"] == "no time was left in this call"
    some = record(tmp_path / "other", only="fp8")
    some.row("bf16", fail)
    some.row("fp8, fast", dict)
    assert list(some.rows) == ["fp8, fast"]


def test_a_row_that_is_measured_again_leaves_the_others(tmp_path: Path):
    """Catches a second call that forgets the first, and rows of two machines in one file."""
    first = record(tmp_path)
    first.row("bf16", lambda: {"ms": 1.0})
    first.row("fp8", fail)
    again = record(tmp_path, only="fp8")
    again.row("fp8", lambda: {"ms": 2.0})
    written = json.loads((tmp_path / "probe.json").read_text())
    assert {name: row["value"] for name, row in written["rows"].items()} == {
        "bf16": {"ms": 1.0},
        "fp8": {"ms": 2.0},
    }
    (tmp_path / "probe.json").write_text(json.dumps({**written, "machine": {"device": "another"}}))
    assert record(tmp_path, only="fp8").rows == {}


def test_a_second_call_goes_on_where_the_first_one_ended(tmp_path: Path):
    """Catches a GPU's time spent twice on one row, and a row that no call measures."""
    first = record(tmp_path)
    first.row("done", lambda: {"ms": 1.0})
    first.row("failed", fail)
    first.row("lacking", lack)
    first.row("stopped", partial(hang, 10))
    first.limit_s = 0
    first.row("late", fail)
    first.end()
    assert json.loads((tmp_path / "probe.json").read_text())["complete"] is False
    again = record(tmp_path, go_on=True)
    asked = []
    for name in ("done", "failed", "lacking", "stopped", "late"):
        again.row(name, lambda name=name: asked.append(name) or {"ms": 2.0})
    again.end()
    assert asked == ["stopped", "late"]
    written = json.loads((tmp_path / "probe.json").read_text())
    assert written["complete"] is True
    assert written["rows"]["done"]["value"] == {"ms": 1.0}


def hang(seconds: float) -> dict[str, Any]:
    raise subprocess.TimeoutExpired("a test", seconds, output=b"test_a PASSED")


def test_a_row_that_hangs_says_so_and_is_left_out_later(tmp_path: Path):
    """Catches one row that takes every call of a day, and words of a stopped process that are lost.

    A row is on disk while it runs, for a stage that is stopped from outside.
    """
    rows = record(tmp_path, limit_s=LONG_S + 60)

    def look() -> dict[str, Any]:
        return json.loads((tmp_path / "probe.json").read_text())["rows"]["long"]

    rows.row("long", look)
    assert "did not end" in rows.rows["long"]["value"]["error"]
    rows.row("stopped", partial(hang, 10))
    assert rows.rows["stopped"]["until then"] == "test_a PASSED"
    assert not record(tmp_path, go_on=True).wants("stopped")
    short = record(tmp_path / "other", limit_s=LONG_S - 60)
    short.row("stopped", partial(hang, 10))
    assert record(tmp_path / "other", go_on=True).wants("stopped")


def test_no_row_begins_without_the_time_it_needs(tmp_path: Path):
    """Catches minutes at the end of a call in which a compiler is started for nothing."""
    rows = record(tmp_path, limit_s=50)
    rows.row("stream", fail, needs_s=60)
    assert rows.rows["stream"]["missing"] == "no time was left in this call"
    rows.row("short", dict, needs_s=20)
    assert "value" in rows.rows["short"]


def test_a_figure_that_is_no_number_spoils_its_row_alone(tmp_path: Path):
    """Catches a kernel's NaN that no JSON can hold, and with it the file."""
    rows = record(tmp_path)
    rows.row("broken", lambda: {"error": float("nan")})
    rows.row("whole", lambda: {"ms": 1.0})
    written = json.loads((tmp_path / "probe.json").read_text())["rows"]
    assert "ValueError" in written["broken"]["error"]
    assert written["whole"]["value"] == {"ms": 1.0}


def test_a_device_that_answers_no_more_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Catches one illegal access after which every row of a stage fails."""
    rows = record(tmp_path)
    monkeypatch.setattr(Machine, "responds", lambda machine: False)
    rows.row("fine", dict)
    with pytest.raises(SystemExit) as ended:
        rows.row("broken", fail)
    assert ended.value.code == AGAIN
    assert "error" in json.loads((tmp_path / "probe.json").read_text())["rows"]["broken"]


@pytest.mark.parametrize("turn", ["fake", "student"])
def test_a_training_turn_is_the_mean_over_all_exit_steps(
    turn: str, monkeypatch: pytest.MonkeyPatch
):
    """Catches the rate of a short rollout that is given for the mean one, and a wrong exit step."""
    run = MicroBatches(CPU, compiled=False)
    run.build()
    stage = run.stage
    seen = []

    def loss(turn: str, batch: Any, draw: Draw, student_updates: int) -> StageLoss:
        of_student = partial(draw.in_turn, turn=student_updates)
        seen.append(stage.exits(of_student if turn == "student" else draw.choice)[0])
        return StageLoss(torch.zeros((), requires_grad=True), {})

    monkeypatch.setattr(stage, "loss", loss)
    found = run.turn(turn)
    assert seen == [0, 0, 1, 2, 3]
    by_step = found["micro-batch by exit step, s"]
    assert found["micro-batch, s"] == pytest.approx(sum(by_step) / 4)


def test_every_figure_has_a_stage_and_a_row_that_measures_it():
    """Catches a page that says "not measured" for ever, since a row was renamed."""
    wrong = [
        f"{figure.stage}: {figure.row}"
        for figure in FIGURES
        if figure.stage not in STAGES or figure.row not in GROUPS.get(figure.stage, {figure.row})
    ]
    assert wrong == []
    assert set(GROUPS) <= set(STAGES)
    assert all(float(figure.goal) > 0 for figure in FIGURES if figure.goal)


def results(**rows: Any) -> dict[str, dict[str, Any]]:
    facts = {"device": "NVIDIA H200", "torch": "2.11.0", "cuda": "13.0", "cudnn": 91900}
    machine = {**facts, "commit": "abc1234", "small": False}
    return {
        "probe": {
            "stage": "probe",
            "date": "2030-01-02T03:04:05+00:00",
            "machine": machine,
            "rows": rows,
        }
    }


def test_the_page_says_what_was_measured_and_what_was_not():
    """Catches a figure beside the wrong prediction, and a failure that reads like a gap."""
    found = results(
        copy={"value": {"TB_per_s": 4.2567}},
        **{
            "bf16 4680x1536x8960": {"error": "RuntimeError: out of\nmemory"},
            "fp8 4680x1536x8960, fast accumulation on": {"missing": "no 8-bit floats"},
        },
    )
    page = render(found)
    assert "NVIDIA H200, torch 2.11.0, CUDA 13.0, cuDNN 91900, commit abc1234, 2030-01-02" in page
    assert "| a copy on the device | TB/s | 4.3 | | 4.26 |" in page
    assert "| bf16, 4680 x 1536 x 8960 | TFLOP/s | 620 | | failed |" in page
    assert "| FP8 by rows, fast accumulation | TFLOP/s | | | not available |" in page
    assert "bf16 4680x1536x8960: failed: RuntimeError: out of memory" in page
    assert page.count(NOT_MEASURED) > 30
    found["probe"]["machine"]["small"] = True
    assert "say nothing about a GPU" in render(found)


def test_a_figure_is_found_by_its_path_and_in_its_unit():
    """Catches bytes taken for gigabytes, and a path that ends at another key."""
    figure = Figure("memory", "probe", "copy", ["peak", "reserved"], "GB", factor=1e-9)
    assert measured(figure, results(copy={"value": {"peak": {"reserved": 12.34e9}}})) == "12.3"
    assert measured(figure, results(copy={"value": {"peak": None}})) == NOT_MEASURED
    assert measured(figure, {}) == NOT_MEASURED


@pytest.mark.parametrize(
    ("unit", "value", "wanted"),
    [
        ("FPS", 41.26, "41.3, goal met"),
        ("FPS", 40.0, "40, goal met"),
        ("FPS", 30.0, "30, goal missed by 25 %"),
        ("ms", 39.0, "39, goal met"),
        ("ms", 50.0, "50, goal missed by 25 %"),
        ("GB", 44.0, "44, goal missed by 10 %"),
    ],
)
def test_a_figure_is_held_against_its_goal(unit: str, value: float, wanted: str):
    """Catches a slower stream that meets its goal, and a lower latency that misses it."""
    figure = Figure("what", "probe", "copy", ["x"], unit, goal="40")
    found = results(copy={"value": {"x": value}})
    assert measured(figure, found) == wanted
    found["probe"]["machine"]["small"] = True  # a rehearsal has no say in it
    assert measured(figure, found) == wanted.partition(",")[0]


def test_a_row_without_time_is_not_called_unavailable():
    """Catches a page that says of a call's end that a machine cannot do something."""
    figure = Figure("what", "probe", "copy", ["x"])
    found = results(copy={"missing": "no time was left in this call"})
    assert measured(figure, found) == NOT_MEASURED
    assert f"probe, copy: {NOT_MEASURED}: no time was left" in render(found)


def test_messages_name_no_folder_of_one_machine():
    """Catches a page that cannot be committed, for the paths and brackets of a traceback."""
    folder = Path("/", "home", "somebody", "site")
    text = f'File "{folder}/torch/nn.py", line 3:\n a[0](x), 2 TB/s, and/or'
    assert plain(text) == 'File "nn.py", line 3: a[0] (x), 2 TB/s, and/or'


def test_the_committed_page_shows_the_committed_results():
    """Catches a page that was edited by hand, or written from other results."""
    assert (ROOT / "docs" / "gpu.md").read_text() == render(read_results(RESULTS))


def test_the_guide_names_the_stages_that_there_are():
    """Catches a guide to a stage that was renamed."""
    table = (KIT / "README.md").read_text().partition("## A machine")[0]
    named = set(re.findall(r"^\| `([\w-]+)`", table, re.M)) - {"stream-..."}
    assert named - set(STAGES) == set()
    assert set(STAGES) - named - set(GROUPS) - {"train-compile"} == set()


def test_options_of_a_rehearsal_are_known():
    """Catches a stream that is called not available since an option is misspelt."""
    assert {"--attention", "--compile", "--fp8", "--dit-only", "--baseline"} <= known_options()
    words = ["--attention", "fa3-fp8", "--compile", "--text-encoder", "umt5"]
    wanted = ["--attention", "sdpa", "--compile", "--text-encoder", "umt5-small"]
    assert list(rehearsed(words)) == wanted


def test_failed_tests_are_named(tmp_path: Path):
    """Catches tests that fail on the GPU and are counted only, and ones that never ran."""
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'>"
        "<failure message='x != y'>trace</failure></testcase>"
        "<testcase name='c'><skipped message='empty'/></testcase></testsuite></testsuites>"
    )
    found = counts(report)
    assert found == {"passed": 1, "not for this machine": 1, "failed": {"b": "x != y"}}
    lines = list(lines_of_tests({"tests": {"rows": {"test_a.py": {"value": found}}}}))
    assert lines == ["- `test_a.py`: 1 passed, 1 not for this machine, failed: b: x != y"]


@pytest.mark.soak
def test_every_stage_runs_on_a_cpu_at_small_sizes(tmp_path: Path):
    """Catches whatever is mistyped, before a GPU's time is spent. Minutes of a core: 7.

    No row fails; what is not there has a reason that a CPU explains, or an option that is missing.
    A test without a rehearsal asks for CUDA.
    """
    environment = {**os.environ, "PYTHON": sys.executable, "SCRATCH": str(tmp_path / "scratch")}
    out = tmp_path / "results"
    command = ["bash", str(KIT / "dry_run.sh"), str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    found = read_results(out)
    assert set(found) == set(STAGES)
    assert (out / "gpu.md").read_text() == render(found)
    failed = [
        f"{stage}, {name}: {row['error']}"
        for stage, result in found.items()
        for name, row in result["rows"].items()
        if "error" in row
    ]
    assert failed == []
    missing = {
        row["missing"]
        for result in found.values()
        for row in result["rows"].values()
        if "missing" in row
    }
    assert all(re.search("CUDA|GPU|this version has no", why) for why in missing), missing
    faults = [
        why for row in found["tests"]["rows"].values() for why in row["value"]["failed"].items()
    ]
    assert [fault for fault in faults if "CUDA" not in fault[1]] == []
