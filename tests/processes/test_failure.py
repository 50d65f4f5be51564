"""Several processes end together, with one message that names the rank at fault."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launcher import LIMIT_S, launch, said

from selfforcing_dfd.common import Interrupted, UserError
from selfforcing_dfd.processes import failure
from selfforcing_dfd.processes.failure import ending_together
from selfforcing_dfd.processes.ranks import add_up, on_first_rank
from selfforcing_dfd.processes.world import World, joined


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that look for each other more often than in a real run, and leave sooner."""
    monkeypatch.setattr(failure, "POLL_S", 0.2)
    monkeypatch.setattr(failure, "GRACE_S", 1.0)
    monkeypatch.setattr(failure, "LEAVE_S", 2.0)


def test_an_error_on_one_rank_ends_all_with_one_message(tmp_path: Path) -> None:
    """Catches ranks that wait for ever for one that failed, and the same error from each."""

    def work(world: World) -> None:
        add_up([1.0])
        if world.rank == 1:
            raise UserError("data/shards is gone")
        add_up([1.0])

    ends = launch(3, tmp_path, work)
    assert said(ends) == ["error: rank 1 of 3: data/shards is gone"]
    assert [code for code, _ in ends][1] == 2
    assert 0 not in [code for code, _ in ends]


def test_an_error_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    """Catches 64 copies of one message about a setting."""

    def work(world: World) -> None:
        raise UserError("run.stage is nonsense")

    ends = launch(3, tmp_path, work)
    (line,) = said(ends)
    assert line.endswith("run.stage is nonsense")


def test_an_error_while_others_wait_for_the_first_rank(tmp_path: Path) -> None:
    """Catches ranks that wait for data that the first one fails to make."""

    def work(world: World) -> None:
        def make() -> None:
            raise UserError("the disk is full")

        on_first_rank(make)

    (line,) = said(launch(2, tmp_path, work))
    assert line.endswith("of 2: the disk is full")


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    """Catches "connection reset by peer" as all that is said of a rank that ran out of memory."""

    def work(world: World) -> None:
        add_up([1.0])
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        add_up([1.0])

    ends = launch(3, tmp_path, work)
    assert ends[1][0] == -signal.SIGKILL
    (line,) = said(ends)
    assert "rank 1 ended without a word: killed, or out of memory" in line


def test_a_hanging_rank_is_named_after_the_timeout(tmp_path: Path) -> None:
    """Catches a run that hangs for ever, or ends without saying which rank was stuck where."""

    def work(world: World) -> None:
        add_up([1.0])
        if world.rank == 1:
            time.sleep(LIMIT_S)
        add_up([1.0])

    ends = launch(2, tmp_path, work, timeout_s=3)
    (line,) = said(ends)
    assert "waited too long for other ranks: rank 1 is in work, " in line
    assert __file__ in line
    assert 0 not in [code for code, _ in ends]


def test_an_interruption_of_all_is_said_once(tmp_path: Path) -> None:
    """Catches "stopped and saved" from every rank, and a failure where there is none."""

    def work(world: World) -> None:
        add_up([1.0])
        raise Interrupted("stopped and saved")

    ends = launch(2, tmp_path, work)
    assert [code for code, _ in ends] == [130, 130]
    assert [errors for _, errors in ends] == ["stopped and saved", ""]


def test_waiting_for_the_first_rank_has_no_timeout(tmp_path: Path) -> None:
    """Catches hours of data preparation that are taken for a hanging rank."""

    def work(world: World) -> None:
        on_first_rank(lambda: time.sleep(4))
        assert add_up([1.0]) == [2.0]

    assert [code for code, _ in launch(2, tmp_path, work, timeout_s=2)] == [0, 0]


def test_one_process_of_a_launcher_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a process group, or a wait for others, where there is a single process."""
    for size in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with ending_together(), joined("cpu", 1) as world:
            assert world == World(device=torch.device("cpu"))
            assert not dist.is_initialized()


def test_several_processes_without_a_launcher_are_told_to_use_one(tmp_path: Path) -> None:
    """Catches a traceback, or a run of each process alone, where WORLD_SIZE is set by hand."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": "1"}
    try:
        with pytest.raises(UserError, match=r"WORLD_SIZE is 2.*MASTER_ADDR.*torchrun"):
            ending_together().__enter__()
    finally:
        del os.environ["WORLD_SIZE"], os.environ["RANK"]
