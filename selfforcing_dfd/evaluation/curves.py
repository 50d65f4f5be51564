"""Curves and histograms as inline SVG. Colours and fonts come from the page's style sheet, so they
follow its theme.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from selfforcing_dfd.tiny.world import DIRECTIONS, HUES

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34  # margins around the plotted area
MAX_POINTS = 150  # a longer curve is averaged down to so many
LOG_FROM = 30.0  # ratio of largest to smallest value from which the axis is logarithmic

_ARROWS = {"right": "→", "down": "↓", "left": "←", "up": "↑"}

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. colour: index into the page's palette; dashed: the rows anchored by data."""

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


_BRANCHES = {"/dmd": False, "/dfd": True}
_PLAIN = {"": False}
# title, unit, who speaks, metric, endings of its name with whether they are dashed, reference
_PANELS: tuple[tuple[str, str, str, str, dict[str, bool], float | None], ...] = (
    ("Training loss", "", "student", "loss", _PLAIN, None),
    ("Fake-score loss", "flow, per value", "fake", "loss", _PLAIN, None),
    ("|d| = |fake - teacher|", "latents, by branch", "student", "discrepancy", _BRANCHES, None),
    ("Normaliser |G - teacher|", "latents, by branch", "student", "normaliser", _BRANCHES, None),
    ("Gap |x - G|² to the real clip", "latents²", "student", "gap", _PLAIN, None),
    ("Saturation / data", "ratio", "student", "saturation_ratio", _PLAIN, 1.0),
    ("Contrast / data", "ratio", "student", "contrast_ratio", _PLAIN, 1.0),
    ("Sharpness / data", "ratio", "student", "sharpness_ratio", _PLAIN, 1.0),
    ("Motion / data", "ratio", "student", "motion_ratio", _PLAIN, 1.0),
    ("Spread / data", "ratio", "student", "spread_ratio", _PLAIN, 1.0),
    ("Student gradient norm", "before clipping", "student", "grad_norm", _PLAIN, None),
    ("Fake-score gradient norm", "before clipping", "fake", "grad_norm", _PLAIN, None),
)


def panels(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, int]
) -> list[Panel]:
    """The plots that the metrics of these runs can fill. runs: name -> lines of its metrics file."""
    drawn = []
    for title, unit, kind, metric, endings, reference in _PANELS:
        series = [
            Series(name, points, colours[name], dashed)
            for name, lines in runs.items()
            for ending, dashed in endings.items()
            if (points := curve(lines, kind, metric + ending))
        ]
        if series:
            drawn.append(Panel(title, unit, tuple(series), reference))
    return drawn


def curve(lines: Sequence[Mapping[str, Any]], kind: str, metric: str) -> Points:
    """(student update, value), averaged over the turns of one update and over neighbours beyond
    MAX_POINTS.
    """
    values: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        if line["kind"] == kind and line.get(metric) is not None:
            values[line["student_update"]].append(line[metric])
    points = [(update, sum(several) / len(several)) for update, several in sorted(values.items())]
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[start : start + stride] for start in range(0, len(points), stride)]
    return tuple((sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups)


def plot(panel: Panel) -> str:
    """A line plot with light grid, tick labels and axis title."""
    xs = [x for series in panel.series for x, _ in series.points]
    ys = [y for series in panel.series for _, y in series.points]
    ys += [panel.reference] if panel.reference is not None else []
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > LOG_FROM
    along = Axis.over(xs, LEFT, WIDTH - RIGHT)
    up = Axis.over(ys, HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [_grid(along, up)]
    if panel.reference is not None:
        y = up.at(panel.reference)
        parts.append(
            f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    for series in panel.series:
        parts.append(_line(series, along, up))
    label = f"{panel.title} over student updates: {', '.join(dict.fromkeys(s.name for s in panel.series))}"
    return _svg(WIDTH, HEIGHT, label, parts)


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear or logarithmic scale from values low..high to pixels start..end, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(
        cls, values: Sequence[float], start: float, end: float, logarithmic: bool = False
    ) -> Axis:
        """A scale that shows all values and little more."""
        low, high = min(values), max(values)
        if logarithmic:
            exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            return cls(low / 1.1, high * 1.1, start, end, True, tuple(10.0**e for e in exponents))
        if high - low < 1e-12:
            low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
        step = nice_step((high - low) / 6)
        first = math.floor(low / step)
        ticks = tuple(step * n for n in range(first, math.ceil(high / step) + 1))
        margin = (high - low) * 0.05
        return cls(low - margin, high + margin, start, end, False, ticks)

    def at(self, value: float) -> float:
        """Pixel position of a value."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def shown(self) -> list[float]:
        return [tick for tick in self.ticks if self.low <= tick <= self.high]


def nice_step(width: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `width`."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * (1 - 1e-9))


def _grid(along: Axis, up: Axis) -> str:
    lines = []
    for tick in up.shown():
        y = up.at(tick)
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        lines.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in along.shown():
        if tick != round(tick):
            continue
        x = along.at(tick)
        lines.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        lines.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{tick:.0f}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">student update</text>'
    )
    return "".join(lines)


def _line(series: Series, along: Axis, up: Axis) -> str:
    style = f"line c{series.colour}" + (" dashed" if series.dashed else "")
    places = [(along.at(x), up.at(y)) for x, y in series.points]
    if len(places) == 1:
        return (
            f'<circle class="{style} dot" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2.5"/>'
        )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return (
        f'<polyline class="{style}" points="{path}"><title>{escape(series.name)}</title></polyline>'
    )


def histogram(counts: Sequence[int], prior: Sequence[float]) -> str:
    """Shares of the 24 modes as bars in their own hue, the prior as a tick across each.

    The scale is the same for all counts; a taller bar is cut off and says its share.
    """
    width, height, left, bottom, top = 360, 140, 30, 28, 14
    bar, hue_width = 11.0, 56.0  # four bars a hue, then a gap
    base, highest, total = height - bottom, 2.2 * max(prior), max(sum(counts), 1)
    tall = (base - top) / highest
    parts = []
    for share in (0.0, 0.1, 0.2, 0.3):
        y = base - tall * share
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{share:.0%}</text>')
    for index, (count, expected) in enumerate(zip(counts, prior, strict=True)):
        hue, direction = divmod(index, len(DIRECTIONS))
        x = left + 5 + hue * hue_width + direction * (bar + 1)
        share, middle = count / total, x + bar / 2
        shown, mark = tall * min(share, highest), tall * expected
        parts.append(
            f'<rect class="bar hue-{HUES[hue]}" x="{x:.1f}" y="{base - shown:.1f}" width="{bar}" height="{shown:.1f}">'
            f"<title>{HUES[hue]} {DIRECTIONS[direction]}: {count} of {total}, prior {expected:.1%}</title></rect>"
            f'<path class="prior" d="M{x - 1:.1f} {base - mark:.1f}h{bar + 2}"/>'
            f'<text class="tiny" x="{middle:.1f}" y="{base + 10}" text-anchor="middle">'
            f"{_ARROWS[DIRECTIONS[direction]]}</text>"
        )
        if share > highest:
            parts.append(
                f'<text x="{middle:.1f}" y="{top - 4}" text-anchor="middle">{share:.0%}</text>'
            )
        if direction == 0:
            under = x + 2 * bar + 1.5
            parts.append(
                f'<text x="{under:.1f}" y="{base + 23}" text-anchor="middle">{HUES[hue]}</text>'
            )
    return _svg(width, height, "Shares of the 24 modes, with their prior", parts)


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    name = escape(label, quote=True)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    )
