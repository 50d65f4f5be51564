"""Which prompt starts at which chunk: a file of lines `at: prompt`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Self

from selfforcing_dfd.common import UserError

FORMAT = "write `at: prompt`, where at is a chunk (12) or a time (3.5s), as in `0: a disc moves`"
LINE = re.compile(
    r"(?P<at>[0-9]{1,12}|(?P<seconds>[0-9]{1,12}(\.[0-9]{1,12})?)s)\s*:\s*(?P<prompt>.*)"
)


class PromptError(UserError):
    """A schedule that cannot be used; the message begins with the line."""


@dataclass(frozen=True, slots=True)
class ChunkClock:
    """Where chunks begin, in video frames.

    The first latent frame of a stream is one video frame, every other one `stride`. after_context:
    the stream continues an image or a clip, so its first chunk is as long as all others.
    """

    chunk_frames: int = 3
    stride: int = 4
    after_context: bool = False

    def chunk_from(self, video_frame: Fraction) -> int:
        """The first chunk that starts at or after a video frame, counted from chunk 0's start."""
        if video_frame <= 0:
            return 0
        missing = 0 if self.after_context else self.stride - 1
        return math.ceil((video_frame + missing) / (self.chunk_frames * self.stride))


@dataclass(frozen=True, slots=True)
class PromptSchedule:
    """Pairs (chunk, prompt), the first at chunk 0, each later one at a later chunk."""

    prompts: tuple[tuple[int, str], ...]

    @property
    def first(self) -> str:
        return self.prompts[0][1]

    def at(self, chunk_index: int) -> str | None:
        """The prompt that starts at this chunk, if one does."""
        return dict(self.prompts).get(chunk_index)

    @classmethod
    def parse(cls, text: str, fps: float, clock: ChunkClock | None = None) -> Self:
        """Lines `at: prompt`; blank lines and lines that begin with # are comments.

        fps: video frames in a second. Raises PromptError with the line's number for another format,
        for lines out of order, and for a missing start.
        """
        clock = clock or ChunkClock()
        prompts: list[tuple[int, str]] = []
        for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            chunk, prompt = parse_line(line.strip(), number, fps, clock)
            if not prompts and chunk:
                raise PromptError(
                    f"line {number}: the first prompt starts at chunk {chunk}; let it start at 0"
                )
            if prompts and chunk <= prompts[-1][0]:
                is_same = chunk == prompts[-1][0]
                why = "the same chunk, and a chunk has one prompt" if is_same else "out of order"
                raise PromptError(
                    f"line {number}: starts at chunk {chunk}, the one before it at chunk "
                    f"{prompts[-1][0]}: {why}; let each start later"
                )
            prompts.append((chunk, prompt))
        if not prompts:
            raise PromptError(f"line 1: there is no prompt in the schedule; {FORMAT}")
        return cls(tuple(prompts))

    @classmethod
    def read(cls, path: Path | str, fps: float, clock: ChunkClock | None = None) -> Self:
        """`parse` for a file in UTF-8. Messages of PromptError begin with the file's name."""
        try:
            return cls.parse(Path(path).read_text(encoding="utf-8"), fps, clock)
        except OSError as error:
            raise PromptError(
                f"{path}: cannot be read ({error.strerror}); name a file of lines {FORMAT[6:]}"
            ) from error
        except UnicodeDecodeError as error:
            raise PromptError(
                f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8"
            ) from error
        except PromptError as error:
            raise PromptError(f"{path}, {error}") from error


def parse_line(line: str, number: int, fps: float, clock: ChunkClock) -> tuple[int, str]:
    """Chunk and prompt of one line."""
    match = LINE.fullmatch(line)
    if match is None:
        raise PromptError(f"line {number}: got {line[:60]!r}; {FORMAT}")
    if not match["prompt"]:
        raise PromptError(f"line {number}: {match['at']} has no prompt after the colon; {FORMAT}")
    if match["seconds"] is None:
        return int(match["at"]), match["prompt"]
    video_frame = Fraction(match["seconds"]) * Fraction(fps).limit_denominator(1001)
    return clock.chunk_from(video_frame), match["prompt"]
