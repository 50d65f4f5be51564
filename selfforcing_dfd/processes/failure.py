"""Several processes end together: one fails, all stop, and one message names the rank.

A thread in each process tells the others that its process is alive and looks for a failure among
them. It can do so while the main thread waits for a message that will never come. The processes
meet through the store of torchrun (or of `accelerate launch`, which starts it), not through the
process group, which a failure may leave blocked.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from selfforcing_dfd.common import EXIT_INTERRUPTED, Interrupted, UserError

POLL_S = 0.5
GRACE_S = 3 * POLL_S  # for the other processes to learn of a failure
LEAVE_S = 10 * POLL_S  # they leave after the one that failed, which launchers take for the cause
MEETING_TIMEOUT_S = 600
EXIT_FAILED_ELSEWHERE = 1
FAILED = "failed"
ASKED = "where is everybody"
LOST = ("connection", "broken pipe", "timed out", "timeout", "socket", "nccl")
"""Words in the messages of communication that failed because of another process."""


class LaunchError(UserError):
    """The processes of a run cannot find each other."""


@dataclass(slots=True)
class Companions:
    """The other processes of this run, seen through the store."""

    rank: int
    size: int
    store: dist.Store
    watched: dist.Store  # a connection of the watching thread's own
    main_thread: int
    answered: bool = False
    failed_elsewhere: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Until `stopped`: be seen to be alive, answer where we are, leave when another failed."""
        try:
            while not self.stopped.wait(POLL_S):
                self.look_around()
        except dist.DistNetworkError:
            return  # the process that holds the store has ended, and with it the run

    def look_around(self) -> None:
        self.watched.add(f"alive {self.rank}", 1)
        if not self.answered and self.watched.check([ASKED]):
            self.watched.set(f"place {self.rank}", place_of(self.main_thread))
            self.answered = True
        if self.watched.check([FAILED]) and int(self.watched.get(FAILED)) != self.rank:
            self.failed_elsewhere = True
            self.stopped.wait(LEAVE_S)
            os._exit(EXIT_FAILED_ELSEWHERE)

    def is_first_to_fail(self) -> bool:
        """Whether no other process has failed before; the others then end."""
        is_first = self.store.add("failures", 1) == 1
        if is_first:
            self.store.set(FAILED, str(self.rank))
        return is_first

    def whose_fault(self) -> str:
        """What became of the processes that we waited for."""
        before = self.beats()
        self.store.set(ASKED, "")
        time.sleep(GRACE_S + POLL_S)
        dead = [rank for rank, beats in self.beats().items() if beats == before[rank]]
        if dead:
            return f"{names(dead)} ended without a word: killed, or out of memory"
        places = {rank: self.place(rank) for rank in range(self.size) if rank != self.rank}
        busy = [rank for rank, place in places.items() if "torch/distributed" not in place]
        shown = "; ".join(f"rank {rank} {places[rank]}" for rank in busy or places)
        return f"waited too long for other ranks: {shown}"

    def beats(self) -> dict[int, int]:
        """How often each other process was seen to be alive."""
        others = (rank for rank in range(self.size) if rank != self.rank)
        return {rank: self.store.add(f"alive {rank}", 0) for rank in others}

    def place(self, rank: int) -> str:
        key = f"place {rank}"
        return self.store.get(key).decode() if self.store.check([key]) else "does not answer"


_companions: Companions | None = None
_meetings = itertools.count()


def launched() -> bool:
    """Whether a launcher started this process beside others, or as if there were others."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def meeting_point() -> tuple[int, int, dist.Store]:
    """(rank, number of ranks, store): the store through which the processes meet."""
    if _companions is not None:
        store = dist.PrefixStore(f"group {next(_meetings)}", _companions.store)
        return _companions.rank, _companions.size, store
    try:
        timeout = timedelta(seconds=MEETING_TIMEOUT_S)
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    except (ValueError, RuntimeError) as error:
        raise LaunchError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot meet: {error}; "
            "start them with torchrun or accelerate launch, or one with WORLD_SIZE unset"
        ) from error
    return rank, size, store


def another_failed() -> bool:
    """Whether this process is about to end because another one failed."""
    return _companions is not None and _companions.failed_elsewhere


@contextmanager
def ending_together() -> Iterator[None]:
    """Where one of several processes fails in the `with`, all end, and that one's error says so.

    The others end without a word. A process alone is left alone.
    """
    global _companions
    if not launched() or _companions is not None:
        yield
        return
    rank, size, store = meeting_point()
    again = store.clone()  # type: ignore[attr-defined]  # which torch's type stubs leave out
    own, watched = (dist.PrefixStore("companions", each) for each in (store, again))
    _companions = Companions(rank, size, own, watched, threading.get_ident())
    thread = threading.Thread(target=_companions.watch, daemon=True)
    thread.start()
    try:
        yield
    except Interrupted:
        if rank != 0:  # all were interrupted at the same turn
            raise SystemExit(EXIT_INTERRUPTED) from None
        raise
    except KeyboardInterrupt:
        _companions.is_first_to_fail()
        raise
    except Exception as error:
        raise _named(error, _companions) from error.__cause__
    finally:
        _companions.stopped.set()
        thread.join()
        _companions = None


def _named(error: Exception, companions: Companions) -> BaseException:
    """The error with our rank in it; for all processes but the first that fails a silent end."""
    # torchrun stops the others when one has died; we stay to say who it was
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lost = is_lost(error) and not companions.failed_elsewhere
    fault = companions.whose_fault() if lost else ""
    if not companions.is_first_to_fail():
        return SystemExit(EXIT_FAILED_ELSEWHERE)
    time.sleep(GRACE_S)
    if fault:
        return UserError(f"{fault} (seen by rank {companions.rank} of {companions.size})")
    error.add_note(f"rank {companions.rank} of {companions.size}")
    return error


def is_lost(error: BaseException | None) -> bool:
    """Whether communication failed, which may be behind another error: a checkpoint's, say."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(word in text for word in LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def place_of(thread: int) -> str:
    """In words: the line that a thread of this process is at."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "has ended"
    last = traceback.extract_stack(frame)[-1]
    return f"is in {last.name}, {last.filename}:{last.lineno}"


def names(ranks: list[int]) -> str:
    """`rank 1`, or `ranks 1, 2`."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
