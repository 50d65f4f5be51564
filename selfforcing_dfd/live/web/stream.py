"""One stream of the live page: a session, the chunks that are being shown, and who sees them.

Its viewer's acknowledgements set the pace: a chunk is made only while fewer than `max_queue_chunks`
are made and not yet shown. While others watch too, a chunk also counts as shown when its playing
time is over, so that a slow viewer does not hold them up.

The state before each chunk that has not begun to be shown is kept, so that a new prompt can drop
those chunks and take effect after the one on the screen.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from selfforcing_dfd.common import resident_bytes
from selfforcing_dfd.live.web.connection import Outbox, Parcel
from selfforcing_dfd.live.web.messages import HEADER, BadMessage, encode_jpeg, message_text
from selfforcing_dfd.live.web.recording import Recording
from selfforcing_dfd.live.web.script import Change, Script
from selfforcing_dfd.live.web.shared import Shared
from selfforcing_dfd.streaming.session import PromptMode, Snapshot, StreamChunk, StreamSession

RECENT_CHUNKS = 20
MAX_UNSAVED = 8
"""Chunks that wait to be encoded for the recording; a machine that is too slow leaves some out."""


@dataclass(slots=True)
class Made:
    """A chunk that the viewer has not yet shown to its end.

    frames: for the recording; None once they are in it, and for chunks that will not be shown.
    before: the stream's state before it; None for a chunk that is never taken back. due: monotonic
    time at which it has been shown to all who watch.
    """

    chunk: int
    frames: Tensor | None
    before: Snapshot | None
    due: float
    is_current: bool = True
    is_past: bool = False


@dataclass(slots=True, eq=False)
class LiveStream:
    """A stream, its state and its viewers. The first of `outboxes` is that of its owner."""

    shared: Shared
    outboxes: list[Outbox] = field(default_factory=list)
    name: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    session: StreamSession | None = None
    student: str = ""  # whose stream it is, or will be
    prompt: str = ""  # the last one that was accepted
    script: Script = field(default_factory=Script)
    picture: Image.Image | None = None  # what it begins with
    paused: bool = False
    num_chunks: int = 0  # made so far, in all sessions
    num_frames: int = 0
    made: deque[Made] = field(default_factory=deque)
    clock: float = 0.0  # when the newest chunk will have been shown
    recent: deque[tuple[float, int]] = field(
        default_factory=lambda: deque(maxlen=RECENT_CHUNKS + 1)
    )
    recording: Recording = field(init=False)
    unsaved: deque[tuple[int, Tensor]] = field(default_factory=lambda: deque(maxlen=MAX_UNSAVED))
    saving: asyncio.Task[None] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.student = self.student or self.shared.first
        self.recording = Recording(self.shared.fps)

    @property
    def is_watched(self) -> bool:
        """Whether others than its owner see it."""
        return len(self.outboxes) > 1

    def join(self, outbox: Outbox) -> None:
        """One more viewer."""
        self.outboxes.append(outbox)
        self.send("viewers", count=len(self.outboxes))

    def leave(self, outbox: Outbox) -> None:
        self.outboxes.remove(outbox)
        self.send("viewers", count=len(self.outboxes))

    def may_make(self) -> bool:
        """Whether there is room for another chunk."""
        if self.session is None or self.paused:
            return False
        self._pass_time()
        return sum(not made.is_past for made in self.made) < self.shared.max_queue_chunks

    def next_due(self) -> float | None:
        """Monotonic time at which the clock makes room; None where it never does."""
        if self.session is None or self.paused or not self.is_watched:
            return None
        return min((made.due for made in self.made if not made.is_past), default=None)

    def send(self, kind: str, **fields: Any) -> None:
        """A message for all who see the stream."""
        text = message_text(kind, **fields)
        for outbox in self.outboxes:
            outbox.put(text)

    async def begin(
        self,
        student: str,
        prompt: str,
        seed: int,
        picture: Image.Image | None,
        changes: Sequence[dict[str, Any]] = (),
    ) -> None:
        """A new stream in place of the old one, which stays if the model refuses it.

        changes: later prompts.
        """
        factory = self.shared.students[student]
        self.session = await self.shared.compute(lambda: factory.begin(prompt, seed, picture))
        self.student = student
        self.prompt = prompt
        self.picture = picture
        self._began(changes)

    async def reset(self, seed: int | None) -> None:
        """The same from its first chunk, with another seed if there is one."""
        session = self.session
        assert session is not None
        context = self.shared.students[self.student].context(self.picture)
        await self.shared.compute(lambda: session.reset(self.prompt, seed, context))
        self._began()

    async def set_prompt(self, text: str, mode: PromptMode) -> None:
        """Another prompt after the chunk that is being shown; those after it are dropped.

        Raises ValueError for a prompt that the model refuses, which changes nothing.
        """
        session = self.session
        assert session is not None
        current = [made for made in self.made if made.is_current]
        moment = current[1].before if len(current) > 1 else None

        def change() -> int:
            session.set_prompt(text, mode)
            if moment is not None:
                session.restore(moment, keeps_prompt=True)
            return session.chunk_index

        index = await self.shared.compute(change)
        self.prompt = text
        self.script.add(Change(index, text, mode), is_asked=True)
        keep = current[0].chunk if current else self.num_chunks - 1
        self.made = deque(made for made in self.made if made.chunk <= keep)
        if moment is not None:
            self.clock = current[0].due
        for outbox in self.outboxes:
            outbox.drop_after(keep)
        self._tell_prompt(mode, keep, is_planned=False)

    async def make_chunk(self) -> None:
        """The next chunk: made, encoded, and on its way to all who see the stream."""
        session = self.session
        assert session is not None
        may_drop = any(made.is_current for made in self.made)

        change = self.script.due(session.chunk_index)

        def make() -> tuple[Snapshot | None, ValueError | None, StreamChunk]:
            before = session.snapshot() if may_drop else None
            return before, change and refusal(session, change), session.next_chunk()

        before, refused, chunk = await self.shared.compute(make)
        if change is not None:
            self._came(change, refused)
        # a picture that the student goes on after is shown with the first chunk
        given = session.context_frames if chunk.chunk_index == 0 else chunk.frames[:0]
        frames = torch.cat([given, chunk.frames])
        now = time.monotonic()
        self.recent.append((now, len(frames)))
        jpegs = await asyncio.gather(
            *(asyncio.to_thread(encode_jpeg, frame) for frame in frames.numpy())
        )
        text = message_text("chunk", **self._figures(session, chunk, len(frames)))
        headers = [
            HEADER.pack(self.num_chunks, self.num_frames + place) for place in range(len(frames))
        ]
        sent = [header + jpeg for header, jpeg in zip(headers, jpegs, strict=True)]
        parcel = Parcel(self.num_chunks, text, sent)
        self.clock = max(self.clock, now) + len(frames) / self.shared.fps
        self.made.append(Made(self.num_chunks, frames, before, self.clock))
        self.num_chunks += 1
        self.num_frames += len(frames)
        self._forget()
        for outbox in self.outboxes:
            outbox.put(parcel)

    def acknowledge(self, chunk: int) -> None:
        """The owner has seen a chunk, and all before it. Raises BadMessage for one to come."""
        if chunk >= self.num_chunks:
            raise BadMessage(
                f"ack: chunk is {chunk}; want one of the {self.num_chunks} that were sent"
            )
        while self.made and self.made[0].chunk <= chunk:
            self._record(self.made.popleft())
        self._forget()

    def facts(self) -> dict[str, Any]:
        """What is shown now, as `began` says it."""
        session = self.session
        return {
            "student": self.student,
            "prompt": self.prompt,
            "seed": session.settings.seed if session else 0,
            "next_chunk": self.num_chunks,
            "has_picture": self.picture is not None,
            "unknown": self._unknown(),
            "first": self.script.first,
            "changes": self.script.told(),
            "num_coming": len(self.script.coming),
        }

    async def saved(self, first_chunk: int) -> bytes:
        """An mp4 of what was shown. Raises UserError where nothing was."""
        if self.saving is not None:
            await self.saving
        return await asyncio.to_thread(self.recording.mp4, first_chunk)

    def close(self) -> None:
        """Tell those who watch, and keep the recording alone."""
        self.ended.set()
        self.session = None
        self.picture = None
        self.made.clear()

    def _came(self, change: Change, refused: ValueError | None) -> None:
        """A prompt that the start has asked for was taken, or the stream goes on without it."""
        if refused is not None:
            self.send("error", about="prompt", message=str(refused))
            return
        self.prompt = change.text
        self.script.add(change, is_asked=False)
        self._tell_prompt(change.mode, self.num_chunks - 1, is_planned=True)

    def _tell_prompt(self, mode: PromptMode, keep: int, is_planned: bool) -> None:
        self.send(
            "prompt",
            text=self.prompt,
            mode=mode,
            keep=keep,
            from_chunk=self.num_chunks,
            unknown=self._unknown(),
            changes=self.script.told(),
            is_planned=is_planned,
        )

    def _began(self, changes: Sequence[dict[str, Any]] = ()) -> None:
        """Chunks of the stream before need not be shown, but still count as on their way."""
        self.script = Script.of(self.prompt, changes)
        for made in self.made:
            made.is_current = False
            made.frames = None
            made.before = None
        self.recent.clear()
        self.clock = 0.0
        self.send("began", **self.facts())

    def _unknown(self) -> list[str]:
        return self.shared.students[self.student].model.unknown_words(self.prompt)

    def _pass_time(self) -> None:
        """While others watch, chunks pass as a clock says."""
        now = time.monotonic()
        for made in self.made:
            if self.is_watched and made.due <= now and not made.is_past:
                made.is_past = True
                self._record(made)

    def _forget(self) -> None:
        """Keep what a prompt may still take back: bounded, and not the chunk on the screen."""
        while len(self.made) > self.shared.max_queue_chunks and self.made[0].is_past:
            self.made.popleft()
        for made in self.made:
            if made.is_current:
                made.before = None
                break

    def _record(self, made: Made) -> None:
        """A chunk has been shown."""
        if made.frames is None:
            return
        self.unsaved.append((made.chunk, made.frames))
        made.frames = None
        if self.saving is None or self.saving.done():
            self.saving = asyncio.create_task(self._save())

    async def _save(self) -> None:
        while self.unsaved:
            chunk, frames = self.unsaved.popleft()
            await asyncio.to_thread(self.recording.add, chunk, frames.numpy())

    def _figures(
        self, session: StreamSession, chunk: StreamChunk, num_frames: int
    ) -> dict[str, Any]:
        """A chunk's figures for the page. index: of the chunk in its stream."""
        device = session.model.device
        return {
            "chunk": self.num_chunks,
            "index": chunk.chunk_index,
            "num_frames": num_frames,
            "latency_ms": chunk.timings.total_ms,
            "first_frame_ms": chunk.timings.first_frame_ms,
            "stages_ms": chunk.timings.stages_ms,
            "fps": self._recent_fps(),
            "prompt": session.prompt,
            "memory_bytes": resident_bytes(),
            "device_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
        }

    def _recent_fps(self) -> float | None:
        """Video frames over wall time of the last chunks; None for the first chunk."""
        times = [time for time, _ in self.recent]
        num_frames = sum(count for _, count in self.recent) - self.recent[0][1]
        return num_frames / (times[-1] - times[0]) if len(times) > 1 else None


def refusal(session: StreamSession, change: Change) -> ValueError | None:
    """Ask for a prompt; the text encoder's error where it takes none such."""
    try:
        session.set_prompt(change.text, change.mode)
    except ValueError as error:
        return error
    return None
