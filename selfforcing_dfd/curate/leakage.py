"""Clips that must stay out of training because the model will be evaluated on their captions.

A caption leaks a prompt if, in words without case and punctuation,

- they are equal, or
- one has at least CONTAINED words, and every sequence of five of its words is in the other, or
- they share at least `near` of all their sequences of five words (Jaccard index).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SEQUENCE = 5  # words
CONTAINED = 8  # words of a text that is found in another one
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")  # each ideograph is a word


def words_of(text: str) -> tuple[str, ...]:
    """Words in lower case, without punctuation; compatible letters are the same."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def sequences_of(words: Sequence[str]) -> set[tuple[str, ...]]:
    """All sequences of five words; none of a shorter text."""
    return {tuple(words[n : n + SEQUENCE]) for n in range(len(words) - SEQUENCE + 1)}


@dataclass(frozen=True, slots=True)
class Leak:
    """how: equal, contained or near."""

    prompt: str
    how: str


class Gate:
    """Compares captions with all evaluation prompts at once."""

    def __init__(self, prompts: Iterable[str], near: float) -> None:
        self.prompts = list(prompts)
        self.near = near
        self._equal: dict[tuple[str, ...], int] = {}
        self._with: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._lengths: list[int] = []
        self._sequences: list[int] = []
        for number, prompt in enumerate(self.prompts):
            words = words_of(prompt)
            sequences = sequences_of(words)
            self._equal.setdefault(words, number)
            self._lengths.append(len(words))
            self._sequences.append(len(sequences))
            for sequence in sequences:
                self._with[sequence].append(number)

    def leak(self, caption: str) -> Leak | None:
        """The first prompt that this caption leaks, if there is one."""
        words = words_of(caption)
        if words in self._equal:
            return Leak(self.prompts[self._equal[words]], "equal")
        sequences = sequences_of(words)
        shared: Counter[int] = Counter()
        for sequence in sequences:
            shared.update(self._with.get(sequence, ()))
        for number in sorted(shared):
            how = self._likeness(number, len(words), len(sequences), shared[number])
            if how:
                return Leak(self.prompts[number], how)
        return None

    def _likeness(self, number: int, num_words: int, num_sequences: int, shared: int) -> str:
        of_prompt = self._sequences[number]
        prompt_in_caption = shared == of_prompt and self._lengths[number] >= CONTAINED
        caption_in_prompt = shared == num_sequences and num_words >= CONTAINED
        if prompt_in_caption or caption_in_prompt:
            return "contained"
        if shared >= self.near * (of_prompt + num_sequences - shared):
            return "near"
        return ""
