from __future__ import annotations

import pytest
import torch

from selfforcing_dfd.tiny.text import TinyText


def test_zeros_from_the_end_on() -> None:
    """Catches padding with a word, and an empty caption that is not empty.

    The network recognises padding by its zeros.
    """
    text = TinyText(dim=8, length=5).encode(["a red disc", "", "..."])
    assert (text[0, :3].norm(dim=-1) > 0).all()
    assert not text[0, 3:].any()
    assert not text[1:].any()


def test_words_do_not_depend_on_vocabulary_or_company() -> None:
    """Catches vectors drawn in order of appearance, or keyed by Python's salted hash()."""
    one = TinyText().encode(["red disc"])
    other = TinyText().encode(["an unheard-of caption of seven words", "disc, RED"])
    assert torch.equal(one[0, [1, 0]], other[1, :2])
    assert TinyText().fingerprint == "tiny-text-32x12"


def test_words_are_of_unit_size_and_different() -> None:
    """Catches hash collisions by truncation, and sizes above the network's other inputs."""
    words = [
        "disc",
        "square",
        "cross",
        "red",
        "yellow",
        "green",
        "cyan",
        "blue",
        "magenta",
        "right",
        "down",
    ]
    text = TinyText().encode([" ".join(words)])[0, : len(words)]
    # norm sqrt(dim) by construction, to float32 rounding
    torch.testing.assert_close(text.norm(dim=-1), torch.full((len(words),), 32**0.5))
    # Random directions in 32 dimensions: a cosine of .75 among 55 pairs has probability 1e-5.
    cosine = (
        torch.nn.functional.normalize(text, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
    )
    assert (cosine - torch.eye(len(words))).abs().max() < 0.75


def test_too_many_words_are_refused_with_their_number() -> None:
    """Catches a caption cut in silence."""
    with pytest.raises(ValueError, match="3 words"):
        TinyText(length=2).encode(["a red disc"])
