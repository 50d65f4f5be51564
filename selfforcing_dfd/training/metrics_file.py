"""A metrics file of which some lines are damaged: what can be read of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfforcing_dfd.training.tracking import counts_of, read_line


@dataclass(frozen=True, slots=True)
class Metrics:
    """lines: by kind of turn and count, in the file's order. unreadable: numbers of damaged lines,
    those with NUL bytes among them, of which the rest may be readable.

    num_doubled: lines whose turn has a later line.
    """

    lines: dict[tuple[str, int], dict[str, Any]]
    unreadable: list[int]
    num_doubled: int

    def text(self) -> str:
        """The readable lines as a file."""
        return "".join(json.dumps(line) + "\n" for line in self.lines.values())


def read_all_metrics(path: Path) -> Metrics:
    """Every line that can be read, whatever became of the others."""
    good = []
    unreadable = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        text = raw.strip(b"\0")
        if text != raw:
            unreadable.append(number)
        try:
            good.append(read_line(text.decode("utf-8")))
        except ValueError:
            if text and text == raw:
                unreadable.append(number)
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for line, count in zip(good, counts_of(good), strict=True):
        lines[line["kind"], count] = line
    return Metrics(lines, unreadable, len(good) - len(lines))
