"""What a report shows first: the rows of its strip, and one sentence for a stranger."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from selfforcing_dfd.evaluation.tables import (
    CONTROL,
    DATA,
    REFERENCES,
    REGRESSION,
    START,
    TEACHER,
    Row,
    find,
    number,
)

IN_WORDS = {
    CONTROL: "control (DMD alone)",
    REGRESSION: "regression alone",
    START: "the start",
    TEACHER: "the teacher",
}
"""Rows whose names alone say too little."""


def shown_first(names: Sequence[str]) -> list[str]:
    """The rows that a report shows first, of the names of all: data and what was trained.

    A single run has nothing else beside it, so its start is shown as well. The teacher is shown
    only in the report of its own training.
    """
    trained = [name for name in names if name not in REFERENCES]
    wanted = {DATA, *trained}
    if len(trained) == 1:
        wanted.add(START)
    if not trained:
        wanted.add(TEACHER)
    return [name for name in names if name in wanted]


def label(about: str) -> str:
    """The first words of a row's description, before any details."""
    return re.split("[:;]", about, maxsplit=1)[0]


def counted(rows: Sequence[Row], key: str, what: str, num_clips: int, num_runs: int = 1) -> str:
    """One sentence: how many of something the data show, and how many each trained row.

    key: of a score that counts. what: the things counted, in plain words. num_clips: of each row
    and run. Empty without data, without a row beside them, or where a count is not known.
    """
    names = shown_first([row.name for row in rows])
    shown = [row for row in rows if row.name in names]
    data = find(shown, DATA)
    known = all(key in row.scores and math.isfinite(row.scores[key].value) for row in shown)
    if data is None or len(shown) < 2 or not known:
        return ""
    counts = {row.name: number(row.scores[key].value, 0) for row in shown}
    real = counts.pop(DATA)
    told: list[str] = []
    for name, count in counts.items():
        verb = "" if told else "shows "
        told.append(f"{IN_WORDS.get(name, name)} {verb}{count}")
    runs = "one run" if num_runs == 1 else f"means over {num_runs} runs"
    return (
        f"Real clips show {real} {what}; for the same captions, {joined(told)} "
        f"({num_clips} clips each, {runs})."
    )


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
