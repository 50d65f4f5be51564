"""The gap of Eq. 7 in arXiv 2606.18478 beside what data forcing did, each arm with its own control.

Arms of different captions, or with a given image, do different work, so their scores cannot be
compared. What data forcing adds to distribution matching at the same work can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from selfforcing_dfd.evaluation.tables import number
from selfforcing_dfd.evaluation.tiny_verdict import mean
from selfforcing_dfd.study.compare import Mean, index_at, rank_correlation
from selfforcing_dfd.study.results import Study, Trajectory
from selfforcing_dfd.study.way_tables import COLUMNS, markdown, ranged

DIFFERENCES = ("kl_prior_sample", "coverage", "contrast", "valid", "speed_px")
DRAWN = {"kl_prior_sample": "KL - control's", "contrast": "contrast - control's"}
"""Differences that the plot shows, and its labels."""


@dataclass(frozen=True)
class Effect:
    """An arm less its own control, over pairs of runs of equal start and draw.

    gap: E|anchor - G|^2 in latents since the point before.
    """

    arm: str
    control: str
    gap: float
    differences: dict[str, Mean]


def effects(study: Study, start: str = "") -> list[Effect]:
    """Of every arm that names a control of its own, at equal updates, from small gaps to large.

    start: of the runs; all starts if empty.
    """
    found = []
    for arm, facts in study.arms.items():
        pairs = pairs_of(study, arm, facts.control, start) if facts.control else []
        gaps = [at(study, own, own.logged["gap"]) for own, _ in pairs if "gap" in own.logged]
        known = [gap for gap in gaps if gap is not None]
        if known:
            differences = {key: difference(study, pairs, key) for key in DIFFERENCES}
            found.append(Effect(arm, facts.control, mean(known), differences))
    return sorted(found, key=lambda effect: effect.gap)


def pairs_of(
    study: Study, arm: str, control: str, start: str
) -> list[tuple[Trajectory, Trajectory]]:
    """(run, run of the control) of equal start and draw."""
    others = {(run.start, run.draw): run for run in study.runs_of(control)}
    return [
        (run, others[run.start, run.draw])
        for run in study.runs_of(arm)
        if (run.start, run.draw) in others and start in ("", run.start)
    ]


def at(study: Study, run: Trajectory, values: list[float | None]) -> float | None:
    """A run's value at equal updates."""
    index = index_at(study, run, "updates")
    return None if index is None else values[index]


def difference(study: Study, pairs: list[tuple[Trajectory, Trajectory]], key: str) -> Mean:
    """Run less control, over the pairs that state it."""
    both = [(at(study, a, a.scores[key]), at(study, b, b.scores[key])) for a, b in pairs]
    known = [own - other for own, other in both if own is not None and other is not None]
    if not known:
        return Mean(math.nan, math.nan, math.nan, 0)
    return Mean(mean(known), min(known), max(known), len(known))


def correlations(study: Study, key: str) -> dict[str, float]:
    """Rank correlation over arms of the gap with a difference, by start; NaN for too few arms."""
    found = {}
    for start in dict.fromkeys(run.start for run in study.runs):
        known = [(each.gap, each.differences[key].value) for each in effects(study, start)]
        found[start] = rank_correlation([pair for pair in known if not math.isnan(pair[1])])
    return found


def effect_section(study: Study) -> Iterator[str]:
    """Each arm against its own control, in the order of the gap; nothing where none names one."""
    found = effects(study)
    if not found:
        return
    yield "## The gap and what data forcing did"
    yield (
        "Each arm less the control of the same data and start, at equal updates: mean over pairs "
        "of runs, with the smallest and the largest. Arms stand in the order of their gap."
    )
    table = [["arm", "control", "gap", *(COLUMNS[key][0] for key in DIFFERENCES)]]
    for each in found:
        cells = [ranged(each.differences[key], COLUMNS[key][1]) for key in DIFFERENCES]
        table.append([each.arm, each.control, f"{each.gap:.3f}", *cells])
    yield markdown(table)
    yield (
        "Rank correlation over these arms of the gap with each difference, in each start: 1 means "
        "that the difference grows with the gap, -1 that it falls."
    )
    starts = list(correlations(study, DIFFERENCES[0]))
    lines = [["with", *starts]]
    for key in DIFFERENCES:
        of_start = correlations(study, key)
        lines.append([COLUMNS[key][0], *(number(of_start[start], 2) for start in starts)])
    yield markdown(lines)


def draw_effects(study: Study, figure: Figure) -> None:
    """Two panels over the gap: a dot an arm, a bar from its smallest to its largest pair."""
    found = effects(study)
    for axes, (key, label) in zip(figure.subplots(1, len(DRAWN)), DRAWN.items(), strict=True):
        axes.axhline(0, color="0.8", linewidth=0.8)
        for each in found:
            value = each.differences[key]
            axes.plot([each.gap, each.gap], [value.low, value.high], color="0.6", linewidth=1)
            axes.scatter([each.gap], [value.value], s=18, color="black", zorder=3)
            axes.annotate(f" {each.arm}", (each.gap, value.value), fontsize=6.5)
        axes.set_xlabel("E|anchor - G|², latents")
        axes.set_ylabel(label)
