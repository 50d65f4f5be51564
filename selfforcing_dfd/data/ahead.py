"""Threads that work ahead of a loop without changing what it gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from selfforcing_dfd.processes.local import results_in_order

Given = TypeVar("Given")
Made = TypeVar("Made")


def in_order(
    make: Callable[[Given], Made], inputs: Iterable[Given], num_workers: int
) -> Iterator[Made]:
    """`make` of each input, in their order; `inputs` may be endless.

    At most 2 num_workers + 1 results wait in memory. Threads and not processes: decoding, I/O,
    checksums and copies do not hold Python's lock; threads need no shared memory and no fork
    beside a GPU, and they pass an error on as it was raised.
    """
    if num_workers == 0:
        yield from map(make, inputs)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="batches")
    try:
        yield from results_in_order(lambda one: pool.submit(make, one), inputs, 2 * num_workers)
    finally:
        pool.shutdown(cancel_futures=True)
