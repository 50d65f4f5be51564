"""Writing beside generating: encoding a chunk takes as long as a GPU needs for a part of the next
one.
"""

from __future__ import annotations

import queue
import threading

from selfforcing_dfd.live.writers import Frames, Writer

# chunks; more would only be memory: a writer that is slower than the stream stays so
MAX_WAITING = 2


class BackgroundWriter(Writer):
    """Hands chunks to another writer in a thread of its own, in order. The stream waits where that
    falls behind.

    An error of the other writer comes out of the next `write`, or of `close`, once; nothing is
    written after it. Closing waits for what is left. Frames must not be changed once they are
    written.
    """

    def __init__(self, writer: Writer, max_waiting: int = MAX_WAITING) -> None:
        self._writer = writer
        self._waiting: queue.Queue[Frames | None] = queue.Queue(max_waiting)
        self._error: BaseException | None = None  # not yet told
        self._broken = self._closed = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def write(self, frames: Frames) -> None:
        self._tell()
        self._waiting.put(frames)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._waiting.put(None)
        self._thread.join()
        self._writer.close()
        self._tell()

    def _run(self) -> None:
        while (frames := self._waiting.get()) is not None:
            if self._broken:
                # what was already waiting is dropped, so that nobody waits for room for ever
                continue
            try:
                self._writer.write(frames)
            except BaseException as error:
                self._broken, self._error = True, error

    def _tell(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
