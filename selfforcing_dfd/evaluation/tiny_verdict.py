"""The tiny world's verdict on each arm against the control, by a stated rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from selfforcing_dfd.evaluation.tables import (
    CONTROL,
    DATA,
    REFERENCES,
    TEACHER,
    Finding,
    Metrics,
    Outcome,
    Row,
    described,
    find,
    number,
)
from selfforcing_dfd.tiny.bootstrap import Score

VALIDITY_MARGIN = 0.05  # an arm may lose this much validity and still count as having helped

RULE = (
    "The verdict's rule: an arm helped if its KL(prior || sample) lies below the control's with "
    "disjoint intervals and its validity is at most "
    f"{VALIDITY_MARGIN} lower; it harmed if its validity falls by more than that and with "
    "disjoint intervals, or if its contrast or its speed falls below those of control, data and "
    "teacher alike; both is mixed, neither no clear difference."
)


def findings(rows: Sequence[Row], metrics: Metrics) -> list[Finding]:
    """One sentence for each arm against the control.

    Without a control, or without arms, each row's differences from the data.
    """
    judged = [row for row in rows if row.name not in (*REFERENCES, CONTROL)]
    data = find(rows, DATA)
    control = find(rows, CONTROL)
    if data is None or control is None or not judged:
        return described(rows, metrics)
    references = [row for row in (data, find(rows, TEACHER)) if row is not None]
    return [
        Finding(row.name, outcome(row, control, references), _sentence(row, control, references))
        for row in judged
    ]


def outcome(arm: Row, control: Row, references: Sequence[Row]) -> Outcome:
    """RULE, all by disjoint 95 % intervals. references: the rows of data and, if any, teacher.

    A fall of contrast or speed from too much to the data's is no harm. A score that is missing
    because too few clips are valid decides nothing.
    """
    covers = arm.scores["kl_prior_sample"].high < control.scores["kl_prior_sample"].low
    keeps = arm.scores["valid"].value >= control.scores["valid"].value - VALIDITY_MARGIN
    helped = covers and keeps
    harmed = bool(losses(arm, control, references))
    if helped and harmed:
        return "mixed"
    if helped or harmed:
        return "helped" if helped else "harmed"
    return "no clear difference"


def losses(arm: Row, control: Row, references: Sequence[Row]) -> list[str]:
    """The scores that an arm certainly lost, of validity, contrast and speed.

    The margin on validity keeps one clip from deciding: the bootstrap interval of a share of 100 %
    has no width.
    """
    lost = []
    valid = arm.scores["valid"]
    before = control.scores["valid"]
    if valid.high < before.low and valid.value < before.value - VALIDITY_MARGIN:
        lost.append("valid")
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
            better = f"{arm.name} helped: it covers the modes better, {kl}"
            return f"{better}, and stays coherent, {valid}."
        case "harmed":
            return f"{arm.name} harmed: {lost}; {kl}."
        case "mixed":
            return f"{arm.name} is mixed: it covers the modes better, {kl}, but {lost}."
        case _:
            return f"{arm.name} made no clear difference: {kl}, {valid}."


def compared(arm: Row, control: Row, key: str, references: Sequence[Row] = ()) -> str:
    """`value (control value)`, with the references' values where they are given."""
    beside = "".join(f", {row.name} {number(row.scores[key].value, 2)}" for row in references)
    return f"{_known(arm.scores[key])} (control {_known(control.scores[key])}{beside})"


def _known(score: Score) -> str:
    return number(score.value, 2) if math.isfinite(score.value) else "unknown"
