"""What can be packed: clips, latents of other projects, or prompts, each item with a key."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.levels import Level

MAX_KEY = 64
IMPORTED_CODEC = "wan-vae, as imported"
"""Fingerprint for latents of other projects, none of which says which VAE they come from."""


class ClipError(UserError):
    """A clip that cannot be used. The message begins with its name; `reason` is without it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[ClipError], tuple[str, str]]:
        return type(self), (self.name, self.reason)


class DamagedClipError(ClipError):
    """A clip that is not what its maker wrote: its decoder meets errors."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a source. It holds video or latents, or a caption alone.

    caption: one line; empty if there is none. video: uint8 [T, H, W, 3]. latents: [F, C, H, W].
    text: [L, D], the caption's embedding, where the source stores one. captions: one for each of
    the source's levels. frames_left: of the file, by what it states, that are in no item.
    """

    caption: str
    video: Tensor | None = None
    latents: Tensor | None = None
    text: Tensor | None = None
    captions: Mapping[str, str] = field(default_factory=dict)
    frames_left: int = 0


@dataclass(frozen=True, slots=True)
class Video:
    """Items are video, which a codec will encode. shape: T, H, W."""

    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Latents:
    """Items are latents, or prompts of which latents are to be generated.

    shape: F, C, H, W. codec: fingerprint of the one that made them.
    """

    shape: tuple[int, ...]
    codec: str


class Source(ABC):
    """Items in a fixed order, read by number. `read` may be called from several threads."""

    batch_size = 1
    """How many captions are encoded together. Their number can change the last bits."""

    @property
    @abstractmethod
    def title(self) -> str:
        """How messages call the source."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of all items, in order, as the index gives them."""

    @property
    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What identifies the content. A resumed run must find the same."""

    @property
    @abstractmethod
    def holds(self) -> Video | Latents:
        """Of what kind and shape all items are."""

    @abstractmethod
    def read(self, number: int) -> Item:
        """Item `number`. Raises ClipError if it cannot be used."""

    @property
    def keys(self) -> list[str]:
        """Keys of all items: unique, and fit for webdataset."""
        return keys_of(self.names)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Of the captions that every item has; none where each has one caption."""
        return ()

    @property
    def settings(self) -> dict[str, Any]:
        """How items are read, for the index. A resumed run must find the same."""
        return {}

    @property
    def skipped(self) -> list[str]:
        """Names of files that lie in the source and are no items because of their suffix."""
        return []

    @property
    def text_shape(self) -> tuple[int, ...] | None:
        """L, D of the stored text embeddings; None if there are none."""
        return None

    @property
    def negative(self) -> Tensor | None:
        """[L, D]: the stored embedding of the negative prompt, if there is one."""
        return None


def keys_of(names: Iterable[str]) -> list[str]:
    """Names without their suffix, made fit for webdataset and unique.

    ASCII, no dots or slashes, at most MAX_KEY characters. A key depends on the whole list and not
    on which clips are usable, so parts and resumed runs agree on it.
    """
    keys: list[str] = []
    taken: set[str] = set()
    numbers: dict[str, int] = defaultdict(lambda: 1)
    for name in names:
        without_suffix = re.sub(r"\.[^./]*$", "", name)
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", without_suffix)[-MAX_KEY:]
        key = stem
        while key in taken:
            numbers[stem] += 1
            key = f"{stem}_{numbers[stem]}"
        taken.add(key)
        keys.append(key)
    return keys


def one_line(text: str) -> str:
    return " ".join(text.split())
