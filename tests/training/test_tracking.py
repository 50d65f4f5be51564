"""Curves without gaps or duplicates, in the file and in the trackers."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selfforcing_dfd.common import shipped
from selfforcing_dfd.training.clock import Clock
from selfforcing_dfd.training.tracking import Tracker, TrackingError, read_metrics


def log_updates(tracker: Tracker, updates: range) -> None:
    for update in updates:
        tracker.log("fake", update, {"loss": update + 0.25}, update)
        tracker.log("student", update, {"loss": update / 3}, update)


def after(updates: int) -> Clock:
    """The clock after so many cycles of one fake-score turn."""
    return Clock(student_updates=updates, fake_updates=updates)


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    """Catches buffered writes: a killed run would lose the very lines that say why it died."""
    tracker = Tracker(tmp_path / "run")
    tracker.log("student", 1, {"loss": 1 / 3, "grad_norm": 2}, 1)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [
        {"kind": "student", "count": 1, "student_update": 1, "loss": 1 / 3, "grad_norm": 2.0}
    ]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """Catches NaN and Infinity in the file, which no strict JSON reader accepts."""
    tracker = Tracker(tmp_path)
    tracker.log("student", 1, {"a": math.nan, "b": math.inf, "c": 1.0}, 1)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == (None, None, 1.0)


def test_a_resumed_run_has_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Catches appending after a resume.

    Updates between the checkpoint and the kill would be there twice.
    """
    whole = Tracker(tmp_path / "whole")
    log_updates(whole, range(1, 7))
    log_updates(Tracker(tmp_path / "cut"), range(1, 6))
    resumed = Tracker(tmp_path / "cut")
    resumed.open(resume_at=after(3))
    log_updates(resumed, range(4, 7))
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a resume that fails on, or glues its first line to, the half line of a killed run."""
    log_updates(Tracker(tmp_path), range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    resumed = Tracker(tmp_path)
    with caplog.at_level(logging.WARNING):
        resumed.open(resume_at=after(2))
    resumed.log("student", 3, {}, 3)
    assert "cut short" in caplog.text
    assert [line["student_update"] for line in read_metrics(path)] == [1, 1, 2, 3]


def test_a_stop_in_mid_cycle_loses_no_line(tmp_path: Path) -> None:
    """Catches lines keyed by student updates: fake turns of an unfinished cycle were dropped.

    They are never made again. Older files do not state the count, and it follows from the order.
    """
    for states_count in (True, False):
        folder = tmp_path / str(states_count)
        tracker = Tracker(folder)
        log_updates(tracker, range(1, 3))
        for count in (3, 4, 5):
            tracker.log("fake", 3, {"loss": 0.5}, count)
        tracker.close()
        path = folder / "metrics.jsonl"
        if not states_count:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                del line["count"]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        resumed = Tracker(folder)
        resumed.open(resume_at=Clock(student_updates=2, fake_updates=4))
        kinds = [(line["kind"], line["student_update"]) for line in read_metrics(path)]
        assert kinds == [
            ("fake", 1),
            ("student", 1),
            ("fake", 2),
            ("student", 2),
            *[("fake", 3)] * 2,
        ]


def test_what_a_power_cut_leaves_is_left_out(tmp_path: Path) -> None:
    """Catches a run that cannot go on: where the last block never reached the disk, it is NULs."""
    log_updates(Tracker(tmp_path), range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9] + bytes(4096))
    Tracker(tmp_path).open(resume_at=after(2))
    assert [line["count"] for line in read_metrics(path)] == [1, 1, 2]


@pytest.mark.parametrize("damage", ["{broken\n", '{"kind": "student"}\n', "3\n"])
def test_other_damage_is_an_error_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    """Catches a resume that rewrites the file without the lines it could not read."""
    log_updates(Tracker(tmp_path), range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(damage + path.read_text())
    before = path.read_bytes()
    with pytest.raises(TrackingError, match=r"metrics.jsonl, line 1: "):
        Tracker(tmp_path).open(resume_at=after(1))
    assert path.read_bytes() == before


def test_a_new_run_refuses_the_folder_of_another(tmp_path: Path) -> None:
    """Catches two runs in one curve, and a new run that empties an old one's file."""
    log_updates(Tracker(tmp_path), range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(TrackingError, match="already holds a run's metrics"):
        Tracker(tmp_path).open()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_metric_cannot_take_the_place_of_the_update(tmp_path: Path) -> None:
    """Catches a metric called student_update, by which a resume would sort the lines."""
    with pytest.raises(ValueError, match="may not be called student_update"):
        Tracker(tmp_path).log("student", 1, {"student_update": 7.0}, 1)


def test_tensorboard_shows_each_update_once_after_a_resume(tmp_path: Path) -> None:
    """Catches event files without a purge step: TensorBoard would draw both branches."""
    for resume_at, updates in ((None, range(1, 6)), (after(3), range(4, 7))):
        tracker = Tracker(tmp_path, trackers=["tensorboard"])
        tracker.open(resume_at)
        log_updates(tracker, updates)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("student/loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
    assert [point.value for point in points] == [torch.tensor(u / 3).item() for u in range(1, 7)]


def test_tensorboard_keeps_turns_of_a_cycle_that_a_stop_broke_off(tmp_path: Path) -> None:
    """Catches curves that lose the fake-score turns before a stop, which are never run again."""
    tracker = Tracker(tmp_path, trackers=["tensorboard"])
    log_updates(tracker, range(1, 3))
    tracker.log("fake", 3, {"loss": 3.25}, 3)
    tracker.close()
    tracker.open(Clock(student_updates=2, fake_updates=3))
    tracker.log("student", 3, {"loss": 1.0}, 3)
    log_updates(tracker, range(4, 5))
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("fake/loss")
    assert [(point.step, point.value) for point in points] == [(u, u + 0.25) for u in range(1, 5)]


def test_tensorboard_shows_pictures(tmp_path: Path) -> None:
    """Catches images with their axes in another order than TensorBoard is told."""
    tracker = Tracker(tmp_path, trackers=["tensorboard"])
    assert not tracker.takes_pictures
    tracker.open()
    assert tracker.takes_pictures
    tracker.log_pictures(3, {"samples": torch.zeros(2, 8, 32, 3, dtype=torch.uint8)})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (picture,) = events.Images("samples")
    assert picture.step == 3
    assert (picture.height, picture.width) in ((8, 64), (16, 32))  # both clips in one picture


def test_trackers_are_imported_only_when_asked_for(tmp_path: Path) -> None:
    """Catches an import at the top: TensorBoard takes a second, and a tracker may be missing."""
    code = (
        "import sys; from selfforcing_dfd.training.tracking import Tracker; "
        "Tracker(sys.argv[1]).log('student', 1, {}, 1); "
        "assert not {'accelerate.tracking', 'tensorboard', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", r"wandb, which is not installed: pip install 'selfforcing_dfd\[track\]'"),
        ("tensorbored", r"names 'tensorbored'; accelerate knows aim, .*tensorboard"),
    ],
)
def test_a_tracker_that_is_not_there_is_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    """Catches a run that fails at its first line, hours later, or silently goes without."""
    without = [one for one in tracking.get_available_trackers() if one != "wandb"]
    monkeypatch.setattr(tracking, "_available_trackers", without)
    with pytest.raises(TrackingError, match=message):
        Tracker(tmp_path, trackers=["tensorboard", name])


