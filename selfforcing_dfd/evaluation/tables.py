"""Rows of scores as text, and the verdict that follows from them by a stated rule.

Distance to the data is two-sided everywhere: more saturated than the data is as far off as less
saturated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from selfforcing_dfd.common import UserError
from selfforcing_dfd.tiny.metrics import Score
from selfforcing_dfd.tiny.world import MODE_PRIOR

DATA, TEACHER, START, CONTROL = "data", "teacher", "start", "control"
REFERENCES = (DATA, TEACHER, START)  # rows that are not judged

VALIDITY_MARGIN = 0.05  # an arm may lose this much validity and still count as having helped
FEWEST = 8  # clips from which a mean is stated; bootstrap intervals of fewer are too short
# fewer clips than modes: the prior that smooths the sample's law dominates it
FEWEST_FOR_MODES = len(MODE_PRIOR)

RULE = (
    "The verdict's rule: an arm helped if its KL(prior || sample) lies below the control's with disjoint intervals and "
    f"its validity is at most {VALIDITY_MARGIN} lower; it harmed if its validity falls by more than that and with "
    "disjoint intervals, or if its contrast or its speed falls below those of control, data and teacher alike; both is "
    "mixed, neither no clear difference."
)
MARKS = "= touches the data's interval, ↑ lies above it, ↓ below it. Nearer to the data is better, from either side."

Mark = Literal["", "=", "↑", "↓"]
Outcome = Literal["helped", "harmed", "mixed", "no clear difference"]


class ReportError(UserError):
    """A report that cannot be made or read; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One source of clips. modes: its valid clips in each mode of MODE_PRIOR; seconds: to generate
    and read them.

    Combined over seeds, a score is the mean with the smallest and the largest seed's value, n is
    the number of seeds, and marks say on which side of the data the row is in every seed.
    """

    name: str
    about: str
    scores: Mapping[str, Score]
    modes: tuple[int, ...]
    seconds: float = 0.0
    marks: Mapping[str, Mark] | None = None

    def mark(self, key: str, data: Row | None) -> Mark:
        """Where this row's score lies from the data's; nothing for the data itself."""
        if data is None or data.name == self.name:
            return ""
        if self.marks is not None:
            return self.marks.get(key, "")
        return against(self.scores.get(key), data.scores.get(key))


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence of the verdict. outcome is empty where there is no control to judge by."""

    name: str
    outcome: Outcome | Literal[""]
    text: str


@dataclass(frozen=True, slots=True)
class Metric:
    """A line of the table.

    far: the distance to the data's value from which a cell has its strongest colour; fewest: clips
    (valid ones, where the metric is over these) from which it is stated.
    """

    key: str
    title: str
    digits: int
    far: float
    about: str
    fewest: int = FEWEST


METRICS = (
    Metric("valid", "validity", 2, 0.3, "share of clips that are one coherent moving shape", 0),
    Metric("modes", "modes of 24", 0, 8, "hues x directions seen among the valid clips", 0),
    Metric(
        "kl_prior_sample",
        "KL(prior || sample)",
        2,
        0.8,
        "nats; what the sample misses of the 24 modes' law",
        FEWEST_FOR_MODES,
    ),
    Metric("agreement_shape", "shape agreement", 2, 0.3, "valid clips that show the caption's"),
    Metric("agreement_hue", "hue agreement", 2, 0.3, "likewise"),
    Metric("agreement_direction", "direction agreement", 2, 0.3, "likewise"),
    Metric("agreement_speed", "speed agreement", 2, 0.3, "likewise"),
    Metric("agreement_size", "size agreement", 2, 0.3, "likewise"),
    Metric("saturation", "saturation", 2, 0.15, "HSV saturation of the shape, valid clips"),
    Metric("contrast", "contrast", 2, 0.2, "RGB distance of shape and background, all clips", 0),
    Metric("speed_px", "speed, px/frame", 2, 0.3, "pixels per video frame, valid clips"),
    Metric(
        "saturation_drift",
        "saturation drift / chunk",
        3,
        0.05,
        "mean size of the change, valid clips",
    ),
    Metric("contrast_drift", "contrast drift / chunk", 3, 0.05, "mean change, valid clips"),
    Metric(
        "jitter_px",
        "jitter, px",
        2,
        1.0,
        "rms distance of the shape from a straight track, valid clips",
    ),
    Metric(
        "seam_excess_px",
        "seam excess, px",
        2,
        0.5,
        "how much less even the motion is where chunks meet",
    ),
    Metric("spread", "spread of pixels", 3, 0.04, "standard deviation over clips, all clips", 0),
)


