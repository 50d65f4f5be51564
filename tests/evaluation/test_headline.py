"""The sentence and the rows that a report opens with, on made-up rows."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_rows import NAN, row

from selfforcing_dfd.evaluation.combine import combined_row
from selfforcing_dfd.evaluation.headline import label, shown_first
from selfforcing_dfd.evaluation.tables import Row
from selfforcing_dfd.evaluation.worlds import TINY, VIDEO

COUNTS = {"data": 54, "teacher": 51, "start": 10, "control": 14, "caption": 20, "stable": 47}
KINDS = "kinds of motion (colour, direction and speed)"


def counting(name: str, modes: float) -> Row:
    return row(name, modes=(modes, 2.0))


def rows(*names: str) -> list[Row]:
    return [counting(name, COUNTS[name]) for name in names]


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (list(COUNTS), ["data", "control", "caption", "stable"]),
        (["data", "teacher", "start", "student"], ["data", "start", "student"]),
        (["data", "teacher", "student"], ["data", "student"]),
        (["teacher", "start", "control", "stable"], ["control", "stable"]),
        (["data", "teacher"], ["data", "teacher"]),
    ],
)
def test_data_and_what_was_trained_come_first(names: list[str], first: list[str]) -> None:
    """Catches an arm that the strip leaves out, another order, and a teacher between the arms."""
    assert shown_first(names) == first


def test_sentence_has_the_rows_own_numbers() -> None:
    """Catches numbers of another row or metric, a row left out, and a number of clips made up."""
    assert TINY.headline(rows(*COUNTS), 256) == (
        f"Real clips show 54 {KINDS}; for the same captions, control (DMD alone) shows 14, "
        "caption 20 and stable 47 (256 clips each, one run)."
    )
    single = [*rows("data", "teacher", "start"), counting("student", 33)]
    assert TINY.headline(single, 8) == (
        f"Real clips show 54 {KINDS}; for the same captions, the start shows 10 and student 33 "
        "(8 clips each, one run)."
    )
    assert TINY.headline(rows("data", "teacher"), 8) == (
        f"Real clips show 54 {KINDS}; for the same captions, the teacher shows 51 "
        "(8 clips each, one run)."
    )


def test_sentence_over_runs_has_means_and_says_so() -> None:
    """Catches a mean over runs that is read as one run's number."""
    data = rows("data", "data")
    control = [counting("control", modes) for modes in (14, 15)]
    joined = [combined_row(several, data) for several in (data, control)]
    assert TINY.headline(joined, 256, num_runs=2) == (
        f"Real clips show 54 {KINDS}; for the same captions, control (DMD alone) shows 14.5 "
        "(256 clips each, means over 2 runs)."
    )


def test_no_sentence_without_numbers() -> None:
    """Catches a sentence that claims something of rows that were not counted."""
    assert TINY.headline(rows("control", "stable"), 256) == ""
    assert TINY.headline(rows("data"), 256) == ""
    assert TINY.headline([*rows("data", "control"), counting("stable", NAN)], 256) == ""
    uncounted = dataclasses.replace(rows("control")[0], scores={})
    assert TINY.headline([*rows("data"), uncounted], 256) == ""
    assert VIDEO.headline(rows("data", "control"), 256) == ""


def test_label_leaves_out_details() -> None:
    """Catches whole descriptions over a strip, which has room for a few words."""
    assert label("DMD alone, without data forcing; 24 student updates") == (
        "DMD alone, without data forcing"
    )
    assert label("data forcing, pairing prefix: the first chunk; 24") == (
        "data forcing, pairing prefix"
    )
    assert label("real clips") == "real clips"
