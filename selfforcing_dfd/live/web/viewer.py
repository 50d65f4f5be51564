"""One viewer of the live page: a connection and its own `StreamSession`.

Generation waits for slow viewers. A chunk is made only while fewer than `max_queue_chunks` have
been made and not yet acknowledged as shown. Nothing is dropped, and no queue grows. All sessions
share one worker thread, with at most one chunk each in its queue. So they take turns by chunk, and
the event loop never waits for a computation.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from starlette.websockets import WebSocket, WebSocketDisconnect

from selfforcing_dfd.common import resident_bytes
from selfforcing_dfd.live.web.messages import (
    HEADER,
    BadMessage,
    Message,
    encode_jpeg,
    parse_message,
    short,
)
from selfforcing_dfd.live.web.shared import Shared
from selfforcing_dfd.streaming.session import StreamChunk, StreamSession

MAX_BAD_MESSAGES = 20
MAX_WAITING_MESSAGES = 64
RECENT_CHUNKS = 20
CLOSED_EARLY = 1006  # of RFC 6455: nobody said why
CLOSE_S = 2.0
MAX_REASON_BYTES = 120  # RFC 6455 has room for 123
IDLE = 1001  # close codes of RFC 6455
BAD_MESSAGES = 1008
FAILED = 1011


class Ended(Exception):
    """The server ends a connection: close code, and what its viewer is told."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(slots=True, eq=False)
