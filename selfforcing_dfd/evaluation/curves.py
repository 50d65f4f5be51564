"""Plots of a report as SVG, by matplotlib. Equal numbers give equal bytes.

Backgrounds are transparent and lines of middle brightness, so that the plots fit the page's light
and dark theme.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

PALETTE = ("#808794", "#0f8f83", "#b7850b", "#3b78ee", "#e0622a", "#8b5cf6", "#d23f85", "#5f9412")
QUIET = "#808794"  # text, ticks and reference lines
LIGHT = "#80879440"  # grid
BAR = "#80879480"  # of what has no colour of its own
HUE_COLOURS = {
    "red": "#dc4c4c",
    "yellow": "#d9b818",
    "green": "#4caf50",
    "cyan": "#22b5c4",
    "blue": "#4a6cf0",
    "magenta": "#c850c0",
}
ARROWS = {"right": "→", "down": "↓", "left": "←", "up": "↑"}

MAX_POINTS = 150  # a longer curve is averaged down to so many
LOG_FROM = 30.0  # ratio of largest to smallest value from which the axis is logarithmic
TALLEST = 1.5  # a chart's height, in units of the law's largest share

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "selfforcing_dfd",  # equal plots get equal ids
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": QUIET,
    "axes.edgecolor": LIGHT,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.h_pad": 0.08,  # inches
}

# dates and versions would make equal plots differ
NO_METADATA: dict[str, dict[str, None]] = {
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
}

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. colour: index into PALETTE; dashed: the rows anchored by data."""

    name: str
    points: Points
    colour: int
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot over student updates. reference: a value to compare with, drawn as a line."""

    title: str
    unit: str
    series: tuple[Series, ...]
    reference: float | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A panel to draw if a run measured it.

    turn: whose updates. branches: one curve for rows anchored by their own sample (DMD, solid) and
    one for rows anchored by data (DFD, dashed).
    """

    title: str
    unit: str
    turn: str
    metric: str
    branches: bool = False
    reference: float | None = None


WANTED = (
    Wanted("Training loss", "", "student", "loss"),
    Wanted("Fake-score loss", "flow, per value", "fake", "loss"),
    Wanted("|d| = |fake - teacher|", "latents, by branch", "student", "discrepancy", True),
    Wanted("Normaliser |G - teacher|", "latents, by branch", "student", "normaliser", True),
    Wanted("Gap |x - G|² to the real clip", "latents²", "student", "gap"),
    Wanted("Saturation / data", "ratio", "student", "saturation_ratio", reference=1.0),
    Wanted("Contrast / data", "ratio", "student", "contrast_ratio", reference=1.0),
    Wanted("Sharpness / data", "ratio", "student", "sharpness_ratio", reference=1.0),
    Wanted("Motion / data", "ratio", "student", "motion_ratio", reference=1.0),
    Wanted("Spread / data", "ratio", "student", "spread_ratio", reference=1.0),
    Wanted("Student gradient norm", "before clipping", "student", "grad_norm"),
    Wanted("Fake-score gradient norm", "before clipping", "fake", "grad_norm"),
)


def panels(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, int]
) -> list[Panel]:
    """The plots that these runs' metrics can fill. runs: name -> lines of its metrics file."""
    drawn = []
    for wanted in WANTED:
        endings = {"/dmd": False, "/dfd": True} if wanted.branches else {"": False}
        series = []
        for name, lines in runs.items():
            for ending, dashed in endings.items():
                points = curve(lines, wanted.turn, wanted.metric + ending)
                if points:
                    series.append(Series(name, points, colours[name], dashed))
        if series:
            drawn.append(Panel(wanted.title, wanted.unit, tuple(series), wanted.reference))
    return drawn


def curve(lines: Sequence[Mapping[str, Any]], turn: str, metric: str) -> Points:
    """(student update, value) of a metric, averaged over the turns of one update.

    A curve of more than MAX_POINTS is also averaged over neighbours.
    """
    values: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        if line["kind"] == turn and line.get(metric) is not None:
            values[line["student_update"]].append(line[metric])
    points = [(update, _mean(several)) for update, several in sorted(values.items())]
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[start : start + stride] for start in range(0, len(points), stride)]
    return tuple(_mean_point(group) for group in groups)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_point(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    xs, ys = zip(*points, strict=True)
    return _mean(xs), _mean(ys)


def plot(panel: Panel) -> str:
    """A panel's curves over student updates."""
    ys = [y for series in panel.series for _, y in series.points]
    with figure(3.6, 2.0) as (drawing, axes):
        for series in panel.series:
            xs, values = zip(*series.points, strict=True)
            axes.plot(
                xs,
                values,
                color=PALETTE[series.colour],
                linestyle="--" if series.dashed else "-",
                marker="o" if len(xs) == 1 else "",
                markersize=3,
            )
        if panel.reference is not None:
            axes.axhline(panel.reference, color=QUIET, linestyle=":", linewidth=1)
        if min(ys) > 0 and max(ys) / min(ys) > LOG_FROM:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("student update")
        return svg(drawing)


@dataclass(frozen=True, slots=True)
class Group:
    """Values of one factor: names, their shares, and the shares that the data's law has."""

    names: Sequence[str]
    shares: Sequence[float]
    law: Sequence[float]


def share_chart(groups: Sequence[Group]) -> str:
    """Shares as bars, group beside group, with a tick across each where the law is.

    Hues have their own colour. A share that is not known has no bar. The scale is the same for all
    shares; a taller bar is cut off and labelled with its share.
    """
    highest = TALLEST * max(share for group in groups for share in group.law)
    with figure(3.6, 1.5) as (drawing, axes):
        left = 0
        names: list[str] = []
        places: list[int] = []
        for group in groups:
            xs = range(left, left + len(group.names))
            known = [share if math.isfinite(share) else 0.0 for share in group.shares]
            colours = [HUE_COLOURS.get(name, BAR) for name in group.names]
            axes.bar(xs, [min(share, highest) for share in known], 0.9, color=colours)
            axes.hlines(group.law, [x - 0.5 for x in xs], [x + 0.5 for x in xs], color=QUIET)
            for x, share in zip(xs, known, strict=True):
                if share > highest:
                    axes.text(x, highest, f"{share:.0%}", ha="center", va="bottom")
            names += [ARROWS.get(name, name) for name in group.names]
            places += xs
            left += len(group.names) + 1  # a gap after each group
        axes.set_ylim(0, highest)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xticks(places, names, fontsize=6.5, rotation=45)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        return svg(drawing)


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of width x height inches in the report's style. It belongs to no window system."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(width, height), layout="constrained")
        yield drawing, drawing.add_subplot()


def svg(drawing: Figure) -> str:
    """The figure as an SVG document, the same bytes for the same figure."""
    written = io.StringIO()
    drawing.savefig(written, format="svg", transparent=True, metadata=NO_METADATA[".svg"])
    return written.getvalue()
