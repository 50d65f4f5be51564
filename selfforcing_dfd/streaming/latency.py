"""Times the stages of a chunk without making the device wait.

On a CPU by the host's clock, on a GPU by events in its queue of work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

Mark = float | torch.cuda.Event


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds of one chunk.

    total_ms: from the start of work on the chunk to its last video frame on the host.
    first_frame_ms: to its first one. stages_ms: time on the device by stage, in order. `commit` is
    the commit pass of the chunk before. On a GPU it runs while the host waits for frames and adds
    nothing to the latency.
    """

    total_ms: float
    first_frame_ms: float
    stages_ms: dict[str, float]


@dataclass(slots=True)
class StageClock:
    """Times stages that follow one another. Marks on a GPU are read once they have passed."""

    device: torch.device
    _open: list[tuple[str, Mark, Mark]] = field(default_factory=list)

    def now(self) -> Mark:
        """A mark at this place in the device's queue of work."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self._open.append((name, start, self.now()))

    def take(self) -> dict[str, float]:
        """Milliseconds by stage, of the stages that have finished since the last call."""
        finished = [entry for entry in self._open if has_passed(entry[2])]
        self._open = [entry for entry in self._open if entry not in finished]
        totals: dict[str, float] = {}
        for name, start, stop in finished:
            totals[name] = totals.get(name, 0.0) + milliseconds(start, stop)
        return totals


def has_passed(mark: Mark) -> bool:
    return isinstance(mark, float) or mark.query()


def milliseconds(start: Mark, stop: Mark) -> float:
    """Time between two marks of one clock."""
    if isinstance(start, float) and isinstance(stop, float):
        return 1000 * (stop - start)
    assert isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event)
    return start.elapsed_time(stop)
