"""One function on many clips, in processes of this machine; results come in the clips' order.

The number of processes changes no byte: each clip is worked on by one process with one thread.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

import torch

from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.ahead import results_in_order

EXIT_ORPHAN = 1

Given = TypeVar("Given")
Made = TypeVar("Made")


def each_in_order(
    make: Callable[[Given], Made],
    inputs: Iterable[Given],
    num_processes: int,
    start_method: str = "spawn",
) -> Iterator[Made]:
    """`make` of each input, in their order. make: picklable where there are several processes.

    Other processes end when this one does, even by a kill. UserError where one of them is killed.
    """
    if num_processes == 1:
        with one_thread():
            yield from map(make, inputs)
        return
    context = multiprocessing.get_context(start_method)
    pool = ProcessPoolExecutor(num_processes, context, begin)
    try:
        yield from results_in_order(pool, make, inputs, 2 * num_processes)
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps for want of memory. What is done is kept: run the same "
            "command again, with fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread: sums are formed in the same order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def begin() -> None:
    """In a new process: one thread, no answer to Ctrl-C, and an end when the first one ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A killed parent cannot stop its processes, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(EXIT_ORPHAN)
