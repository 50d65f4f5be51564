"""The prompts of a stream and the chunks at which they came, so that a link can tell them again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from selfforcing_dfd.streaming.session import PromptMode

MAX_CHANGES = 50


class Change(NamedTuple):
    """A prompt, and the first chunk of its stream that has it."""

    chunk: int
    text: str
    mode: PromptMode


@dataclass(slots=True)
class Script:
    """Those that came, and those that a link has brought and that are still to come.

    is_whole: False after more than MAX_CHANGES; the oldest are then forgotten.
    """

    first: str = ""
    coming: deque[Change] = field(default_factory=deque)
    past: list[Change] = field(default_factory=list)
    is_whole: bool = True

    @classmethod
    def of(cls, first: str, changes: Iterable[dict[str, Any]]) -> Script:
        """What a start asks for."""
        return cls(first, deque(Change(**each) for each in changes))

    def due(self, chunk: int) -> Change | None:
        """What comes with this chunk of the stream; it is taken out."""
        if self.coming and self.coming[0].chunk <= chunk:
            return self.coming.popleft()
        return None

    def add(self, change: Change, is_asked: bool) -> None:
        """A prompt came. Those of the same chunk or later ones were taken back by it.

        is_asked: by a viewer, who steers from now on.
        """
        if is_asked:
            self.coming.clear()
        self.past = [each for each in self.past if each.chunk < change.chunk]
        self.past.append(change)
        if len(self.past) > MAX_CHANGES:
            self.is_whole = False
            del self.past[0]

    def told(self) -> list[dict[str, Any]] | None:
        """All changes in order, as a start takes them; None where some are forgotten."""
        if not self.is_whole:
            return None
        changes = [*self.past, *self.coming]
        return [each._asdict() for each in changes]
