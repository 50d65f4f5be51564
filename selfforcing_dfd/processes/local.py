"""One function on many inputs, in processes of this machine; results come in the inputs' order.

The number of processes changes no byte: each input is worked on by one process with one thread.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from selfforcing_dfd.common import UserError

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
        for one in inputs:
            with one_thread():
                made = make(one)
            yield made
        return
    if start_method == "fork":
        gc.collect()  # a fork that frees a video's decoder waits for threads that it has not
    context = multiprocessing.get_context(start_method)
    pool = ProcessPoolExecutor(num_processes, context, begin, (make,))
    try:
        yield from results_in_order(
            lambda one: pool.submit(work_on, one), inputs, 2 * num_processes
        )
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps for want of memory. What is done is kept: run the same "
            "command again, with fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def results_in_order(
    submit: Callable[[Given], Future[Made]], inputs: Iterable[Given], ahead: int
) -> Iterator[Made]:
    """What becomes of each input that is submitted, in order; at most ahead + 1 results wait."""
    waiting: deque[Future[Made]] = deque()
    for one in inputs:
        waiting.append(submit(one))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread: sums are formed in the same order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_work: Callable[[Any], Any] | None = None
"""In a process that was started: what it does with each input. It may hold much, so it is sent
once.
"""


def work_on(one: Given) -> Any:
    assert _work is not None
    return _work(one)


def begin(make: Callable[[Any], Any]) -> None:
    """In a new process: one thread, no answer to Ctrl-C, and an end when the first one ends."""
    global _work
    _work = make
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A killed parent cannot stop its processes, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(EXIT_ORPHAN)
