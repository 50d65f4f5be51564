"""One WebSocket of the live page: what is on its way to a browser, and how a connection ends."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.websockets import WebSocket, WebSocketDisconnect

from selfforcing_dfd.live.web.messages import BadMessage, Message, message_text, parse_message

MAX_BAD_MESSAGES = 20
MAX_WAITING_TEXTS = 256
ALIVE_S = 5.0
"""After so long without a message there is one that says no more than that the line stands."""
CLOSED_EARLY = 1006  # of RFC 6455: nobody said why
CLOSE_S = 2.0
MAX_REASON_BYTES = 120  # RFC 6455 has room for 123
IDLE = 1001  # close codes of RFC 6455
BAD_MESSAGES = 1008
FAILED = 1011
TRY_LATER = 1013
NO_STREAM = 4404  # of our own


class Ended(Exception):
    """The server ends a connection: close code, and what its viewer is told."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Parcel(NamedTuple):
    """A chunk on its way: its message, and its video frames, which all viewers share."""

    chunk: int
    text: str
    frames: list[bytes]


@dataclass(slots=True, eq=False)
class Outbox:
    """What waits for one viewer, in order and bounded: a slow viewer gets the newest chunks.

    max_chunks: beyond them the oldest chunk is dropped. Whoever lets MAX_WAITING_TEXTS other
    messages wait is too slow.
    """

    max_chunks: int
    waiting: deque[str | Parcel] = field(default_factory=deque)
    is_too_slow: bool = False
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, item: str | Parcel) -> None:
        """Never waits."""
        self.waiting.append(item)
        parcels = [each for each in self.waiting if isinstance(each, Parcel)]
        if len(parcels) > self.max_chunks:
            self.waiting.remove(parcels[0])
        self.is_too_slow |= len(self.waiting) - len(parcels) > MAX_WAITING_TEXTS
        if self.is_too_slow:
            self.waiting.clear()
        self.ready.set()

    def drop_after(self, chunk: int) -> None:
        """Chunks after this one are not sent any more."""
        kept = [each for each in self.waiting if isinstance(each, str) or each.chunk <= chunk]
        self.waiting = deque(kept)

    async def get(self, wait_s: float) -> str | Parcel | None:
        """The next item; None if there is none for so long. Raises Ended if too much waited."""
        try:
            async with asyncio.timeout(wait_s):
                while not self.waiting and not self.is_too_slow:
                    self.ready.clear()
                    await self.ready.wait()
        except TimeoutError:
            return None
        if self.is_too_slow:
            raise Ended(IDLE, "this connection is too slow for the stream")
        return self.waiting.popleft()


@dataclass(slots=True, eq=False)
class Connection:
    """A WebSocket that is served by tasks of its own until one of them ends.

    patience_s: a browser that takes nothing for so long is taken to be gone.
    """

    websocket: WebSocket
    outbox: Outbox
    patience_s: float
    num_bad: int = 0

    async def serve(self, *jobs: Coroutine[Any, Any, None]) -> None:
        """Send what is put into the outbox, beside some jobs, until one of all these ends.

        Ended tells the browser why; WebSocketDisconnect is a normal end.
        """
        tasks = [asyncio.create_task(job) for job in (self.send_all(), *jobs)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [each for each in outcomes if isinstance(each, Exception)]
        for error in errors:
            if isinstance(error, WebSocketDisconnect):
                return
        for error in errors:
            if isinstance(error, Ended):
                await self.end(error)
            else:
                await self.end(Ended(FAILED, f"the server failed: {error}"))
                raise error

    def tell(self, kind: str, **fields: Any) -> None:
        """A message for this browser alone."""
        self.outbox.put(message_text(kind, **fields))

    def refuse(self, error: BadMessage) -> None:
        """Answer a bad message. Raises Ended after too many of them."""
        self.num_bad += 1
        if self.num_bad > MAX_BAD_MESSAGES:
            raise Ended(
                BAD_MESSAGES, f"more than {MAX_BAD_MESSAGES} bad messages; the last: {error}"
            ) from error
        self.tell("error", about="message", message=str(error))

    async def next_message(self) -> Message | BadMessage | None:
        """What the browser sends next; None when it has left."""
        event = await self.websocket.receive()
        if event["type"] != "websocket.receive":
            return None
        text = event.get("text")
        try:
            return parse_message(event["bytes"] if text is None else text)
        except BadMessage as error:
            return error

    async def send_all(self) -> None:
        """Until the connection ends. Raises Ended if the browser takes nothing."""
        while True:
            item = await self.outbox.get(ALIVE_S)
            if isinstance(item, Parcel):
                await self.deliver(self.websocket.send_text(item.text))
                for frame in item.frames:
                    await self.deliver(self.websocket.send_bytes(frame))
            else:
                text = message_text("alive") if item is None else item
                await self.deliver(self.websocket.send_text(text))

    async def deliver(self, sending: Awaitable[None]) -> None:
        """Wait until the connection has taken a message. Raises Ended if it takes nothing."""
        try:
            async with asyncio.timeout(self.patience_s):
                await taken(sending)
        except TimeoutError as error:
            raise Ended(
                IDLE, f"nothing was received for {self.patience_s:g} s and the stream has ended"
            ) from error

    async def end(self, end: Ended) -> None:
        """Tell the browser why, if it still listens, and close."""
        # one that has gone or takes no data need not be told
        with suppress(WebSocketDisconnect, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                told = json.dumps({"type": "ended", "message": end.message})
                await taken(self.websocket.send_text(told))
                reason = end.message.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
                await taken(self.websocket.close(end.code, reason))


async def taken(sending: Awaitable[None]) -> None:
    """Pass a message on. Raises WebSocketDisconnect where the connection is closed."""
    try:
        await sending
    except RuntimeError as error:
        # uvicorn's word for a connection that it closed itself, after a frame that is none
        if "websocket.close" not in str(error):
            raise
        raise WebSocketDisconnect(CLOSED_EARLY) from error
