"""Work of one machine in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from in_processes import doubled

from selfforcing_dfd.common import UserError
from selfforcing_dfd.processes.local import each_in_order


def killed_at_five(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def write_own_number(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def work_for_ever(folder: Path) -> None:
    list(each_in_order(write_own_number, [folder] * 2, 2, "fork"))


def test_results_come_in_order_from_new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches results in the order in which they end, and sums that depend on the machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    try:
        for processes in (1, 2):
            found = list(each_in_order(doubled, range(9), processes))
            assert found == [(2 * number, 1) for number in range(9)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_process_that_is_killed_is_named() -> None:
    """Catches a wait without end where the memory ran out."""
    results = each_in_order(killed_at_five, range(20), 2, "fork")
    with pytest.raises(UserError, match="a process was killed, perhaps for want of memory"):
        list(results)


def is_alive(number: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_processes_end_with_the_first_one(tmp_path: Path) -> None:
    """Catches workers that wait for work for ever after kill -9 of their parent."""
    parent = multiprocessing.get_context("fork").Process(target=work_for_ever, args=(tmp_path,))
    parent.start()
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(workers) == 2
    assert all(map(is_alive, workers))
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, workers))