def stated(scores: Mapping[str, Score]) -> dict[str, Score]:
    """The scores, without number where too few clips are behind it."""
    fewest = {metric.key: metric.fewest for metric in METRICS}
    return {
        key: Score(math.nan, math.nan, math.nan, score.n) if score.n < fewest.get(key, 0) else score
        for key, score in scores.items()
    }


def metrics_of(rows: Sequence[Row]) -> list[Metric]:
    """The metrics that these rows have."""
    return [metric for metric in METRICS if any(metric.key in row.scores for row in rows)]


def expected_modes(num_clips: int) -> float:
    """How many of the 24 modes as many independent draws from the prior hit on average."""
    return float((1 - (1 - MODE_PRIOR.double()) ** num_clips).sum())


def find(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row.name == name), None)


def number(value: float, digits: int) -> str:
    """A fixed number of digits; a mean of counts keeps one where it is not whole."""
    if not math.isfinite(value):
        return "-"
    digits = 1 if digits == 0 and value != round(value) else digits
    return f"{value:.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def interval(score: Score, digits: int) -> str:
    return (
        f"[{number(score.low, digits)} {number(score.high, digits)}]"
        if math.isfinite(score.value)
        else ""
    )


def against(score: Score | None, data: Score | None) -> Mark:
    """Where a score lies from the data's: = if the intervals touch, else above or below; empty
    without both.
    """
    if (
        score is None
        or data is None
        or not (math.isfinite(score.value) and math.isfinite(data.value))
    ):
        return ""
    if score.low > data.high:
        return "↑"
    return "↓" if score.high < data.low else "="


def cells(rows: Sequence[Row], metric: Metric) -> list[str]:
    """`value [low high] mark` for each row; the data has no mark."""
    data, out = find(rows, DATA), []
    for row in rows:
        score = row.scores.get(metric.key)
        parts = (
            (
                number(score.value, metric.digits),
                interval(score, metric.digits),
                row.mark(metric.key, data),
            )
            if score
            else ("-",)
        )
        out.append(" ".join(part for part in parts if part))
    return out


def plain_table(rows: Sequence[Row]) -> str:
    """Metrics down, sources across, aligned for a terminal."""
    lines = [["", *(row.name for row in rows)]]
    lines += [[metric.title, *cells(rows, metric)] for metric in metrics_of(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * (sum(widths) + 2 * len(rows)), *texts[1:]])


