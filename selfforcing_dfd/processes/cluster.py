"""One function on many inputs, by a Ray cluster; results come in the inputs' order.

Ray's actors are used and not Ray Data: a row here is a list of clips and its result a few numbers,
which need no tables, and an actor keeps its models and opened videos from one input to the next.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import socket
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from selfforcing_dfd.common import UserError
from selfforcing_dfd.processes.local import one_thread, results_in_order
from selfforcing_dfd.processes.shared_work import attempt

AGAIN = 3  # times that an input is given to a new process, where the one before died
WAITING = 2  # inputs of each process, one of which it works on
KNOCK_S = 10.0  # until a machine that does not answer is not there
STORE_BYTES = 256 << 20  # of shared memory, for a cluster of this machine alone

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Ray's variables: it tells nobody that it is used, and warns of nothing that it will change."""
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
"""Of a cluster of this machine: it listens on this machine alone, on Linux too, and its processes
get as much of a busy machine as others.
"""

Outcome = tuple[Any, Exception | None, str]
"""What was made, or the error and its traceback, which errors lose on their way."""

Given = TypeVar("Given")
Made = TypeVar("Made")


def each_on_cluster(
    make: Callable[[Given], Made],
    inputs: Iterable[Given],
    num_processes: int | None,
    *,
    address: str = "",
    gpus: float = 0.0,
) -> Iterator[Made]:
    """`make` of each input, in their order. make: picklable; files have one path everywhere.

    An input whose process dies is given to another one. Raises what `make` raises, and UserError
    without Ray, without the cluster, and where processes die again and again.
    """
    ray = imported(address)
    with connected(ray, address, num_processes):
        number = num_processes or room_for(ray, gpus)
        workers = Workers(ray, make, number, gpus)
        try:
            for outcome in results_in_order(workers.submit, inputs, WAITING * number):
                yield made_or_raised(*outcome)
        except ray.exceptions.RayError as error:
            raise UserError(
                f"the cluster could not do the work: {in_short(error)}. What is done is kept: "
                "run the same command again, with fewer --processes if memory was short. Every "
                "machine needs this package as it is here, and the videos under the same path"
            ) from error
        finally:
            workers.end()


def made_or_raised(made: Any, error: Exception | None, where: str) -> Any:
    if error is None:
        return made
    error.add_note(f"in a process of the cluster: {where}")
    raise error


def imported(address: str) -> Any:
    """The package ray, which reads its variables at once. UserError where it is not installed."""
    for name, value in (QUIET if address else QUIET | ALONE).items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs the package ray: pip install '.[ray]'") from error
    return ray


@contextmanager
def connected(ray: Any, address: str, num_processes: int | None) -> Iterator[None]:
    """A cluster, until the `with` ends: that of the program, that of an address, or one of its own.

    The own one starts no page.
    """
    if ray.is_initialized():
        yield
        return
    common = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    own = {
        "num_cpus": num_processes or len(os.sched_getaffinity(0)),
        "object_store_memory": STORE_BYTES,
    }
    try:
        if address:
            knock(address)
            common.pop("include_dashboard")
            ray.init(address, **common)
        else:
            ray.init("local", **common, **own)
    except (OSError, ValueError, RuntimeError) as error:
        place = f"the Ray cluster at {address}" if address else "a Ray cluster of this machine"
        raise UserError(
            f"cannot use {place}: {in_short(error)}. Name one that runs with --address, as "
            "`ray status` shows it, or use --engine local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def knock(address: str) -> None:
    """OSError where nobody listens; Ray would wait for minutes."""
    found = re.fullmatch(r"([\w.-]+):(\d+)", address)
    if found:
        socket.create_connection((found[1], int(found[2])), KNOCK_S).close()


def room_for(ray: Any, gpus: float) -> int:
    """How many processes a cluster can run at once. UserError for none."""
    found = ray.cluster_resources()
    kind = "GPU" if gpus else "CPU"
    number = int(found.get(kind, 0) / (gpus or 1))
    if not number:
        raise UserError(f"the Ray cluster has no {kind}; add a machine to it, or another --device")
    return number


class Workers:
    """Processes of a cluster; an input goes to the one that has the least to do."""

    def __init__(self, ray: Any, make: Callable[[Any], Any], number: int, gpus: float) -> None:
        self._ray = ray
        ready = ray.remote(Worker).options(
            num_cpus=1,
            num_gpus=gpus,
            max_restarts=AGAIN,
            max_task_retries=AGAIN,
            scheduling_strategy="SPREAD",
        )
        sent = pickle.dumps(make)
        self._workers = [ready.remote(sent) for _ in range(number)]
        self._given: dict[int, list[Future[Any]]] = defaultdict(list)

    def submit(self, one: Any) -> Future[Any]:
        """What `Worker.work` returns of the input."""
        number = min(range(len(self._workers)), key=self._left)
        future: Future[Any] = self._workers[number].work.remote(one).future()
        self._given[number].append(future)
        return future

    def end(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)

    def _left(self, number: int) -> int:
        """How many inputs a worker has still to do."""
        self._given[number] = [future for future in self._given[number] if not future.done()]
        return len(self._given[number])


class Worker:
    """In a process of the cluster: what it does with each input. It may hold much, so it stays."""

    def __init__(self, sent: bytes) -> None:
        """sent: the function, pickled. It is opened with the first input, which gets its errors."""
        self._sent = sent
        self._make: Callable[[Any], Any] | None = None

    def work(self, one: Any) -> Outcome:
        with one_thread():
            made, error = attempt(self._do, one)
        where = "" if error is None else "".join(traceback.format_exception(error))
        return made, error, where

    def _do(self, one: Any) -> Any:
        if self._make is None:
            self._make = pickle.loads(self._sent)
        return self._make(one)


def in_short(error: BaseException) -> str:
    """Of Ray's errors, which have a page, the line that names the cause."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    causes = [line for line in lines if re.match(r"\w+Error: ", line)]
    return (causes or lines)[-1 if causes else 0].rstrip(".")
