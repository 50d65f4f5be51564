"""Plots of a study as SVG: scores along the way, the front, and the gap beside the outcome."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfforcing_dfd.common import atomic_file
from selfforcing_dfd.evaluation.curves import PALETTE, QUIET, STYLE, svg
from selfforcing_dfd.evaluation.tables import START
from selfforcing_dfd.study.choice import has_families
from selfforcing_dfd.study.compare import Mean, along, gaps, points, spent, teacher_value
from selfforcing_dfd.study.effects import by_gap, draw_effects
from selfforcing_dfd.study.plan import LONG
from selfforcing_dfd.study.results import Study

PANELS = {
    "coverage": "coverage of 72 modes",
    "kl_prior_sample": "KL(prior ‖ sample)",
    "valid": "validity",
    "contrast": "contrast",
    "speed_px": "speed, px a video frame",
    "follow": "goes on as begun",
}
DASHES = ("-", "--", ":", "-.")
COLUMNS = 3


def write_plots(study: Study, folder: Path) -> dict[str, Path]:
    """Title -> file of every plot that the study's numbers can fill.

    None of a screening: dozens of lines from one run each would show nothing.
    """
    if has_families(study):
        return {}
    drawn = {
        "Along the way": ("trajectories.svg", trajectories(study)),
        "Along the way, by compute": ("compute.svg", trajectories(study, by_compute=True)),
        "Coverage against contrast": ("front.svg", front_plot(study)),
    }
    if len(gaps(study)) > 1:
        drawn["Gap against coverage"] = ("gap.svg", gap_plot(study))
    if len(by_gap(study)) > 1:
        drawn["Gap against what an arm changes"] = ("effects.svg", effects_plot(study))
    files = {}
    for title, (name, text) in drawn.items():
        files[title] = folder / name
        with atomic_file(files[title]) as partial:
            partial.write_text(text, encoding="utf-8")
    return files


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a dash for each name, all different for up to 32; then they repeat."""
    pairs = itertools.cycle(itertools.product(DASHES, PALETTE))
    return {
        name: {"color": colour, "linestyle": dash, "label": name}
        for name, (dash, colour) in zip(names, pairs, strict=False)
    }


def shown(study: Study) -> list[str]:
    """Arms with runs, lengthened ones left out."""
    return [arm for arm in study.arms if not arm.endswith(LONG) and study.runs_of(arm)]


def trajectories(study: Study, by_compute: bool = False) -> str:
    """One panel a score: means over runs with their ranges, the start at 0, teacher and data."""
    unit = "GFLOP" if by_compute else "student updates"
    rows = math.ceil(len(PANELS) / COLUMNS)
    style = looks(shown(study))
    with drawing(9.6, 2.4 * rows + 0.8) as figure:
        axes = figure.subplots(rows, COLUMNS).flatten()
        for place, (key, title) in zip(axes, PANELS.items(), strict=True):
            for arm, look in style.items():
                draw_arm(place, study, arm, key, look, by_compute)
            for name, dash in (("teacher", ":"), ("data", "--")):
                reference = study.references[name].get(key)
                if reference is not None:
                    place.axhline(reference, color=QUIET, linestyle=dash, linewidth=0.9)
            place.set_title(title, fontsize=9)
            place.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[-2].set_xlabel(f"{unit}; dotted the teacher, dashed grey the data")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
        return svg(figure)


def draw_arm(
    place: Axes, study: Study, arm: str, key: str, look: Mapping[str, Any], by_compute: bool
) -> None:
    """A line through the means and a band over the range of runs.

    It begins at the starts' students if the arm does.
    """
    found = along(study, arm, key)
    starts = study.starts.values() if study.arms[arm].from_start else ()
    own = [rows[START].get(key) for rows in starts]
    known = [each for each in own if each is not None]
    if known:
        found.insert(0, (0, Mean(sum(known) / len(known), min(known), max(known), len(known))))
    costs = spent(study, arm)
    xs = [costs[update] if by_compute else update for update, _ in found]
    values = [point.value for _, point in found]
    lows = [point.low for _, point in found]
    highs = [point.high for _, point in found]
    place.plot(xs, values, marker="o" if len(xs) == 1 else "", markersize=3, **look)
    if any(low != high for low, high in zip(lows, highs, strict=True)):
        place.fill_between(xs, lows, highs, color=look["color"], alpha=0.12, linewidth=0)


def front_plot(study: Study) -> str:
    """Coverage against contrast, a line through each arm's points; a faint mark is less valid."""
    found = points(study)
    style = looks(shown(study))
    with drawing(6.4, 4.2) as figure:
        axes = figure.subplots()
        for arm, look in style.items():
            own = sorted((point for point in found if point.arm == arm), key=lambda p: p.update)
            xs = [point.contrast for point in own]
            ys = [point.coverage for point in own]
            axes.plot(xs, ys, linewidth=1, **look)
            faint = [to_rgba(look["color"], max(point.valid, 0.1) ** 4) for point in own]
            axes.scatter(xs, ys, s=14, color=faint)
        teacher = teacher_value(study, "coverage")
        axes.scatter([1], [teacher], marker="*", s=90, color=QUIET, label="teacher")
        axes.set_xlabel("contrast / teacher's")
        axes.set_ylabel("coverage of 72 modes")
        figure.legend(loc="outside right upper", frameon=False)
        return svg(figure)


def gap_plot(study: Study) -> str:
    """The logged gap against coverage, one dot an arm."""
    style = looks(shown(study))
    with drawing(4.8, 3.2) as figure:
        axes = figure.subplots()
        for arm, gap, coverage in gaps(study):
            axes.scatter([gap], [coverage], s=18, color=style[arm]["color"])
            axes.annotate(f" {arm}", (gap, coverage), fontsize=6.5)
        axes.set_xlabel("E|anchor - G|², latents")
        axes.set_ylabel("coverage of 72 modes")
        return svg(figure)


def effects_plot(study: Study) -> str:
    """The logged gap against what each arm changed of its own control."""
    with drawing(7.2, 3.2) as figure:
        draw_effects(study, figure)
        return svg(figure)


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of width x height inches in the report's style."""
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")
