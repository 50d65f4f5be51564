"""One stream made by several processes, each on a GPU of its own.

All of them run the same session and share each sequence by heads
(`models/sequence_parallel.py`). The first one writes the frames, shows the status and listens to
commands, and tells the others before each chunk what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO, TypeVar

from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.network import WanNetwork
from selfforcing_dfd.models.sequence_parallel import SequenceParallel
from selfforcing_dfd.processes.failure import ending_together, launched
from selfforcing_dfd.processes.ranks import are_many, is_first, on_first_rank

T = TypeVar("T")

TIMEOUT_S = 600.0
"""A process that waits longer for another inside of a chunk gives up."""


@dataclass(frozen=True, slots=True)
class StreamRanks:
    """The processes of a stream; there may be one alone."""

    is_first: bool = True
    is_shared: bool = False

    def share(self, student: WanNetwork) -> None:
        """Spread the student's sequences over all processes.

        Raises UserError for a number of processes that does not divide the heads.
        """
        if self.is_shared:
            student.share_sequence(SequenceParallel())

    def agree(self, own: T) -> T:
        """What the first process has."""
        return on_first_rank(lambda: own) if self.is_shared else own


ALONE = StreamRanks()


@contextmanager
def stream_ranks(device: str) -> Iterator[tuple[StreamRanks, str]]:
    """(the processes that torchrun started, this one's device), until the `with` ends.

    device: as asked for. One process alone gets it back, and nothing is set up.
    """
    if not launched():
        yield ALONE, device
        return
    # accelerate takes a second to import
    from selfforcing_dfd.processes.world import joined

    with ending_together(), joined(device, TIMEOUT_S) as world:
        yield StreamRanks(is_first(), are_many()), str(world.device)


def refuse_ranks(what: str) -> None:
    """Raise UserError where torchrun started several processes for what one process does."""
    if launched():
        raise UserError(
            f"{what} runs in one process, but WORLD_SIZE is {os.environ['WORLD_SIZE']}; "
            "start it without torchrun"
        )


@contextmanager
def shown_by(ranks: StreamRanks, stream: TextIO) -> Iterator[TextIO]:
    """The stream for the first process, nowhere for the others."""
    if ranks.is_first:
        yield stream
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        yield nowhere
