"""Captions of three levels in one reply of a language model, with what is missing made up.

The model is asked for tagged text. What it forgets is made of what it wrote, by rules without
chance; the share of made-up captions says whether a model and a prompt do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from selfforcing_dfd.data.levels import LEVELS, Level

PROMPT = """\
You describe video clips for training a video generator. You see frames of one clip in their order.
Write three descriptions of the clip, each after its tag:
[SHORT] one sentence: subject and action.
[MEDIUM] 150 to 180 words: key subject, actions, setting, style.
[LONG] 250 to 300 words: the subject's appearance, actions, expressions, environment, camera work,
visual style.
Describe what is seen, in plain sentences. Write nothing before, between or after the three."""
MOST_TOKENS = 1024  # three captions take about 700
MOST_WORDS = {"short": 40, "medium": 180}
"""Of captions that are made of a longer one."""

_IN_BRACKETS = r"[\[【]\s*(SHORT|MEDIUM|LONG)\s*[\]】]"
_BEGINS_LINE = r"^[*#_ ]*(SHORT|MEDIUM|LONG)(?=[*_ ]*:)"
_TAG = re.compile(
    rf"[*#_\s]*(?:{_IN_BRACKETS}|{_BEGINS_LINE})[*_]*\s*:?[*_]*", re.IGNORECASE | re.MULTILINE
)
_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL | re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?。！？]+[\"')\]”’]*(?=\s|$)|[。！？]")  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class Parsed:
    """captions: one for each level. made_up: levels that the model did not write, or not to the
    end.
    """

    captions: dict[str, str]
    made_up: tuple[Level, ...]


def parse(reply: str, finished: bool = True) -> Parsed | None:
    """The captions in a reply; None for one without text.

    finished: the model ended by itself; else its last caption is cut back to a whole sentence and
    counts as made up. A reply without tags is a long caption.
    """
    stated = _stated(_THOUGHT.sub("", reply))
    if not stated:
        return None
    made_up = {level for level in LEVELS if level not in stated}
    if not finished:
        last = list(stated)[-1]
        stated[last] = _whole_sentences(stated[last])
        made_up.add(last)
    long = stated.get("long") or stated.get("medium") or stated["short"]
    medium = stated.get("medium") or shortened(long, MOST_WORDS["medium"])
    short = stated.get("short") or first_sentence(medium)
    captions: dict[str, str] = {"short": short, "medium": medium, "long": long}
    return Parsed(captions, tuple(level for level in LEVELS if level in made_up))


def _stated(reply: str) -> dict[Level, str]:
    """The text after each tag, in one line; of a tag that comes twice the first with text."""
    found: dict[Level, str] = {}
    tags = list(_TAG.finditer(reply))
    ends = [*(tag.start() for tag in tags), len(reply)][1:]
    for tag, end in zip(tags, ends, strict=True):
        named = (tag[1] or tag[2]).lower()
        level = next(level for level in LEVELS if level == named)
        text = _cleaned(reply[tag.end() : end])
        if text:
            found.setdefault(level, text)
    text = "" if tags else _cleaned(reply)
    if text:
        found["long"] = text
    return found


def _cleaned(text: str) -> str:
    """One line, without the marks of Markdown around it."""
    return " ".join(text.split()).strip("*#_` ").strip()


def shortened(text: str, most_words: int) -> str:
    """The whole sentences among the first words, or these words if no sentence ends there."""
    words = text.split()
    if len(words) <= most_words:
        return text
    return _whole_sentences(" ".join(words[:most_words]))


def first_sentence(text: str) -> str:
    end = _SENTENCE.search(text)
    return shortened(text[: end.end()] if end else text, MOST_WORDS["short"])


def _whole_sentences(text: str) -> str:
    """Without a last sentence that does not end, unless it is the only one."""
    ends = [end.end() for end in _SENTENCE.finditer(text)]
    return text[: ends[-1]] if ends else text
