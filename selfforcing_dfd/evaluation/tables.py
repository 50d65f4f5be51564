"""Rows of scores, the metrics that order them, and both as text, Markdown and JSON.

Distance to the data is two-sided everywhere: more saturated than the data is as far off as less
saturated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from selfforcing_dfd.common import UserError
from selfforcing_dfd.tiny.bootstrap import Score

DATA = "data"
TEACHER = "teacher"
START = "start"
CONTROL = "control"  # distribution matching alone
REGRESSION = "regression"  # regression on the arms' data alone
CONTROLS = (CONTROL, REGRESSION)
REFERENCES = (DATA, TEACHER, START)
NOT_JUDGED = (*REFERENCES, *CONTROLS)

FEWEST = 8  # clips from which a mean is stated; bootstrap intervals of fewer are too short
TERMINAL = 100  # columns that a table in a terminal may take

MARKS = (
    "= touches the data's interval, ↑ lies above it, ↓ below it. "
    "Nearer to the data is better, from either side."
)

Mark = Literal["", "=", "↑", "↓"]
Outcome = Literal["helped", "harmed", "mixed", "no clear difference"]


class ReportError(UserError):
    """A report that cannot be made or read; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One source of clips with its scores.

    modes: number of moving clips in each mode of the world; empty where the world has no modes.
    seconds: to generate and measure the clips. marks: only for a row that combines several runs;
    on which side of the data the row is in every run. There a score is the mean over runs with the
    smallest and the largest run's value, and its n is the number of runs.
    """

    name: str
    about: str
    scores: Mapping[str, Score]
    modes: tuple[int, ...] = ()
    seconds: float = 0.0
    marks: Mapping[str, Mark] | None = None

    def mark(self, key: str, data: Row | None) -> Mark:
        """On which side of the data's score this row's lies; empty for the data itself."""
        if data is None or data.name == self.name:
            return ""
        if self.marks is not None:
            return self.marks.get(key, "")
        return against(self.scores.get(key), data.scores.get(key))


@dataclass(frozen=True, slots=True)
class Run:
    """The rows of one report among several. start: the weights that its students began from."""

    start: str
    rows: Sequence[Row]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence of the verdict. outcome is empty where no rule was applied."""

    name: str
    outcome: Outcome | Literal[""]
    text: str


@dataclass(frozen=True, slots=True)
class Metric:
    """A line of the table.

    far: the distance to the data's value from which a cell has its strongest colour. fewest: the
    number of clips from which the metric is stated.
    """

    key: str
    title: str
    digits: int
    far: float
    about: str
    fewest: int = FEWEST


Metrics = Sequence[Metric]


def stated(scores: Mapping[str, Score], metrics: Metrics) -> dict[str, Score]:
    """The scores, with NaN in place of those that too few clips stand behind."""
    fewest = {metric.key: metric.fewest for metric in metrics}
    unknown = {
        key: Score(math.nan, math.nan, math.nan, score.n)
        for key, score in scores.items()
        if score.n < fewest.get(key, 0)
    }
    return {**scores, **unknown}


def shown(rows: Sequence[Row], metrics: Metrics) -> list[Metric]:
    """The metrics that at least one of these rows has."""
    return [metric for metric in metrics if any(metric.key in row.scores for row in rows)]


def find(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row.name == name), None)


def number(value: float, digits: int) -> str:
    """A fixed number of digits; a mean of counts keeps one where it is not whole."""
    if not math.isfinite(value):
        return "-"
    if digits == 0 and value != round(value):
        digits = 1
    if not round(value, digits):
        value = 0.0  # never -0.00
    return f"{value:.{digits}f}"


def interval(score: Score, digits: int) -> str:
    if not math.isfinite(score.value):
        return ""
    return f"[{number(score.low, digits)} {number(score.high, digits)}]"


def against(score: Score | None, data: Score | None) -> Mark:
    """= if the two intervals touch, else whether the score lies above or below the data's.

    Empty where one of them is missing or NaN.
    """
    if score is None or data is None:
        return ""
    if not (math.isfinite(score.value) and math.isfinite(data.value)):
        return ""
    if score.low > data.high:
        return "↑"
    return "↓" if score.high < data.low else "="


