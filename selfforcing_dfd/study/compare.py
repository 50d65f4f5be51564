"""Arms of a study held against each other: at equal updates, at equal compute, at their ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import spearmanr

from selfforcing_dfd.evaluation.tables import TEACHER, Finding, Row, Run, find
from selfforcing_dfd.evaluation.tiny_verdict import judge, mean, value
from selfforcing_dfd.study.plan import LONG
from selfforcing_dfd.study.results import Study, Trajectory

Alignment = Literal["updates", "compute", "end"]
ROUNDING = 1 + 1e-6  # of means of equal numbers


@dataclass(frozen=True)
class Mean:
    """Mean and range over runs of a score at one point."""

    value: float
    low: float
    high: float
    num_runs: int


@dataclass(frozen=True)
class FrontPoint:
    """Means over runs of an arm at one point. contrast: as a share of the teacher's."""

    arm: str
    update: int
    coverage: float
    contrast: float
    valid: float
    num_runs: int

    def is_worse_than(self, other: FrontPoint) -> bool:
        """Nowhere better and somewhere worse. Contrast is two-sided: nearer to 1 is better."""
        own = (self.coverage, self.valid, -abs(self.contrast - 1))
        others = (other.coverage, other.valid, -abs(other.contrast - 1))
        return own != others and all(a <= b for a, b in zip(own, others, strict=True))


def index_at(study: Study, run: Trajectory, alignment: Alignment) -> int | None:
    """The newest point that the alignment allows; None where it allows none."""
    if alignment == "end":
        return len(run.updates) - 1
    if alignment == "updates":
        return newest(run.updates, study.updates)
    return newest(run.gflop, ROUNDING * budget_of(study))


def newest(values: Sequence[float], limit: float) -> int | None:
    """Index of the last of these growing values that is at most the limit."""
    within = [index for index, each in enumerate(values) if each <= limit]
    return within[-1] if within else None


def budget_of(study: Study) -> float:
    """Operations of the budget arm up to the study's updates, in 10^9; 0 without a run."""
    indices = [(run, newest(run.updates, study.updates)) for run in study.runs_of(study.budget)]
    counted = [run.gflop[index] for run, index in indices if index is not None]
    return mean(counted) if counted else 0.0


def aligned(study: Study, alignment: Alignment) -> list[Run]:
    """The rows of every start and draw; an arm without an allowed point there has none.

    Fixed points are rows of their own, whatever the alignment. Lengthened arms are left out.
    """
    found = []
    pairs = dict.fromkeys((run.start, run.draw) for run in study.runs)
    for start, draw in pairs:
        own = [run for run in study.runs if (run.start, run.draw) == (start, draw)]
        rows = study.reference_rows(start)
        for run in own:
            index = index_at(study, run, alignment)
            if index is not None and not run.arm.endswith(LONG):
                rows.append(study.point(run, index))
        for name, point in study.fixed.items():
            for run in own:
                if run.arm == point.arm and point.update in run.updates:
                    rows.append(study.point(run, run.updates.index(point.update), name))
        found.append(Run(start, rows))
    return found


def arms_in(study: Study) -> list[str]:
    """Names of the compared rows: arms that ran, then fixed points, in the plan's order."""
    ran = {run.arm for run in study.runs}
    arms = [name for name in study.arms if name in ran and not name.endswith(LONG)]
    return arms + [name for name, point in study.fixed.items() if point.arm in ran]


def with_rows(runs: Sequence[Run], *names: str) -> list[Run]:
    """The runs that have all of these rows."""
    return [run for run in runs if all(find(run.rows, name) for name in names)]


def verdicts(study: Study, alignment: Alignment) -> dict[tuple[str, str], Finding]:
    """The rule's outcome of every arm against every control, where runs have both."""
    runs = aligned(study, alignment)
    found = {}
    for arm, control in itertools.product(arms_in(study), study.controls):
        both = with_rows(runs, arm, control)
        if arm != control and both:
            found[arm, control] = judge(arm, control, both)
    return found


