"""The owner of a stream: a connection that begins, steers and ends it.

Generation waits for a slow owner. A chunk is made only while fewer than `max_queue_chunks` have
been made and not yet acknowledged as shown. While nobody else watches, nothing is dropped, and no
queue grows. All sessions share one worker thread, with at most one chunk each in its queue. So they
take turns by chunk, and the event loop never waits for a computation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from starlette.websockets import WebSocket

from selfforcing_dfd.live.web.connection import IDLE, Connection, Ended, Outbox
from selfforcing_dfd.live.web.messages import BadMessage, Message, short
from selfforcing_dfd.live.web.pictures import PictureError
from selfforcing_dfd.live.web.shared import Shared
from selfforcing_dfd.live.web.stream import LiveStream

MAX_WAITING_MESSAGES = 64
INTERNAL = ("picture", "watched")
"""Kinds of messages that no browser can send: from the server's other handlers."""


@dataclass(slots=True, eq=False)
class Viewer:
    """One connection and its stream. `play` uses the session; `read` only receives."""

    shared: Shared
    websocket: WebSocket
    inbox: asyncio.Queue[Message | BadMessage] = field(
        default_factory=lambda: asyncio.Queue(MAX_WAITING_MESSAGES)
    )
    stream: LiveStream = field(init=False)
    connection: Connection = field(init=False)
    seed: int | None = None  # of the next reset
    # monotonic time of the last activity; a chunk, for which an `ack` made room, counts
    alive_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        outbox = Outbox(self.shared.max_queue_chunks)
        self.stream = LiveStream(self.shared, [outbox])
        self.connection = Connection(self.websocket, outbox, self.shared.idle_s)

    async def run(self) -> None:
        """Until one side ends it."""
        await self.connection.serve(self.read(), self.play())

    async def read(self) -> None:
        """Until the browser leaves."""
        while (message := await self.connection.next_message()) is not None:
            await self.inbox.put(message)

    def use_picture(self, image: Image.Image) -> bool:
        """Begin anew with a picture; False where too many messages wait."""
        return self._notify(Message("picture", {"image": image}))

    def watched(self) -> None:
        """Somebody else watches from now on, so that time passes by the clock."""
        self._notify(Message("watched", {}))

    def _notify(self, message: Message) -> bool:
        try:
            self.inbox.put_nowait(message)
        except asyncio.QueueFull:
            return False
        return True

    async def play(self) -> None:
        """Carry out all messages, then make a chunk, or wait while none may be made."""
        stream = self.stream
        self.connection.tell("hello", stream=stream.name, **self.shared.hello())
        while True:
            while not self.inbox.empty() or not stream.may_make():
                message = await self.next_message()
                if message is not None:
                    await self.obey(message)
            started = time.monotonic()
            await stream.make_chunk()
            # with others who watch, chunks are made whether or not any is seen
            now = time.monotonic()
            self.alive_at = self.alive_at + now - started if stream.is_watched else now

    async def next_message(self) -> Message | BadMessage | None:
        """The next message; None as soon as the clock has made room for a chunk.

        Raises Ended after idle_s without a message, or without a chunk shown.
        """
        ends = self.alive_at + self.shared.idle_s
        due = self.stream.next_due()
        until = ends if due is None else min(ends, due)
        try:
            async with asyncio.timeout(max(until - time.monotonic(), 0)):
                message = await self.inbox.get()
        except TimeoutError as error:
            if time.monotonic() < ends:
                return None
            stream = self.stream
            why = "paused" if stream.paused else "not watched" if stream.session else "not started"
            raise Ended(
                IDLE, f"the stream was {why} for {self.shared.idle_s:g} s and has ended"
            ) from error
        if self.stream.session is None or self.stream.paused:
            self.alive_at = time.monotonic()
        return message

    async def obey(self, message: Message | BadMessage) -> None:
        """Carry out a message, or answer with what is wrong with it."""
        try:
            if isinstance(message, BadMessage):
                raise message
            await self.carry_out(message)
        except BadMessage as error:
            self.connection.refuse(error)
        except PictureError as error:  # as below
            self.connection.tell("error", about="picture", message=str(error))
        except ValueError as error:  # the text encoder's; the stream is as it was
            self.connection.tell("error", about="prompt", message=str(error))

    async def carry_out(self, message: Message) -> None:
        """Raises BadMessage at the wrong time, ValueError for what the model refuses."""
        kind = message.kind
        fields = message.fields
        stream = self.stream
        if kind == "start":
            await self.start(**fields)
        elif kind == "student":
            await self.choose(**fields)
        elif kind == "picture":
            await self.begin_with(fields["image"])
        elif kind == "drop_picture":
            await self.begin_with(None)
        elif kind == "watched":
            return
        elif stream.session is None:
            raise BadMessage(f"got {kind} before start; want start first")
        elif kind == "ack":
            stream.acknowledge(fields["chunk"])
            self.alive_at = time.monotonic()
        elif kind == "prompt":
            await stream.set_prompt(**fields)
        elif kind == "reset":
            await stream.reset(self.seed)
            self.alive_at = time.monotonic()
        elif kind == "seed":
            self.seed = fields["seed"]
        else:
            self.set_paused(kind == "pause")

    async def start(self, prompt: str, seed: int, changes: Sequence[dict[str, Any]] = ()) -> None:
        stream = self.stream
        if stream.session is not None:
            raise BadMessage("got start after start; want prompt, seed, student or reset")
        await stream.begin(stream.student, prompt, seed, stream.picture, changes)
        self.alive_at = time.monotonic()

    async def choose(self, name: str) -> None:
        """Another student, whose stream begins anew under the same prompt and seed.

        Before the start it is only noted.
        """
        stream = self.stream
        if name not in self.shared.students:
            known = ", ".join(self.shared.students)
            raise BadMessage(f"student: name is {short(name)}; want one of {known}")
        if stream.session is None:
            stream.student = name
        else:
            seed = stream.session.settings.seed
            await self.begin(name, stream.prompt, seed, stream.picture)

    async def begin_with(self, picture: Image.Image | None) -> None:
        """The same prompt and seed from another picture, or from none.

        Before the start it is only noted.
        """
        stream = self.stream
        if stream.session is None:
            stream.picture = picture
            self.connection.tell("picture", has_picture=picture is not None)
        else:
            seed = stream.session.settings.seed
            await self.begin(stream.student, stream.prompt, seed, picture)

    async def begin(self, name: str, prompt: str, seed: int, picture: Image.Image | None) -> None:
        await self.stream.begin(name, prompt, seed, picture)
        self.alive_at = time.monotonic()

    def set_paused(self, paused: bool) -> None:
        stream = self.stream
        stream.paused = paused
        self.alive_at = time.monotonic()
        stream.recent.clear()  # the time of a pause counts in no rate
        stream.send("state", paused=paused)
