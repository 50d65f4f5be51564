"""Arms against the one arm that each of them changes, and the gap of Eq. 7 in arXiv 2606.18478.

Arms of different captions, or with a given image, do different work, so their scores cannot be
compared. What one change does at the same work can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from selfforcing_dfd.evaluation.tables import number
from selfforcing_dfd.evaluation.tiny_verdict import mean
from selfforcing_dfd.study.compare import Mean, index_at, rank_correlation
from selfforcing_dfd.study.results import Study, Trajectory
from selfforcing_dfd.study.way_tables import COLUMNS, markdown

KL = "kl_prior_sample"
DIFFERENCES = ("coverage", KL, "follow", "valid", "contrast", "speed_px")
SHARE = "share of the control's KL"
DRAWN = {KL: "KL - control's", "contrast": "contrast - control's"}
"""Differences that the plot shows, and its labels."""


@dataclass(frozen=True)
class Effect:
    """An arm less its own control, over pairs of runs of equal start and draw.

    gap, control_gap: E|anchor - G|^2 in latents since the point before, of the arm and of its
    control; NaN where none was logged. share_of_kl: the KL's change over the control's KL, which
    is all that there was to gain. paper: what the paper found.
    """

    arm: str
    control: str
    paper: str
    gap: float
    control_gap: float
    differences: dict[str, Mean]
    share_of_kl: float
    noise: dict[str, float]  # how far runs of the control differ by their start and draw alone

    def value(self, key: str) -> float:
        """Of a difference, or of SHARE."""
        return self.share_of_kl if key == SHARE else self.differences[key].value

    def is_change(self, key: str) -> bool:
        """Whether all pairs changed the same way, by more than runs of the control differ."""
        change = self.differences[key]
        return change.low * change.high > 0 and abs(change.value) > self.noise[key]


def effects(study: Study, start: str = "") -> list[Effect]:
    """Of every arm that names a control of its own, at equal updates, in the plan's order.

    start: of the runs; all starts if empty.
    """
    found = []
    for arm, facts in study.arms.items():
        pairs = pairs_of(study, arm, facts.control, start) if facts.control else []
        if not pairs:
            continue
        own, controls = zip(*pairs, strict=True)
        differences = {key: difference(study, pairs, key) for key in DIFFERENCES}
        there = mean_of_known([at(study, run, run.scores.get(KL)) for run in controls])
        found.append(
            Effect(
                arm=arm,
                control=facts.control,
                paper=facts.paper,
                gap=mean_gap(study, own),
                control_gap=mean_gap(study, controls),
                differences=differences,
                share_of_kl=differences[KL].value / there,
                noise={key: spread(study, controls, key) for key in DIFFERENCES},
            )
        )
    return found


def mean_gap(study: Study, runs: Sequence[Trajectory]) -> float:
    """Over the runs that logged one at equal updates; NaN where none did."""
    return mean_of_known([at(study, run, run.logged.get("gap")) for run in runs])


def mean_of_known(values: Sequence[float | None]) -> float:
    """NaN where there is none."""
    known = [each for each in values if each is not None]
    return mean(known) if known else math.nan


def by_gap(study: Study, start: str = "") -> list[Effect]:
    """Those that logged a gap, from small to large."""
    known = [each for each in effects(study, start) if not math.isnan(each.gap)]
    return sorted(known, key=lambda effect: effect.gap)


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


def at(study: Study, run: Trajectory, values: list[float | None] | None) -> float | None:
    """A run's value at equal updates; None where it has no such values."""
    index = index_at(study, run, "updates")
    return None if index is None or values is None else values[index]


def difference(study: Study, pairs: list[tuple[Trajectory, Trajectory]], key: str) -> Mean:
    """Run less control, over the pairs that state it."""
    known = []
    for run, control in pairs:
        own = at(study, run, run.scores.get(key))
        other = at(study, control, control.scores.get(key))
        if own is not None and other is not None:
            known.append(own - other)
    if not known:
        return Mean(math.nan, math.nan, math.nan, 0)
    return Mean(mean(known), min(known), max(known), len(known))


def spread(study: Study, runs: Sequence[Trajectory], key: str) -> float:
    """Largest difference between these runs; NaN for a single one."""
    found = [at(study, run, run.scores.get(key)) for run in runs]
    known = [each for each in found if each is not None]
    return max(known) - min(known) if len(known) > 1 else math.nan


