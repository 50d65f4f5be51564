"""A protocol's work: make and measure what is not there yet. Any number of processes may share it.

Each piece of work has a lock that the system releases when its holder dies, and one result file,
which appears at once. So a finished piece is never done twice, and a killed one is begun again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import av
import torch
from tqdm import tqdm

import selfforcing_dfd
from selfforcing_dfd.common import UserError, atomic_file, find_device
from selfforcing_dfd.metrics.feature_files import encoder_of
from selfforcing_dfd.metrics.features import Encoder
from selfforcing_dfd.protocol.folder import read_json, refuse_other, tidy, write_json
from selfforcing_dfd.protocol.makers import Make
from selfforcing_dfd.protocol.measure import measure_features, measure_numbers
from selfforcing_dfd.protocol.plan import Cell
from selfforcing_dfd.protocol.prepared import Prepared
from selfforcing_dfd.protocol.videos import write_video
from selfforcing_dfd.training.exclusive import ExclusiveError, lock_folders

Do = Literal["all", "videos", "numbers"]
POLL_S = 1.0
IDLE_POLLS = 3  # between the end of a task that others wait for and their start is a moment


@dataclass(frozen=True, slots=True)
class Task:
    """One result.

    needs: a file that has to be there first. check: raises UserError for a result that was made in
    another way.
    """

    name: str
    result: Path
    lock: Path
    make: Callable[[], None]
    check: Callable[[], None] = lambda: None
    needs: Path | None = None

    def is_done(self) -> bool:
        return self.result.exists()

    def is_ready(self) -> bool:
        return self.needs is None or self.needs.exists()


class Worker:
    """Makes and measures videos in this process. One method's network is in memory at a time."""

    def __init__(self, prepared: Prepared, device: str) -> None:
        find_device(device, "--device")
        self.prepared = prepared
        self.device = device
        self._loaded: tuple[tuple[str, str], Make] | None = None
        self._encoders: dict[str, Encoder] = {}

    def tasks(self, do: Do, only: Sequence[str] = ()) -> list[Task]:
        """All pieces of work, videos first. only: methods; empty for all."""
        methods = [name for name in self.prepared.protocol.methods if not only or name in only]
        cells = [cell for name in methods for cell in self._in_order(name)]
        tasks: list[Task] = []
        if do != "numbers":
            here = [cell for cell in cells if self.prepared.is_made_here(cell.method)]
            tasks += [self._video_task(cell) for cell in here]
        if do != "videos":
            tasks += [self._numbers_task(cell) for cell in cells]
            for encoder in self.prepared.encoders:
                tasks += [self._features_task(cell, encoder) for cell in cells]
        return tasks

    def _in_order(self, method: str) -> list[Cell]:
        """Set after set, so that each network is loaded once."""
        return sorted(self.prepared.cells(method), key=lambda cell: cell.prompt.set)

    def _video_task(self, cell: Cell) -> Task:
        folder = self.prepared.folder
        return Task(
            f"{cell.method} {cell.name}",
            folder.video(cell),
            folder.lock(cell, "video"),
            partial(self.make_video, cell),
            partial(self.check_video, cell),
        )

    def _numbers_task(self, cell: Cell) -> Task:
        result = self.prepared.folder.numbers(cell)
        settings = self.prepared.measuring()
        video = self.prepared.video(cell)

        def check() -> None:
            refuse_other(result, read_json(result)["settings"], settings)

        return Task(
            f"numbers of {cell.method} {cell.name}",
            result,
            self.prepared.folder.lock(cell, "numbers"),
            partial(measure_numbers, video, result, settings),
            check,
            video,
        )

    def _features_task(self, cell: Cell, encoder: str) -> Task:
        folder = self.prepared.folder
        result = folder.features(cell, encoder)
        return Task(
            f"{encoder} of {cell.method} {cell.name}",
            result,
            folder.lock(cell, result.parents[1].name),
            partial(self.make_features, cell, encoder, result),
            needs=self.prepared.video(cell),
        )

    def make_video(self, cell: Cell) -> None:
        """Write a video chunk by chunk, with its prompt and what made it beside it."""
        folder = self.prepared.folder
        key = (cell.method, cell.prompt.set)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # its memory is needed for the next one
            self._loaded = (key, self.prepared.method(*key).load(self.device))
        for stale in [folder.numbers(cell), *self._features(cell)]:
            stale.unlink(missing_ok=True)  # of a video that was deleted
        with atomic_file(folder.video(cell)) as partial_file:
            protocol = self.prepared.protocol
            write_video(partial_file, self._loaded[1](cell), protocol.fps, protocol.crf)
            folder.prompt(cell).write_text(cell.prompt.text + "\n", encoding="utf-8")
            write_json(folder.record(cell), {"made": self.prepared.made(cell), **self.software()})

    def _features(self, cell: Cell) -> list[Path]:
        encoders = self.prepared.protocol.features
        return [self.prepared.folder.features(cell, encoder) for encoder in encoders]

    def check_video(self, cell: Cell) -> None:
        """Raise UserError for a video that was made in another way."""
        record = self.prepared.folder.record(cell)
        refuse_other(record, read_json(record)["made"], self.prepared.made(cell))

    def make_features(self, cell: Cell, encoder: str, result: Path) -> None:
        if encoder not in self._encoders:
            self._encoders[encoder] = encoder_of(encoder, find_device(self.device))
        video = self.prepared.video(cell)
        measure_features(video, result, self._encoders[encoder], cell.prompt.text)

    def software(self) -> dict[str, str]:
        return {
            "device": str(find_device(self.device)),
            "selfforcing_dfd": selfforcing_dfd.__version__,
            "torch": torch.__version__,
            "pyav": av.__version__,
        }


def run_tasks(tasks: Sequence[Task], wait: bool = False) -> list[str]:
    """Do every task that is not done; returns what failed, one line each.

    wait: for files that tasks need and that nobody has made yet, however long it takes. Raises
    UserError for results that were made in another way, before any work. A task that another
    process holds is waited for, and taken over if that process dies.
    """
    done = [task for task in tasks if task.is_done()]
    for task in done:
        task.check()
    tqdm.write(f"{len(tasks)} results, {len(done)} are there, {len(tasks) - len(done)} to make")
    failed: dict[str, str] = {}
    idle = 0
    with tqdm(total=len(tasks), initial=len(done), unit="result", dynamic_ncols=True) as bar:
        while idle < IDLE_POLLS:
            left = [task for task in tasks if not task.is_done() and task.name not in failed]
            bar.update(len(tasks) - len(left) - bar.n)
            ready = [task for task in left if task.is_ready()]
            if not left:
                break
            made = 0
            for task in ready:
                bar.set_postfix_str(task.name, refresh=False)
                made += attempt(task, failed)
                bar.update(len(tasks) - len(left) + made - bar.n)
            idle = 0 if ready or wait else idle + 1
            if not made:
                time.sleep(POLL_S)
    return list(failed.values())


def attempt(task: Task, failed: dict[str, str]) -> bool:
    """Do a task unless another process does it. A UserError is noted in `failed`."""
    try:
        with lock_folders(task.lock):
            if task.is_done():
                return False
            tidy(task.result)
            task.make()
            return True
    except ExclusiveError:
        return False
    except UserError as error:
        failed[task.name] = f"{task.name}: {error}"
        tqdm.write(f"{task.name} failed: {error}")
        return False
