"""Says once in a run on the CPU that other programs hold cores for which its threads wait.

Threads that share a layer wait for the last of them, and spin meanwhile. If one has no core, all
stand still: beside one other program, two threads on two cores took ten times as long as alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from selfforcing_dfd.processes.processor import ProcessorTime, processor_time

logger = logging.getLogger(__name__)

SPAN_S = 20.0  # long enough for a mean over what comes and goes
# of the time; alone it is .01 at most, beside one other program .3 (two threads on two cores)
MUCH = 0.15


@dataclass(slots=True)
class Neighbours:
    """Looks at what the run got of the processor, span by span."""

    threads: int = field(default_factory=torch.get_num_threads)
    since: ProcessorTime = field(default_factory=processor_time)
    told: bool = False

    def look(self) -> None:
        """To be called often. Warns at the end of a span in which the main thread waited much."""
        if self.told or self.threads == 1:
            return
        now = processor_time()
        span = now - self.since
        if span.wall_s < SPAN_S:
            return
        self.since = now
        if (span.waited_share or 0) > MUCH:
            self.told = True
            logger.warning(
                "other programs hold cores that this run needs: it had none in %.0f %% of the last "
                "%.0f s. Its %d threads wait for each other, so fewer may be much faster: stop "
                "it, and go on with OMP_NUM_THREADS=1 and --resume",
                100 * (span.waited_share or 0),
                span.wall_s,
                self.threads,
            )
