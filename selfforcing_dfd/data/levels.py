"""Captions of several levels: how much each says, how its text is stored, which one is read.

A shard folder holds one caption for each clip, or one for each of up to three levels. Which one is
read is chosen when it is read: it decides how many clips fit a caption, and so what data forcing
ties a sample to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from selfforcing_dfd import rng

Level = Literal["short", "medium", "long"]
"""A sentence; a few sentences; all that is seen."""
Choice = Literal["", "short", "medium", "long", "mixed"]
"""What a reader is asked for. Empty: the one caption there is, of several the longest. mixed: one
of the levels, drawn for each sample.
"""
LEVELS: tuple[Level, ...] = get_args(Level)

HOW_TO_MAKE = (
    "`selfforcing-dfd curate caption CLIPS` writes a table of all three for `pack CLIPS --captions "
    "TABLE`; or pack NAME.short.txt, NAME.medium.txt and NAME.long.txt beside each clip with "
    "--levels short,medium,long; in the tiny world, data.tiny.level=all makes them"
)


def levels_of(captions: Iterable[str]) -> tuple[Level, ...]:
    """The levels among some names, from short to long."""
    found = set(captions)
    return tuple(level for level in LEVELS if level in found)


def main_caption(captions: Mapping[str, str]) -> str:
    """The longest level's, which stands for a clip where one caption is wanted."""
    return captions[levels_of(captions)[-1]]


def text_member(level: str) -> str:
    """Name of the embedding in a shard; level is empty for the only caption."""
    return f"text.{level}.npy" if level else "text.npy"


def draw_level(levels: tuple[Level, ...], seed: int, name: str, counter: int) -> Level:
    """One of the levels, each as likely; a function of these arguments alone."""
    return levels[int(rng.uniform((), seed, name, counter) * len(levels))]


def unknown_level(choice: Choice, levels: tuple[Level, ...]) -> str:
    """Why a folder with these levels cannot be read as asked; empty if it can."""
    if not choice or choice in levels or (choice == "mixed" and len(levels) > 1):
        return ""
    held = f"captions of level {' and '.join(levels)}" if levels else "one caption for each clip"
    wanted = "captions of several levels" if choice == "mixed" else f"{choice} captions"
    return f"holds {held}, and {wanted} are asked for; {HOW_TO_MAKE}"
