"""Scores of the samples that a run made while it trained: a file of lines, and its plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import atomic_file
from selfforcing_dfd.evaluation.curves import Panel, Series
from selfforcing_dfd.evaluation.tables import Metrics

SCORES = Path("samples/scores.jsonl")  # in a run's folder


def note_scores(path: Path, student_update: int, scores: Mapping[str, float]) -> None:
    """Add a line; those of later updates, from before a run went back, are dropped."""
    kept = [line for line in read_scores(path) if line["student_update"] < student_update]
    known = {key: value if math.isfinite(value) else None for key, value in scores.items()}
    kept.append({"student_update": student_update, "scores": known})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's scores; none without a file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score_panels(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Metrics, colours: Mapping[str, int]
) -> list[Panel]:
    """A plot for each metric, with the runs of a comparison beside each other.

    runs: name -> lines of its scores.
    """
    drawn = []
    for metric in metrics:
        series = []
        for name, lines in runs.items():
            points = tuple(
                (line["student_update"], line["scores"][metric.key])
                for line in lines
                if line["scores"].get(metric.key) is not None
            )
            if points:
                series.append(Series(name, points, colours[name]))
        if series:
            drawn.append(Panel(f"Samples: {metric.title}", "while training", tuple(series)))
    return drawn