def markdown_table(rows: Sequence[Row]) -> str:
    head = ["metric", *(row.name for row in rows)]
    lines = [[metric.title.replace("||", "‖"), *cells(rows, metric)] for metric in metrics_of(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def verdict(rows: Sequence[Row]) -> str:
    """One sentence for each arm against the control; without a control, what sets each row apart
    from the data.
    """
    return " ".join(finding.text for finding in findings(rows))


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The sentences of the verdict with the outcome that each one states."""
    judged = [row for row in rows if row.name not in (*REFERENCES, CONTROL)]
    data, control = find(rows, DATA), find(rows, CONTROL)
    if data is None:
        raise ReportError("no row called data to hold the others against; keep the data row")
    if control is None or not judged:
        described = judged or [row for row in rows if row is not data]
        return [Finding(row.name, "", _differences(row, data)) for row in described]
    references = [row for row in (data, find(rows, TEACHER)) if row is not None]
    return [
        Finding(row.name, outcome(row, control, references), _sentence(row, control, references))
        for row in judged
    ]


def outcome(arm: Row, control: Row, references: Sequence[Row]) -> Outcome:
    """The rule, all by disjoint 95 % intervals. references: the rows of data and, where it is
    there, of the teacher.

    Helped: KL(prior || sample) lies below the control's, and validity is at most VALIDITY_MARGIN
    lower. Harmed: validity falls by more than that, or contrast or speed falls below those of
    control and references alike (a fall from too much to the data's is none). Mixed: both. A score
    that is not there, for want of valid clips, decides nothing.
    """
    covers = arm.scores["kl_prior_sample"].high < control.scores["kl_prior_sample"].low
    keeps = arm.scores["valid"].value >= control.scores["valid"].value - VALIDITY_MARGIN
    helped, harmed = covers and keeps, bool(losses(arm, control, references))
    if helped and harmed:
        return "mixed"
    if helped or harmed:
        return "helped" if helped else "harmed"
    return "no clear difference"


def losses(arm: Row, control: Row, references: Sequence[Row]) -> list[str]:
    """What an arm lost for certain, among validity, contrast and speed.

    The margin on validity keeps one clip from deciding where a bootstrap interval of a share of 100
    % has no width.
    """
    valid, before = arm.scores["valid"], control.scores["valid"]
    lost = (
        ["valid"]
        if valid.high < before.low and valid.value < before.value - VALIDITY_MARGIN
        else []
    )
    for key in ("contrast", "speed_px"):
        if arm.scores[key].high < min(row.scores[key].low for row in (control, *references)):
            lost.append(key)
    return lost


def _sentence(arm: Row, control: Row, references: Sequence[Row]) -> str:
    kl = f"KL(prior || sample) {compared(arm, control, 'kl_prior_sample')}"
    valid = f"validity {compared(arm, control, 'valid')}"
    fell = {
        "valid": f"validity fell to {compared(arm, control, 'valid')}",
        "contrast": f"contrast fell to {compared(arm, control, 'contrast', references)}",
        "speed_px": f"speed fell to {compared(arm, control, 'speed_px', references)}",
    }
    lost = " and ".join(fell[key] for key in losses(arm, control, references))
    match outcome(arm, control, references):
        case "helped":
            return (
                f"{arm.name} helped: it covers the modes better, {kl}, and stays coherent, {valid}."
            )
        case "harmed":
            return f"{arm.name} harmed: {lost}; {kl}."
        case "mixed":
            return f"{arm.name} is mixed: it covers the modes better, {kl}, but {lost}."
        case _:
            return f"{arm.name} made no clear difference: {kl}, {valid}."


def compared(arm: Row, control: Row, key: str, references: Sequence[Row] = ()) -> str:
    """`value (control value)`, and the references' values where they are given."""
    beside = "".join(f", {row.name} {number(row.scores[key].value, 2)}" for row in references)
    own, other = (_known(row.scores[key]) for row in (arm, control))
    return f"{own} (control {other}{beside})"


def _known(score: Score) -> str:
    return number(score.value, 2) if math.isfinite(score.value) else "unknown"


def _differences(row: Row, data: Row) -> str:
    apart = [
        f"{metric.title} {number(row.scores[metric.key].value, metric.digits)} "
        f"(data {number(data.scores[metric.key].value, metric.digits)})"
        for metric in METRICS
        if row.mark(metric.key, data) in ("↑", "↓")
    ]
    if apart:
        return f"{row.name} differs from the data: {', '.join(apart)}."
    return f"{row.name} cannot be told from the data: every interval touches the data's."


def to_json(row: Row) -> dict[str, Any]:
    """A row as JSON: what is not a number is null."""
    scores = {
        key: {
            "value": _or_null(s.value),
            "low": _or_null(s.low),
            "high": _or_null(s.high),
            "n": s.n,
        }
        for key, s in row.scores.items()
    }
    saved = {
        "name": row.name,
        "about": row.about,
        "scores": scores,
        "modes": list(row.modes),
        "seconds": row.seconds,
    }
    return saved | ({"marks": dict(row.marks)} if row.marks is not None else {})


def from_json(saved: Mapping[str, Any]) -> Row:
    """Inverse of `to_json`. Raises ReportError for something else."""
    try:
        scores = {
            key: Score(_or_nan(s["value"]), _or_nan(s["low"]), _or_nan(s["high"]), int(s["n"]))
            for key, s in saved["scores"].items()
        }
        return Row(
            saved["name"],
            saved["about"],
            scores,
            tuple(saved["modes"]),
            saved["seconds"],
            saved.get("marks"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"not a row of a report: {error!r}; write the report again") from error


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