class Recorder(GeneralTracker):
    """A tracker of another house: keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False
    made: list["Recorder"] = []

    def __init__(self, project: str) -> None:
        super().__init__()
        self.project = project
        self.calls: list[Any] = []
        self.made.append(self)

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    def start(self) -> None:
        self.calls.append("start")

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


def test_any_tracker_of_accelerate_gets_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches glue for two trackers only, NaN made null, and names that MLflow refuses."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    tracker = Tracker(tmp_path, trackers=["recorder", "recorder"], project="shapes")
    tracker.log("student", 1, {"loss": 0.5, "loss/sigma<=0.3": math.inf}, 1)
    tracker.close()
    (recorder,) = Recorder.made
    assert recorder.project == "shapes"
    curves = {"student/loss": 0.5, "student/loss/sigma up to 0.3": math.inf}
    assert recorder.calls == ["start", (1, curves), "finish"]


FAKE_WANDB = """
import json, os
class Run:
    def write(self, *what):
        with open(os.environ["WANDB_CALLS"], "a") as file:
            file.write(json.dumps(what) + chr(10))
    def define_metric(self, *names, **options): self.write("define_metric", names, options)
    def log(self, values, step=None): self.write("log", values, step)
    def finish(self): self.write("finish")
def init(**options):
    run = Run()
    run.write("init", options)
    return run
"""


def test_wandb_goes_on_with_the_curves_of_a_resumed_run(tmp_path: Path) -> None:
    """Catches a new wandb run at each resume, and wandb's step, which drops what comes twice."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(FAKE_WANDB)
    (tmp_path / "wandb-0.20.0.dist-info").mkdir()
    (tmp_path / "wandb-0.20.0.dist-info" / "METADATA").write_text("Name: wandb\nVersion: 0.20.0\n")
    code = (
        "import sys; from selfforcing_dfd.training.tracking import Tracker\n"
        "from selfforcing_dfd.training.clock import Clock\n"
        "for at in (None, Clock(student_updates=1)):\n"
        "    tracker = Tracker(sys.argv[1], trackers=['wandb'], project='shapes')\n"
        "    tracker.open(at); tracker.log('fake', 2, {'loss': 0.5}, 2); tracker.close()"
    )
    path = os.pathsep.join([str(tmp_path), str(shipped("."))])
    environment = {"PYTHONPATH": path, "WANDB_CALLS": str(tmp_path / "calls")}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(command, env=os.environ | environment, check=True)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    wanted = ["init", "define_metric", "log", "finish"]
    assert [call[0] for call in calls] == wanted * 2
    assert calls[0] == calls[4]
    options = calls[0][1]
    assert (options["project"], options["name"], options["resume"]) == ("shapes", "run", "allow")
    assert calls[1][1:] == [["*"], {"step_metric": "student_update"}]
    assert calls[2][1:] == [{"student_update": 2, "fake/loss": 0.5}, None]
