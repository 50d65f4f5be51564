"""Checkpoints that are written while training goes on: one at a time, by a thread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from selfforcing_dfd.processes.ranks import group_of_saves
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.state import State


class Saver:
    """Saves to one folder, at once or in the background. All ranks call together.

    In the background, `save` copies the state to memory of the CPU and returns. A thread writes the
    copy, so training waits for the copy alone. The next `save` waits until this one is on the disk:
    there is never more than one copy. Either way the same bytes are written.
    """

    def __init__(self, checkpoints: CheckpointManager, in_background: bool = False) -> None:
        self.checkpoints = checkpoints
        self.in_background = in_background
        self._unfinished: Future[Path] | None = None

    def save(self, student_update: int, state: State) -> Path:
        """Save this state; it is there when `wait` or the next `save` returns. Where it will be.

        NonFiniteError, with nothing written, for values not finite. CheckpointError if this save or
        the one before failed.
        """
        self.wait()
        if not self.in_background:
            return self.checkpoints.save(student_update, state)
        snapshot = self.checkpoints.snapshot(student_update, state, copy=True)
        group = group_of_saves()
        thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._unfinished = thread.submit(self.checkpoints.write, snapshot, group)
        thread.shutdown(wait=False)  # it ends when the checkpoint is written
        return snapshot.path

    def wait(self) -> None:
        """Until the last save is on the disk. CheckpointError if it failed; said once."""
        unfinished = self._unfinished
        self._unfinished = None
        if unfinished is not None:
            unfinished.result()

    @contextmanager
    def completed(self) -> Iterator[None]:
        """What is saved in the `with` is on the disk after it, also where an error ends it.

        A failed save is noted in that error, which is raised all the same. Ctrl-C does not wait:
        Python itself waits for the thread when it ends.
        """
        try:
            yield
        except Exception as error:
            try:
                self.wait()
            except Exception as failed:
                error.add_note(str(failed))
            raise
        self.wait()
