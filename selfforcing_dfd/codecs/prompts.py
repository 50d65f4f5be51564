"""Wan's conventions for prompts."""

from __future__ import annotations

import html
import re

import ftfy

from selfforcing_dfd.common import UserError

MAX_LENGTH = 512  # tokens, the end included; Wan2.1's text_len
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan2.1's own negative prompt (sample_neg_prompt of its shared config), for the unconditional half
of guidance. It is encoded like any other prompt.
"""


class TextError(UserError):
    """Files, a tokenizer, prompts or embeddings that cannot be used."""


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan encodes it.

    ftfy repairs broken characters, HTML entities are decoded twice, and white space is collapsed
    and stripped.
    """
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def check_captions(captions: list[str]) -> None:
    """Raise TextError for no captions, and for one string instead of a list."""
    if isinstance(captions, str) or not captions:
        raise TextError(f"captions are {captions!r}; want a list of at least one string")
