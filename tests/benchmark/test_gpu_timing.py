"""The clock of the kit for a GPU, on a stand-in for one: what is queued, and when it waits."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import timing


class Queue:
    """A GPU that notes what it is given. Each call takes a millisecond more than the one before."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def event(self, enable_timing: bool) -> Mark:
        assert enable_timing
        return Mark(self)

    def zero_(self) -> None:
        self.given.append("empty the cache")

    def call(self) -> None:
        self.given.append("call")

    def wait(self, device: torch.device) -> None:
        self.given.append("wait")


class Mark:
    """An event in the queue."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def record(self) -> None:
        self.queue.given.append("mark")
        self.calls = self.queue.given.count("call")

    def elapsed_time(self, end: Mark) -> float:
        assert self.queue.given[-1] == "wait"
        return float(sum(range(self.calls + 1, end.calls + 1)))


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: made)
    return made


def test_calls_are_timed_behind_one_another(queue: Queue):
    """Catches a wait between calls, which counts the host's time in a kernel of microseconds.

    Also a cache that is warm, or emptied within the time, and calls that warm up and are counted.
    """
    ms = timing.milliseconds(queue.call, torch.device("cuda"), repeats=3, warm=2)
    timed = ["empty the cache", "mark", "call", "mark"]
    assert queue.given == ["call", "call", "wait", *timed * 3, "wait"]
    assert ms == 4  # the median of 3, 4 and 5