def cell(row: Row, metric: Metric, data: Row | None, with_interval: bool = True) -> str:
    """`value [low high] mark`; the data has no mark."""
    score = row.scores.get(metric.key)
    if score is None:
        return "-"
    between = interval(score, metric.digits) if with_interval else ""
    parts = (number(score.value, metric.digits), between, row.mark(metric.key, data))
    return " ".join(part for part in parts if part)


def table_of(rows: Sequence[Row], metrics: Metrics, with_interval: bool = True) -> list[list[str]]:
    """A head with the names of all rows, then each metric's title with the rows' cells."""
    data = find(rows, DATA)
    table = [["", *[row.name for row in rows]]]
    for metric in shown(rows, metrics):
        cells = [cell(row, metric, data, with_interval) for row in rows]
        table.append([metric.title, *cells])
    return table


def plain_table(rows: Sequence[Row], metrics: Metrics) -> str:
    """Metrics down, sources across, for a terminal; without intervals if these are too wide."""
    text = aligned(table_of(rows, metrics))
    if max(map(len, text.splitlines())) > TERMINAL:
        text = aligned(table_of(rows, metrics, with_interval=False))
    return text


def aligned(table: Sequence[Sequence[str]]) -> str:
    """The lines of a table in columns, with a rule below the first."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for line in table:
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row], metrics: Metrics) -> str:
    table = table_of(rows, metrics)
    table[0][0] = "metric"
    table.insert(1, ["---"] * (len(rows) + 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in table).replace("||", "‖")


def described(rows: Sequence[Row], metrics: Metrics) -> list[Finding]:
    """One sentence for each row that is no reference: what sets it apart from the data.

    If all rows are references, all but the data are described. Raises ReportError without data.
    """
    data = find(rows, DATA)
    if data is None:
        raise ReportError("no row called data to hold the others against; keep the data row")
    judged = [row for row in rows if row.name not in NOT_JUDGED]
    others = [row for row in rows if row is not data]
    return [Finding(row.name, "", _differences(row, data, metrics)) for row in judged or others]


def _differences(row: Row, data: Row, metrics: Metrics) -> str:
    apart = [
        f"{metric.title} {number(row.scores[metric.key].value, metric.digits)} "
        f"(data {number(data.scores[metric.key].value, metric.digits)})"
        for metric in metrics
        if row.mark(metric.key, data) in ("↑", "↓")
    ]
    if apart:
        return f"{row.name} differs from the data: {', '.join(apart)}."
    return f"{row.name} cannot be told from the data: every interval touches the data's."


def to_json(row: Row) -> dict[str, Any]:
    """A row as JSON: what is not a number is null."""
    saved = {
        "name": row.name,
        "about": row.about,
        "scores": {key: _score_to_json(score) for key, score in row.scores.items()},
        "modes": list(row.modes),
        "seconds": row.seconds,
    }
    if row.marks is not None:
        saved["marks"] = dict(row.marks)
    return saved


def from_json(saved: Mapping[str, Any]) -> Row:
    """Inverse of `to_json`. Raises ReportError for something else."""
    try:
        return Row(
            name=saved["name"],
            about=saved["about"],
            scores={key: _score_from_json(score) for key, score in saved["scores"].items()},
            modes=tuple(saved["modes"]),
            seconds=saved["seconds"],
            marks=saved.get("marks"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"not a row of a report: {error!r}; write the report again") from error


def _score_to_json(score: Score) -> dict[str, float | int | None]:
    ends = {"value": score.value, "low": score.low, "high": score.high}
    finite = {name: value if math.isfinite(value) else None for name, value in ends.items()}
    return {**finite, "n": score.n}


def _score_from_json(saved: Mapping[str, Any]) -> Score:
    ends = (saved["value"], saved["low"], saved["high"])
    value, low, high = (math.nan if end is None else float(end) for end in ends)
    return Score(value, low, high, int(saved["n"]))
