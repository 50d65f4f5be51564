"""What a recipe has to reach, fixed before the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfforcing_dfd.evaluation.tables import Run
from selfforcing_dfd.evaluation.tiny_verdict import (
    BOUNDS,
    GAINS,
    LEAST_VALIDITY,
    TOLERANCE,
    Bound,
    certain_sign,
    compare,
    mean_range,
    meets,
    range_text,
    signed,
)
from selfforcing_dfd.study.compare import aligned, mean_of, with_rows
from selfforcing_dfd.study.plan import LONG
from selfforcing_dfd.study.results import Study

BEATS = ("coverage", "follow")
HELD = ("valid", "saturation", "contrast", "speed_px")
MOST_FLOORS = 2.0  # KL, in units of what as many draws from the data's law have

GOAL = (
    "The goal, fixed before the runs. At equal compute one recipe beats every control in coverage "
    "of the 72 moving modes and in the follow test, each difference certain by the rule below, "
    "which asks for one sign in the mean of every start. By the mean over runs its validity is at "
    f"least {LEAST_VALIDITY}, its saturation, contrast and speed lie within "
    f"{100 * TOLERANCE:.0f} % of the teacher's, and its KL is at most {MOST_FLOORS:g} times that "
    "of as many draws from the data's law. In runs that are many times as long all these bounds "
    f"still hold, and coverage and the follow test are at most {100 * TOLERANCE:.0f} % lower than "
    "at the usual length."
)


@dataclass(frozen=True)
class Criterion:
    """One part of the goal. text: what was wanted and what was got.

    control, key: what is compared, where it is a comparison. sign: 1 for a certain gain, -1 for a
    certain loss.
    """

    met: bool
    text: str
    control: str = ""
    key: str = ""
    sign: int = 0


def criteria(study: Study, arm: str) -> list[Criterion]:
    """Every part of the goal for one arm; a part that was not run is not met."""
    runs = aligned(study, "compute")
    found = [
        beats(arm, control, key, runs)
        for control in study.controls
        if control != arm
        for key in BEATS
    ]
    own = with_rows(runs, arm)
    found += held(arm, own, "")
    return [*found, *lengthened(study, arm)]


def beats(arm: str, control: str, key: str, runs: Sequence[Run]) -> Criterion:
    both = with_rows(runs, arm, control)
    gain = next(gain for gain in GAINS if gain.key == key)
    difference = compare(arm, control, key, both) if both else None
    if difference is None:
        return Criterion(False, f"{gain.title} against {control}: not run", control, key)
    sign = gain.better * certain_sign(arm, control, key, both)
    text = f"{gain.title} {signed(difference)} against {control}"
    return Criterion(sign > 0, text, control, key, sign)


def held(arm: str, runs: Sequence[Run], when: str) -> list[Criterion]:
    """The bounds around the teacher, and KL. when: added to each text."""
    if not runs:
        return [Criterion(False, f"bounds{when}: not run")]
    found = [bound_criterion(arm, bound, runs, when) for bound in BOUNDS if bound.key in HELD]
    kl = mean_of(runs, arm, "kl_prior_sample").value
    most = MOST_FLOORS * mean_of(runs, arm, "kl_floor").value
    return [*found, Criterion(kl <= most, f"KL {kl:.2f}{when} (at most {most:.2f})")]


def bound_criterion(arm: str, bound: Bound, runs: Sequence[Run], when: str) -> Criterion:
    """By how much a bound is missed, where it is."""
    own = mean_of(runs, arm, bound.key).value
    low, high = mean_range(bound, runs)
    text = f"{bound.title} {own:.2f}{when} ({range_text(bound, runs)})"
    missed = max(low - own, own - high)
    if missed > 0:
        text += f", missed by {missed:.2f}"
    return Criterion(meets(arm, bound, runs), text)


def lengthened(study: Study, arm: str) -> list[Criterion]:
    """The bounds at the end of an arm's long runs, and what was lost against their usual length."""
    long_arm = arm + LONG
    trained = study.runs_of(long_arm)
    times = f" at {study.long} times the length"
    if not trained:
        return [Criterion(False, f"everything{times}: not run")]
    ends = []
    usual_ends = []
    for run in trained:
        references = study.reference_rows(run.start)
        ends.append(Run(run.start, [*references, study.point(run, -1, arm)]))
        for usual in study.runs_of(arm):
            if (usual.start, usual.draw) == (run.start, run.draw):
                usual_ends.append(Run(run.start, [*references, study.point(usual, -1)]))
    found = held(arm, ends, times)
    for key in BEATS:
        after = mean_of(ends, arm, key).value
        before = mean_of(usual_ends, arm, key).value
        met = after >= (1 - TOLERANCE) * before
        found.append(Criterion(met, f"{key} {before:.2f}, {after:.2f}{times}"))
    return found
