"""What a run got of the processor: on a busy machine its pace is that of its neighbours."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

SCHEDULER = Path("/proc/self/schedstat")
"""Linux: nanoseconds that the main thread ran, that it was ready and had no core, and a count."""


@dataclass(frozen=True, slots=True)
class ProcessorTime:
    """Seconds of a span of time.

    busy_s: of all threads together. waited_s: in which the main thread was ready and had no core;
    None where the system does not say, which is everywhere but on Linux.
    """

    wall_s: float
    busy_s: float
    waited_s: float | None

    @property
    def waited_share(self) -> float | None:
        return None if self.waited_s is None else self.waited_s / self.wall_s

    def __sub__(self, before: ProcessorTime) -> ProcessorTime:
        """The span between two readings."""
        waited = None
        if self.waited_s is not None and before.waited_s is not None:
            waited = self.waited_s - before.waited_s
        return ProcessorTime(self.wall_s - before.wall_s, self.busy_s - before.busy_s, waited)


def processor_time() -> ProcessorTime:
    """A reading; two of them make a span."""
    waited = None
    if SCHEDULER.exists():
        waited = int(SCHEDULER.read_text().split()[1]) / 1e9
    return ProcessorTime(time.perf_counter(), time.process_time(), waited)
