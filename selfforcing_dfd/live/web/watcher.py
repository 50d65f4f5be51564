"""Those who watch another viewer's stream: they see its newest chunks and steer nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.websockets import WebSocket

from selfforcing_dfd.live.web.connection import IDLE, Connection, Ended, Outbox
from selfforcing_dfd.live.web.messages import BadMessage
from selfforcing_dfd.live.web.viewer import Viewer

MAX_WATCHERS = 64


@dataclass(slots=True, eq=False)
class Watcher:
    """One connection that watches. It may fall behind, and then misses chunks."""

    owner: Viewer
    websocket: WebSocket
    connection: Connection = field(init=False)

    def __post_init__(self) -> None:
        shared = self.owner.shared
        outbox = Outbox(shared.max_queue_chunks)
        self.connection = Connection(self.websocket, outbox, shared.idle_s)

    async def run(self) -> None:
        """Until one side ends it, or the stream ends."""
        stream = self.owner.stream
        outbox = self.connection.outbox
        self.connection.tell("hello", stream=stream.name, **self.owner.shared.hello())
        if stream.session is not None:
            self.connection.tell("began", **stream.facts())
            self.connection.tell("state", paused=stream.paused)
        stream.join(outbox)
        self.owner.watched()
        try:
            await self.connection.serve(self.read(), self.wait_for_end())
        finally:
            stream.leave(outbox)

    async def read(self) -> None:
        """Until the browser leaves. What it has seen says that somebody watches, and no more."""
        while (message := await self.connection.next_message()) is not None:
            if isinstance(message, BadMessage):
                self.connection.refuse(message)
            elif message.kind == "ack":
                self.owner.alive_at = time.monotonic()
            else:
                self.connection.refuse(
                    BadMessage(f"got {message.kind}; who watches another's stream steers nothing")
                )

    async def wait_for_end(self) -> None:
        """Raises Ended when the stream is over."""
        await self.owner.stream.ended.wait()
        raise Ended(IDLE, "the stream that you watched has ended")
