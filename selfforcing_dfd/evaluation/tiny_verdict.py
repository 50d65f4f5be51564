"""The tiny world's verdict on each arm, by a rule that is fixed before any run (docs/method.md).

An arm is compared with each control over paired runs, and held to bounds around its teacher. One
run gives numbers and no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfforcing_dfd.evaluation.paired import Paired, paired
from selfforcing_dfd.evaluation.tables import (
    CONTROLS,
    DATA,
    NOT_JUDGED,
    TEACHER,
    Finding,
    Metrics,
    Outcome,
    ReportError,
    Row,
    Run,
    described,
    find,
    number,
)

LEAST_VALIDITY = 0.98
TOLERANCE = 0.05  # of the teacher's value
SEAM_MARGIN = 0.25  # pixels; a shape that moves less a video frame counts as still
ERROR_RATE = 0.05  # of a verdict where there is no difference, over all its comparisons together


@dataclass(frozen=True, slots=True)
class Gain:
    """A score in which an arm is to beat its control. better: 1 for more, -1 for less."""

    key: str
    title: str
    better: int


@dataclass(frozen=True, slots=True)
class Bound:
    """Where a score must lie, given the teacher's (the data's, where there is no teacher)."""

    key: str
    title: str
    interval: Callable[[float], tuple[float, float]]

    def range_of(self, run: Run) -> tuple[float, float]:
        return self.interval(value(reference_of(run), self.key))


def valid(reference: float) -> tuple[float, float]:
    return LEAST_VALIDITY, 1.0


def near(reference: float) -> tuple[float, float]:
    return (1 - TOLERANCE) * reference, (1 + TOLERANCE) * reference


def not_rougher(reference: float) -> tuple[float, float]:
    return -math.inf, (1 + TOLERANCE) * reference


def as_even(reference: float) -> tuple[float, float]:
    return -math.inf, reference + SEAM_MARGIN


GAINS = (
    Gain("coverage", "coverage", 1),
    Gain("kl_prior_sample", "KL", -1),
    Gain("follow", "goes on", 1),
)
BOUNDS = (
    Bound("valid", "validity", valid),
    Bound("saturation", "saturation", near),
    Bound("contrast", "contrast", near),
    Bound("speed_px", "speed", near),
    Bound("jitter_px", "jitter", not_rougher),
    Bound("seam_excess_px", "seam excess", as_even),
)
# each comparison's interval is this wide, so that all of a verdict's together err in ERROR_RATE
LEVEL = 1 - ERROR_RATE / (len(GAINS) + len(BOUNDS))

RULE = (
    "The verdict's rule. An arm and a control are compared in pairs of runs with equal start, "
    "draws and clips. A difference is certain if its interval over runs leaves out 0 (Student's t, "
    f"{100 * LEVEL:.1f} %, so that all {len(GAINS) + len(BOUNDS)} comparisons of a verdict err in "
    f"{100 * ERROR_RATE:.0f} % at most) and it has one sign in the mean of every start. Gains: "
    "more coverage, less KL, more chunks that go on as a real first chunk began. Bounds, by the "
    f"mean over runs: validity at least {LEAST_VALIDITY}; saturation, contrast and speed within "
    f"{100 * TOLERANCE:.0f} % of the teacher's; jitter at most {100 * TOLERANCE:.0f} % above the "
    f"teacher's; seam excess at most {SEAM_MARGIN} px above the teacher's. An arm helped if a gain "
    "is certain, none is certainly the other way round, and all bounds are met; it is mixed if a "
    "gain is certain and one of the others fails; it harmed if no gain is certain and one is "
    "certainly the other way round, or if it certainly left a bound that the control meets. "
    "Anything else is no clear difference."
)


def findings(rows: Sequence[Row], metrics: Metrics) -> list[Finding]:
    """One run: each arm's numbers beside the controls', and no verdict.

    Without a control, or without arms, each row's differences from the data.
    """
    check_equal_clips(rows)
    controls = [row for row in rows if row.name in CONTROLS]
    arms = arms_of(rows)
    if find(rows, DATA) is None or not controls or not arms:
        return described(rows, metrics)
    return [Finding(arm.name, "", _one_run(arm, controls, Run("", rows))) for arm in arms]


def verdict(runs: Sequence[Run]) -> list[Finding]:
    """RULE for every arm against every control; none where there is no control or no arm.

    Raises ReportError for rows of unequal numbers of clips.
    """
    for run in runs:
        check_equal_clips(run.rows)
    first = runs[0].rows
    controls = [row.name for row in first if row.name in CONTROLS]
    return [judge(arm.name, control, runs) for arm in arms_of(first) for control in controls]


def arms_of(rows: Sequence[Row]) -> list[Row]:
    """The rows that are judged."""
    return [row for row in rows if row.name not in NOT_JUDGED]


def check_equal_clips(rows: Sequence[Row]) -> None:
    """Raise ReportError unless KL was counted on equally many clips in all rows."""
    counted = {row.name: row.scores["kl_prior_sample"].n for row in rows if "modes" in row.scores}
    if len(set(counted.values())) > 1:
        clips = ", ".join(f"{name} {count}" for name, count in counted.items())
        raise ReportError(
            f"rows have unequal numbers of clips ({clips}), and KL falls with their number; "
            f"write the report again with one report.clips for all"
        )


def judge(arm: str, control: str, runs: Sequence[Run]) -> Finding:
    """RULE for one arm against one control."""
    gains: list[str] = []
    losses: list[str] = []
    told: list[str] = []
    for gain in GAINS:
        difference = compare(arm, control, gain.key, runs)
        if difference is None:
            continue
        direction = gain.better * certain_sign(arm, control, gain.key, runs)
        if direction:
            (gains if direction > 0 else losses).append(gain.title)
        told.append(f"{gain.title} {signed(difference)}")
    outside = [bound for bound in BOUNDS if not meets(arm, bound, runs)]
    left = [
        bound
        for bound in outside
        if meets(control, bound, runs) and certain_sign(arm, control, bound.key, runs)
    ]
    missed = [bound_text(arm, control, bound, runs) for bound in outside]
    outcome = outcome_of(bool(gains), bool(losses), bool(outside), bool(left))
    parts = [", ".join(told) or "nothing to compare"]
    if missed:
        parts.append(f"outside its bounds: {', '.join(missed)}")
    head = f"{arm} {PHRASES.get(outcome, outcome)} against {control} in {runs_text(runs)}"
    return Finding(arm, outcome, f"{head}: {'; '.join(parts)}.")


PHRASES = {"mixed": "is mixed", "no clear difference": "made no clear difference"}


def outcome_of(gains: bool, losses: bool, outside: bool, left: bool) -> Outcome:
    """RULE's last lines. left: a bound that the control meets was certainly left."""
    if gains:
        return "mixed" if losses or outside else "helped"
    return "harmed" if losses or left else "no clear difference"


