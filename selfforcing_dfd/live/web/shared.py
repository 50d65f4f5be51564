"""What all viewers of the live page share: students, limits, and the thread that computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from PIL import Image
from torch import Tensor

from selfforcing_dfd.codecs.small_codec import SmallCodec
from selfforcing_dfd.common import UserError
from selfforcing_dfd.live.web.messages import MAX_SEED, MAX_TEXT
from selfforcing_dfd.live.web.pictures import MAX_PICTURE_BYTES, PictureError, as_context
from selfforcing_dfd.live.web.recording import KEEP_S
from selfforcing_dfd.streaming.ring import RingCache
from selfforcing_dfd.streaming.session import PromptMode, StreamModel, StreamSession, StreamSettings

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Student:
    """A model that the page offers, and how its streams run."""

    model: StreamModel
    settings: StreamSettings

    @property
    def needs_picture(self) -> bool:
        """Whether it was trained to begin with a picture, and makes none itself."""
        return self.model.num_given_video_frames > 0

    def begin(self, prompt: str, seed: int, picture: Image.Image | None = None) -> StreamSession:
        """A new stream. Raises ValueError for a prompt or picture that the model refuses."""
        settings = replace(self.settings, seed=seed)
        return StreamSession(self.model, prompt, settings, self.context(picture))

    def context(self, picture: Image.Image | None) -> Tensor | None:
        """What a stream begins with. Raises PictureError where a picture is missing."""
        if picture is not None:
            return as_context(picture, self.model.video_size)
        if self.needs_picture:
            raise PictureError("this student begins with a picture; choose one")
        return None

    def facts(self) -> dict[str, Any]:
        """What the page shows of it. Raises UserError for settings that do not fit the model."""
        if self.model.num_given_video_frames > 1:
            raise UserError(
                f"this student begins with {self.model.num_given_video_frames} given video frames, "
                "and the page takes single pictures; use `stream --video FILE` without --serve"
            )
        height, width = self.model.video_size
        ring = RingCache(
            self.model.kv_shape(),
            self.model.chunk_frames,
            self.settings.sink_frames,
            self.settings.window_frames,
            self.settings.positions,
            dtype=self.model.dtype,
            device="meta",  # without memory: for its checks and sizes
        )
        return {
            "about": describe(self.model),
            "needs_picture": self.needs_picture,
            "width": width,
            "height": height,
            "num_steps": len(self.model.ladder),
            "chunk_frames": self.model.chunk_frames,
            "visible_frames": ring.num_frames,
            "sink_frames": self.settings.sink_frames,
            "window_frames": self.settings.window_frames,
            "positions": self.settings.positions,
            "cache_bytes": ring.num_bytes,
        }


def describe(model: StreamModel) -> str:
    """A model in one line."""
    height, width = model.video_size
    parameters = sum(parameter.numel() for parameter in model.student.parameters())
    small = ""
    if isinstance(model.codec, SmallCodec):
        small = f", small decoder {Path(model.codec.name).name} {model.codec.fidelity}".rstrip()
    return (
        f"{parameters / 1e6:.1f} M parameters on {model.device}, "
        f"{model.passes_in_words} a chunk, {width} x {height} pixels{small}"
    )


def one_thread() -> ThreadPoolExecutor:
    """What computes for all viewers."""
    return ThreadPoolExecutor(1, "stream")


@dataclass(slots=True)
class Shared:
    """The students by name, the limits, and the one thread that computes.

    The first student is shown first, and its settings hold the page's first seed and mode. fps: at
    which the page plays. idle_s: seconds after which an inactive viewer is disconnected. examples:
    prompts. Raises UserError for limits and settings that do not fit.
    """

    students: Mapping[str, Student]
    fps: float
    idle_s: float
    max_queue_chunks: int
    examples: Sequence[str]
    worker: ThreadPoolExecutor
    facts: list[dict[str, Any]] = field(init=False)  # of every student, with its name

    def __post_init__(self) -> None:
        if not self.students:
            raise UserError("there are no students; the page shows at least one")
        if not 0 < self.fps <= 240:
            raise UserError(f"fps is {self.fps}; want more than 0 and at most 240, such as 16")
        if self.idle_s <= 0 or self.max_queue_chunks < 1:
            raise UserError(
                f"idle_s is {self.idle_s} and max_queue_chunks {self.max_queue_chunks}; "
                "want more than 0 and at least 1"
            )
        seed = self.students[self.first].settings.seed
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed is {seed}; the page takes 0 to {MAX_SEED}")
        self.facts = [{"name": name, **student.facts()} for name, student in self.students.items()]

    @property
    def first(self) -> str:
        """The student that every viewer sees first."""
        return next(iter(self.students))

    async def compute(self, job: Callable[[], Result]) -> Result:
        """Run a job on the worker thread, after the jobs that wait there."""
        return await asyncio.get_running_loop().run_in_executor(self.worker, job)

    def hello(self) -> dict[str, Any]:
        """What the page needs to know."""
        settings = self.students[self.first].settings
        return {
            "students": self.facts,
            "fps": self.fps,
            "modes": get_args(PromptMode),
            "mode": settings.on_prompt,
            "seed": settings.seed,
            "max_seed": MAX_SEED,
            "max_text": MAX_TEXT,
            "examples": list(self.examples),
            "max_queue_chunks": self.max_queue_chunks,
            "idle_s": self.idle_s,
            "keep_s": KEEP_S,
            "max_picture_bytes": MAX_PICTURE_BYTES,
        }
