"""Curves without gaps or duplicates, and no step on values that are not finite."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selfforcing_dfd import rng
from selfforcing_dfd.training.tracking import (
    NonFiniteError,
    Tracker,
    check_finite,
    read_metrics,
    require_finite,
)


def log_updates(tracker: Tracker, updates: range) -> None:
    for update in updates:
        tracker.log("fake", update, {"loss": update + 0.25})
        tracker.log("student", update, {"loss": update / 3})


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    """Catches buffered writes: a killed run would lose the very lines that say why it died."""
    tracker = Tracker(tmp_path / "run")
    tracker.log("student", 1, {"loss": 1 / 3, "grad_norm": 2})
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [
        {"kind": "student", "student_update": 1, "loss": 1 / 3, "grad_norm": 2.0}
    ]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """Catches NaN and Infinity in the file, which no strict JSON reader accepts."""
    tracker = Tracker(tmp_path)
    tracker.log("student", 1, {"a": math.nan, "b": math.inf, "c": 1.0})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == (None, None, 1.0)


def test_a_resumed_run_has_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Catches appending after a resume: updates between the checkpoint and the kill would be there
    twice.
    """
    whole = Tracker(tmp_path / "whole")
    log_updates(whole, range(1, 7))
    log_updates(Tracker(tmp_path / "cut"), range(1, 6))
    resumed = Tracker(tmp_path / "cut")
    resumed.open(resume_at=3)
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
        resumed.open(resume_at=2)
    resumed.log("student", 3, {})
    assert "cut short" in caplog.text
    assert [line["student_update"] for line in read_metrics(path)] == [1, 1, 2, 3]


@pytest.mark.parametrize("damage", ["{broken\n", '{"kind": "student"}\n', "3\n"])
def test_other_damage_is_an_error_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    """Catches a resume that rewrites the file without the lines it could not read."""
    log_updates(Tracker(tmp_path), range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(damage + path.read_text())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: "):
        Tracker(tmp_path).open(resume_at=1)
    assert path.read_bytes() == before


def test_a_new_run_refuses_the_folder_of_another(tmp_path: Path) -> None:
    """Catches two runs in one curve, and a new run that empties an old one's file."""
    log_updates(Tracker(tmp_path), range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run's metrics"):
        Tracker(tmp_path).open()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_metric_cannot_take_the_place_of_the_update(tmp_path: Path) -> None:
    """Catches a metric called student_update, by which a resume would sort the lines."""
    with pytest.raises(ValueError, match="may not be called student_update"):
        Tracker(tmp_path).log("student", 1, {"student_update": 7.0})


def test_tensorboard_shows_each_update_once_after_a_resume(tmp_path: Path) -> None:
    """Catches event files without a purge step: TensorBoard would draw both branches of the curve."""
    for resume_at, updates in ((None, range(1, 6)), (3, range(4, 7))):
        tracker = Tracker(tmp_path, tensorboard=True)
        tracker.open(resume_at)
        log_updates(tracker, updates)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("student/loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
    assert [point.value for point in points] == [torch.tensor(u / 3).item() for u in range(1, 7)]


def test_sinks_are_imported_only_when_asked_for(tmp_path: Path) -> None:
    """Catches an import at the top: TensorBoard takes a second and wandb is not installed
    everywhere.
    """
    code = (
        "import sys; from selfforcing_dfd.training.tracking import Tracker; "
        "Tracker(sys.argv[1]).log('student', 1, {}); "
        "assert not {'tensorboard', 'wandb'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_wandb_without_its_package_is_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that fails at its first line, after the models were loaded, or silently goes
    without.
    """
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ValueError, match="wandb, which is not installed: pip install wandb"):
        Tracker(tmp_path, wandb_project="dfd")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value: float) -> None:
    """Catches a NaN loss that reaches the optimizer: every weight would be NaN one step later."""
    with pytest.raises(
        NonFiniteError, match=f"loss is {value} at student update 12, fake turn.*Look at"
    ):
        check_finite(torch.tensor(value), [("w", torch.ones(2))], "student update 12, fake turn")
    with pytest.raises(NonFiniteError, match="normaliser is not finite in 1 of 2 values"):
        require_finite("normaliser", torch.tensor([1.0, value]), "student update 12")
    require_finite("loss", 1.0, "student update 12")


def test_the_first_bad_gradient_is_named() -> None:
    """Catches an error that leaves the search to the user; the norm alone only says that something
    is wrong.
    """
    bad = torch.ones(4, 2)
    bad[2, 1] = math.nan
    grads = [
        ("a", torch.ones(3)),
        ("frozen", None),
        ("b.weight", bad),
        ("c", torch.full((2,), math.inf)),
    ]
    with pytest.raises(
        NonFiniteError,
        match=r"gradient of b.weight is not finite in 1 of 8 values at student update 3",
    ):
        check_finite(torch.tensor(1.0), grads, "student update 3")


def test_the_norm_is_that_of_all_gradients_in_float32() -> None:
    """Catches norms summed instead of squared, and a norm rounded to bfloat16, which is off by up
    to .4 %.
    """
    grads = {name: rng.normal((50, 7), 0, name) for name in ("a", "b")}
    norm = check_finite(torch.tensor(1.0), grads.items(), "student update 1")
    by_hand = sum(grad.double().square().sum() for grad in grads.values()) ** 0.5
    assert abs(norm - by_hand) < 1e-6 * by_hand  # float32 rounding is 6e-8 each way
    half = check_finite(
        torch.tensor(1.0), [("w", torch.ones(20000, dtype=torch.bfloat16))], "student update 1"
    )
    assert half.dtype == torch.float32
    assert abs(half - 20000**0.5) < 1e-3


def test_finite_gradients_whose_norm_overflows_are_an_error() -> None:
    """Catches clipping by an infinite norm, which multiplies every gradient by zero and passes
    unseen.
    """
    with pytest.raises(NonFiniteError, match="norm over 1 gradients overflows"):
        check_finite(torch.tensor(1.0), [("w", torch.full((4,), 3e38))], "student update 1")


def test_a_turn_without_gradients_is_an_error() -> None:
    """Catches a step on nothing: a detached loss has no gradient anywhere, and AdamW would quietly
    do nothing.
    """
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        check_finite(torch.tensor(1.0), [("w", None)], "student update 1")
