"""What a run says where other programs hold its cores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.config import Config
from selfforcing_dfd.processes.processor import ProcessorTime
from selfforcing_dfd.training import neighbours, one_run
from selfforcing_dfd.training.neighbours import SPAN_S, Neighbours

Settings = Callable[..., Config]


def looked(
    monkeypatch: pytest.MonkeyPatch, waited: float | None, threads: int, times: int, every: float
) -> None:
    """Look so often, at spans of so many seconds in which the share `waited` had no core."""
    nothing = ProcessorTime(0, 0, None if waited is None else 0)
    watching = Neighbours(threads=threads, since=nothing)
    for number in range(1, times + 1):
        wall = number * every
        now = ProcessorTime(wall, wall, None if waited is None else waited * wall)
        monkeypatch.setattr(neighbours, "processor_time", lambda now=now: now)
        watching.look()


@pytest.mark.parametrize(
    ("waited", "threads", "times", "every", "warnings"),
    [
        (0.3, 2, 3, SPAN_S, 1),  # once
        (0.3, 2, 3, SPAN_S / 4, 0),  # too short to say
        (0.3, 2, 5, SPAN_S / 4, 1),
        (0.05, 2, 3, SPAN_S, 0),
        (0.3, 1, 3, SPAN_S, 0),  # nothing waits for it
        (None, 2, 3, SPAN_S, 0),  # the system does not say
    ],
)
def test_a_run_that_waits_for_cores_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    waited: float | None,
    threads: int,
    times: int,
    every: float,
    warnings: int,
):
    looked(monkeypatch, waited, threads, times, every)
    assert len(caplog.records) == warnings
    if warnings:
        text = caplog.text
        assert "none in 30 % of the last 20 s" in text
        assert "Its 2 threads" in text
        assert "OMP_NUM_THREADS=1" in text


def test_a_training_looks(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Catches a loop that never looks, or that looks at each update anew."""
    monkeypatch.setattr(neighbours, "SPAN_S", 0.0)
    monkeypatch.setattr(neighbours, "MUCH", -1.0)
    monkeypatch.setattr(one_run, "Neighbours", partial(Neighbours, threads=2))
    run(settings("run.stage=dmd"))
    assert len([each for each in caplog.records if each.name == neighbours.__name__]) == 1