class Viewer:
    """One connection and its stream. `play` uses the session and sends; `read` only receives."""

    shared: Shared
    websocket: WebSocket
    inbox: asyncio.Queue[Message | BadMessage] = field(
        default_factory=lambda: asyncio.Queue(MAX_WAITING_MESSAGES)
    )
    session: StreamSession | None = None
    student: str = field(init=False)  # whose stream it is, or will be
    prompt: str = ""  # the last one that was accepted
    seed: int | None = None  # of the next reset
    paused: bool = False
    num_chunks: int = 0  # sent on this connection
    num_frames: int = 0
    num_acked: int = 0
    num_bad: int = 0
    # monotonic time of the last activity; a chunk, for which an `ack` made room, counts
    alive_at: float = field(default_factory=time.monotonic)
    recent: deque[tuple[float, int]] = field(
        default_factory=lambda: deque(maxlen=RECENT_CHUNKS + 1)
    )

    def __post_init__(self) -> None:
        self.student = self.shared.first

    async def run(self) -> None:
        """Until one side ends it."""
        tasks = [asyncio.create_task(self.read()), asyncio.create_task(self.play())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except WebSocketDisconnect:
            return
        except Ended as end:
            await self.end(end)
        except Exception as error:
            await self.end(Ended(FAILED, f"the server failed: {error}"))
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def read(self) -> None:
        """Until the browser leaves."""
        while (event := await self.websocket.receive())["type"] == "websocket.receive":
            text = event.get("text")
            try:
                message: Message | BadMessage = parse_message(
                    event["bytes"] if text is None else text
                )
            except BadMessage as error:
                message = error
            await self.inbox.put(message)

    async def play(self) -> None:
        """Carry out all messages, then make a chunk, or wait while none may be made."""
        await self.send("hello", **self.shared.hello())
        while True:
            while not self.inbox.empty() or not self.may_make:
                await self.obey(await self.next_message())
            await self.make_chunk()

    @property
    def may_make(self) -> bool:
        num_ahead = self.num_chunks - self.num_acked
        return (
            self.session is not None
            and not self.paused
            and num_ahead < self.shared.max_queue_chunks
        )

    async def next_message(self) -> Message | BadMessage:
        """The next message. Raises Ended after idle_s without one, or without a chunk shown."""
        left_s = self.alive_at + self.shared.idle_s - time.monotonic()
        try:
            async with asyncio.timeout(max(left_s, 0)):
                message = await self.inbox.get()
        except TimeoutError as error:
            why = "paused" if self.paused else "not watched" if self.session else "not started"
            raise Ended(
                IDLE, f"the stream was {why} for {self.shared.idle_s:g} s and has ended"
            ) from error
        if self.session is None or self.paused:
            self.alive_at = time.monotonic()
        return message

    async def obey(self, message: Message | BadMessage) -> None:
        """Carry out a message, or answer with what is wrong with it."""
        try:
            if isinstance(message, BadMessage):
                raise message
            await self.carry_out(message)
        except BadMessage as error:
            self.num_bad += 1
            if self.num_bad > MAX_BAD_MESSAGES:
                raise Ended(
                    BAD_MESSAGES, f"more than {MAX_BAD_MESSAGES} bad messages; the last: {error}"
                ) from error
            await self.send("error", about="message", message=str(error))
        except ValueError as error:  # the text encoder's; the stream is as it was
            await self.send("error", about="prompt", message=str(error))

    async def carry_out(self, message: Message) -> None:
        """Raises BadMessage at the wrong time, ValueError for a prompt that the model refuses."""
        kind = message.kind
        fields = message.fields
        session = self.session
        if kind == "start":
            await self.start(**fields)
            return
        if kind == "student":
            await self.choose(**fields)
            return
        if session is None:
            raise BadMessage(f"got {kind} before start; want start first")
        if kind == "ack":
            self.acknowledge(fields["chunk"])
        elif kind == "prompt":
            await self.shared.compute(lambda: session.set_prompt(fields["text"], fields["mode"]))
            self.prompt = fields["text"]
            await self.send("prompt", **fields, from_chunk=self.num_chunks)
        elif kind == "reset":
            await self.shared.compute(lambda: session.reset(self.prompt, self.seed))
            await self.began(session)
        elif kind == "seed":
            self.seed = fields["seed"]
        else:
            await self.set_paused(kind == "pause")

    async def start(self, prompt: str, seed: int) -> None:
        if self.session is not None:
            raise BadMessage("got start after start; want prompt, seed, student or reset")
        await self.begin(self.student, prompt, seed)

    async def choose(self, name: str) -> None:
        """Another student, whose stream begins anew under the same prompt and seed.

        Before the start it is only noted.
        """
        if name not in self.shared.students:
            known = ", ".join(self.shared.students)
            raise BadMessage(f"student: name is {short(name)}; want one of {known}")
        if self.session is None:
            self.student = name
        else:
            await self.begin(name, self.prompt, self.session.settings.seed)

    async def begin(self, name: str, prompt: str, seed: int) -> None:
        """A new stream in place of the old one, which stays if the model refuses the prompt."""
        student = self.shared.students[name]
        session = await self.shared.compute(lambda: student.begin(prompt, seed))
        self.session = session
        self.student = name
        self.prompt = prompt
        await self.began(session)

    async def began(self, session: StreamSession) -> None:
        self.recent.clear()
        self.alive_at = time.monotonic()
        await self.send(
            "began",
            student=self.student,
            prompt=self.prompt,
            seed=session.settings.seed,
            next_chunk=self.num_chunks,
        )

    def acknowledge(self, chunk: int) -> None:
        """A chunk has been shown, and all before it."""
        if chunk >= self.num_chunks:
            raise BadMessage(
                f"ack: chunk is {chunk}; want one of the {self.num_chunks} that were sent"
            )
        self.num_acked = max(self.num_acked, chunk + 1)

    async def set_paused(self, paused: bool) -> None:
        self.paused = paused
        self.alive_at = time.monotonic()
        self.recent.clear()  # the time of a pause counts in no rate
        await self.send("state", paused=paused)

    async def make_chunk(self) -> None:
        """The next chunk: made, encoded and sent."""
        assert self.session is not None
        chunk = await self.shared.compute(self.session.next_chunk)
        self.recent.append((time.monotonic(), len(chunk.frames)))
        pictures = await asyncio.gather(
            *(asyncio.to_thread(encode_jpeg, frame) for frame in chunk.frames.numpy())
        )
        await self.send("chunk", **self.figures(self.session, chunk))
        for picture in pictures:
            header = HEADER.pack(self.num_chunks, self.num_frames)
            await self.deliver(self.websocket.send_bytes(header + picture))
            self.num_frames += 1
        self.num_chunks += 1
        self.alive_at = time.monotonic()

    def figures(self, session: StreamSession, chunk: StreamChunk) -> dict[str, Any]:
        """A chunk's figures for the page. index: of the chunk in its stream."""
        device = session.model.device
        return {
            "chunk": self.num_chunks,
            "index": chunk.chunk_index,
            "num_frames": len(chunk.frames),
            "latency_ms": chunk.timings.total_ms,
            "first_frame_ms": chunk.timings.first_frame_ms,
            "stages_ms": chunk.timings.stages_ms,
            "fps": self.recent_fps(),
            "prompt": session.prompt,
            "memory_bytes": resident_bytes(),
            "device_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
        }

    def recent_fps(self) -> float | None:
        """Video frames over wall time of the last chunks; None for the first chunk."""
        times = [time for time, _ in self.recent]
        num_frames = sum(count for _, count in self.recent) - self.recent[0][1]
        return num_frames / (times[-1] - times[0]) if len(times) > 1 else None

    async def send(self, kind: str, **fields: Any) -> None:
        await self.deliver(self.websocket.send_text(json.dumps({"type": kind, **fields})))

    async def deliver(self, sending: Awaitable[None]) -> None:
        """Wait until the connection has taken a message. Raises Ended if it takes nothing."""
        try:
            async with asyncio.timeout(self.shared.idle_s):
                await taken(sending)
        except TimeoutError as error:
            raise Ended(
                IDLE, f"nothing was received for {self.shared.idle_s:g} s and the stream has ended"
            ) from error

    async def end(self, end: Ended) -> None:
        """Tell the client why, if it still listens, and close."""
        # a client that has gone or takes no data need not be told
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
