"""Writes chunks in a thread, so that the next chunk is generated while one is encoded."""

from __future__ import annotations

import queue
import threading

from selfforcing_dfd.live.writers import Frames, Writer

MAX_WAITING = 2  # chunks; more would only take memory, since a writer that is too slow stays so


class BackgroundWriter(Writer):
    """Hands chunks to another writer in a thread, in order. The stream waits if it falls behind.

    An error of the other writer is raised once, by the next `write` or by `close`; nothing is
    written after it. `close` waits for the chunks that are left. Frames must not be changed once
    they are written.
    """

    def __init__(self, writer: Writer, max_waiting: int = MAX_WAITING) -> None:
        self._writer = writer
        self._waiting: queue.Queue[Frames | None] = queue.Queue(max_waiting)
        self._error: BaseException | None = None  # not yet raised
        self._broken = self._closed = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def write(self, frames: Frames) -> None:
        self._raise_error()
        self._waiting.put(frames)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._waiting.put(None)
        self._thread.join()
        self._writer.close()
        self._raise_error()

    def _run(self) -> None:
        while (frames := self._waiting.get()) is not None:
            if self._broken:
                continue  # drop what waits, so that `write` does not wait for room for ever
            try:
                self._writer.write(frames)
            except BaseException as error:
                self._broken = True
                self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            error = self._error
            self._error = None
            raise error