def compare(arm: str, control: str, key: str, runs: Sequence[Run]) -> Paired | None:
    """Arm minus control over the runs; None where a run does not state one of them."""
    values = differences(arm, control, key, runs)
    return paired(values, LEVEL) if all(map(math.isfinite, values)) else None


def differences(arm: str, control: str, key: str, runs: Sequence[Run]) -> list[float]:
    return [value(run.row(arm), key) - value(run.row(control), key) for run in runs]


def certain_sign(arm: str, control: str, key: str, runs: Sequence[Run]) -> int:
    """1 or -1 for a certain difference, 0 for none: by its interval, and in every start."""
    difference = compare(arm, control, key, runs)
    if difference is None or not difference.sign:
        return 0
    for start in {run.start for run in runs}:
        own = differences(arm, control, key, [run for run in runs if run.start == start])
        if sum(own) * difference.sign <= 0:
            return 0
    return difference.sign


def meets(name: str, bound: Bound, runs: Sequence[Run]) -> bool:
    """Whether the mean over runs lies within the mean bounds. What is not stated does not."""
    low, high = mean_range(bound, runs)
    if math.isnan(low) or math.isnan(high):
        return True  # nothing to hold it against
    return low <= mean([value(run.row(name), bound.key) for run in runs]) <= high


def mean_range(bound: Bound, runs: Sequence[Run]) -> tuple[float, float]:
    lows, highs = zip(*(bound.range_of(run) for run in runs), strict=True)
    return mean(lows), mean(highs)


def reference_of(run: Run) -> Row:
    """The row to whose values bounds refer."""
    row = find(run.rows, TEACHER) or find(run.rows, DATA)
    if row is None:
        raise ReportError("no row called teacher or data to hold others against; keep one")
    return row


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def value(row: Row, key: str) -> float:
    return row.scores[key].value if key in row.scores else math.nan


def signed(difference: Paired) -> str:
    """`+0.31 [+0.20 +0.42]`; a single run has no interval."""
    text = f"{difference.mean:+.2f}"
    if math.isinf(difference.low):
        return text
    return f"{text} [{difference.low:+.2f} {difference.high:+.2f}]"


def bound_text(arm: str, control: str, bound: Bound, runs: Sequence[Run]) -> str:
    """`speed 0.45 (bounds 0.70 to 0.77, control 0.43)`, means over the runs."""
    own, other = (
        number(mean([value(run.row(name), bound.key) for run in runs]), 2)
        for name in (arm, control)
    )
    return f"{bound.title} {own} ({range_text(bound, runs)}, control {other})"


def range_text(bound: Bound, runs: Sequence[Run]) -> str:
    low, high = mean_range(bound, runs)
    if math.isinf(low):
        return f"at most {number(high, 2)}"
    return f"bounds {number(low, 2)} to {number(high, 2)}"


def runs_text(runs: Sequence[Run]) -> str:
    starts = len({run.start for run in runs})
    return f"{len(runs)} runs from {starts} start{'' if starts == 1 else 's'}"


def _one_run(arm: Row, controls: Sequence[Row], run: Run) -> str:
    told = []
    for gain in GAINS:
        beside = ", ".join(f"{row.name} {number(value(row, gain.key), 2)}" for row in controls)
        told.append(f"{gain.title} {number(value(arm, gain.key), 2)} ({beside})")
    missed = []
    for bound in BOUNDS:
        if not meets(arm.name, bound, [run]):
            missed.append(bound_text(arm.name, controls[0].name, bound, [run]))
    outside = f"; outside its bounds: {', '.join(missed)}" if missed else ""
    about = "one run, so no verdict about methods, only about these clips"
    return f"{arm.name}, {about}: {', '.join(told)}{outside}."