def null_check(study: Study) -> list[Finding]:
    """The rule where there is nothing to find: a control of one draw against another of its draws.

    One finding for each control and each pair of draws, over the starts that have both.
    """
    found = []
    for control in study.controls:
        again = f"{control} again"
        trained = study.runs_of(control)
        for draw, other in itertools.combinations(sorted({run.draw for run in trained}), 2):
            runs = []
            for start in dict.fromkeys(run.start for run in trained):
                of_start = {run.draw: run for run in trained if run.start == start}
                if draw in of_start and other in of_start:
                    rows = [
                        *study.reference_rows(start),
                        row_at(study, of_start[draw], control),
                        row_at(study, of_start[other], again),
                    ]
                    runs.append(Run(start, rows))
            if runs:
                found.append(judge(again, control, runs))
    return found


def row_at(study: Study, run: Trajectory, name: str) -> Row:
    """A run at the study's updates, or at its first point where that is later."""
    return study.point(run, index_at(study, run, "updates") or 0, name)


def mean_of(runs: Sequence[Run], name: str, key: str) -> Mean:
    """Over the runs that state it."""
    rows = [run.row(name) for run in with_rows(runs, name)]
    known = [value(row, key) for row in rows if math.isfinite(value(row, key))]
    if not known:
        return Mean(math.nan, math.nan, math.nan, 0)
    return Mean(mean(known), min(known), max(known), len(known))


def teacher_value(study: Study, key: str) -> float:
    """The teacher's score, NaN where it has none."""
    own = study.references[TEACHER].get(key)
    return math.nan if own is None else own


def along(study: Study, arm: str, key: str) -> list[tuple[int, Mean]]:
    """A score of an arm at each of its points, over all its runs that have point and score."""
    trained = [run for run in study.runs_of(arm) if key in run.scores]
    found = []
    for update in sorted({update for run in trained for update in run.updates}):
        at = [
            run.scores[key][run.updates.index(update)] for run in trained if update in run.updates
        ]
        known = [each for each in at if each is not None]
        if known:
            found.append((update, Mean(mean(known), min(known), max(known), len(known))))
    return found


def spent(study: Study, arm: str) -> dict[int, float]:
    """Operations of an arm up to each of its points, in 10^9, by student update."""
    counted = {0: 0.0}
    for run in study.runs_of(arm):
        counted |= dict(zip(run.updates, run.gflop, strict=True))
    return counted


def points(study: Study) -> list[FrontPoint]:
    """Every arm at each of its points, lengthened arms left out."""
    contrast = teacher_value(study, "contrast")
    found = []
    for arm in study.arms:
        if arm.endswith(LONG):
            continue
        coverage = dict(along(study, arm, "coverage"))
        contrasts = dict(along(study, arm, "contrast"))
        valid = dict(along(study, arm, "valid"))
        for update in coverage.keys() & contrasts.keys() & valid.keys():
            own = coverage[update]
            share = contrasts[update].value / contrast
            found.append(
                FrontPoint(arm, update, own.value, share, valid[update].value, own.num_runs)
            )
    return sorted(found, key=lambda point: (-point.coverage, point.arm, point.update))


def front(study: Study) -> list[FrontPoint]:
    """The points that no other point beats in coverage, contrast and validity together."""
    found = points(study)
    return [point for point in found if not any(point.is_worse_than(other) for other in found)]


def gaps(study: Study) -> list[tuple[str, float, float]]:
    """(arm, gap, coverage) at the study's updates: means over runs."""
    found = []
    for arm in study.arms:
        values = []
        for run in study.runs_of(arm):
            index = index_at(study, run, "updates")
            if index is None or arm.endswith(LONG) or "gap" not in run.logged:
                continue
            gap = run.logged["gap"][index]
            coverage = run.scores["coverage"][index]
            if gap is not None and coverage is not None:
                values.append((gap, coverage))
        if values:
            of_gap, of_coverage = zip(*values, strict=True)
            found.append((arm, mean(of_gap), mean(of_coverage)))
    return found


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's; NaN for fewer than three pairs, and where one side is all the same."""
    if len(pairs) < 3:
        return math.nan
    xs, ys = zip(*pairs, strict=True)
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        return math.nan
    return float(spearmanr(xs, ys).statistic)