def correlations(study: Study, key: str) -> dict[str, float]:
    """Rank correlation over arms of the gap with a value, by start; NaN for too few arms."""
    found = {}
    for start in dict.fromkeys(run.start for run in study.runs):
        known = [(each.gap, each.value(key)) for each in by_gap(study, start)]
        found[start] = rank_correlation([pair for pair in known if not math.isnan(pair[1])])
    return found


def effect_section(study: Study) -> Iterator[str]:
    """Each arm against its own control; nothing where none names one."""
    found = effects(study)
    if not found:
        return
    yield "## Each arm against the one that it changes"
    yield (
        "Arm less control at equal updates: mean over pairs of runs of equal start and draw, with "
        "the smallest and the largest. The gap is that of the arm, and beside it that of its "
        "control. A line of words names what all pairs changed the same way, by more than the "
        "control's own runs differ from each other."
    )
    known = [key for key in DIFFERENCES if any(each.differences[key].num_runs for each in found)]
    names = [COLUMNS[key][0] for key in known]
    table = [["arm", "control", "gap", "its control's", *names]]
    for each in found:
        cells = [signed(each.differences[key], COLUMNS[key][1]) for key in known]
        gaps = [number(each.gap, 3), number(each.control_gap, 3)]
        table.append([each.arm, each.control, *gaps, *cells])
    yield markdown(table)
    yield lines_of_words(study)
    yield from order_section(study)


def lines_of_words(study: Study) -> str:
    """What every arm showed against its own control, a line each."""
    return "\n".join(in_words(each) for each in effects(study))


def signed(value: Mean, digits: int) -> str:
    """`+0.12 [-0.03 +0.20]`; the range is left out for a single pair."""
    if math.isnan(value.value):
        return "-"
    if value.num_runs == 1:
        return f"{value.value:+.{digits}f}"
    return f"{value.value:+.{digits}f} [{value.low:+.{digits}f} {value.high:+.{digits}f}]"


def in_words(effect: Effect) -> str:
    """What an arm showed, in one line."""
    changes = [
        f"{COLUMNS[key][0]} {effect.differences[key].value:+.{COLUMNS[key][1]}f}"
        for key in DIFFERENCES
        if effect.is_change(key)
    ]
    found = ", ".join(changes) or "no clear change"
    if effect.differences["coverage"].num_runs < 2:
        found = "one pair of runs, too few to say"
    line = f"- `{effect.arm}` against `{effect.control}`: {found}."
    return f"{line} The paper: {effect.paper}." if effect.paper else line


def order_section(study: Study) -> Iterator[str]:
    """Whether the gap orders what arms change; nothing for too few arms."""
    by_key = {key: correlations(study, key) for key in (*DIFFERENCES, SHARE)}
    starts = dict.fromkeys(run.start for run in study.runs)
    known = [start for start in starts if is_known(by_key, start)]
    if not known:
        return
    yield "## The gap and the change"
    yield (
        "Rank correlation over these arms of the gap with each difference, in each start: 1 means "
        "that the difference grows with the gap, -1 that it falls. The last row is of the KL's "
        "change over the control's KL, which is all that there was to gain."
    )
    table = [["with", *known]]
    for key, of_start in by_key.items():
        if all(math.isnan(value) for value in of_start.values()):
            continue
        name = key if key == SHARE else COLUMNS[key][0]
        table.append([name, *(number(of_start[start], 2) for start in known)])
    yield markdown(table)


def is_known(by_key: Mapping[str, Mapping[str, float]], start: str) -> bool:
    return not all(math.isnan(of_start[start]) for of_start in by_key.values())


def draw_effects(study: Study, figure: Figure) -> None:
    """Two panels over the gap: a dot an arm, a bar from its smallest to its largest pair."""
    found = by_gap(study)
    middle = (found[0].gap + found[-1].gap) / 2
    for axes, (key, label) in zip(figure.subplots(1, len(DRAWN)), DRAWN.items(), strict=True):
        axes.axhline(0, color="0.8", linewidth=0.8)
        for each in found:
            value = each.differences[key]
            axes.plot([each.gap, each.gap], [value.low, value.high], color="0.6", linewidth=1)
            axes.scatter([each.gap], [value.value], s=18, color="black", zorder=3)
            on_the_right = each.gap > middle  # a name stays inside of its panel
            axes.annotate(
                each.arm,
                (each.gap, value.value),
                xytext=(-4 if on_the_right else 4, 0),
                textcoords="offset points",
                ha="right" if on_the_right else "left",
                fontsize=6.5,
            )
        axes.set_xlabel("E|anchor - G|², latents")
        axes.set_ylabel(label)
