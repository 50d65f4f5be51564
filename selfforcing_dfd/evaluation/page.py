"""A report as one HTML file: nothing is fetched from elsewhere but the videos beside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from selfforcing_dfd.evaluation import curves
from selfforcing_dfd.evaluation.headline import label, shown_first
from selfforcing_dfd.evaluation.tables import (
    CONTROL,
    DATA,
    REFERENCES,
    Finding,
    Metric,
    Row,
    find,
    interval,
    number,
    shown,
)
from selfforcing_dfd.evaluation.world import World
from selfforcing_dfd.tiny.bootstrap import Score

FIXED_COLOURS = (*REFERENCES, CONTROL)
OUTCOME_CLASS = {"helped": "good", "harmed": "bad", "mixed": "mixed"}


@dataclass(frozen=True, slots=True)
class Sheet:
    """A row's clips. picture: PNG of the contact sheet; video: its address relative to the page."""

    picture: bytes
    video: str


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that the page shows.

    tried: a sentence on what was compared. background: what is known about it. notes: how to read
    the table. headline: one sentence for a stranger, or empty. strip: address of the video of
    `shown_first`'s rows side by side, or empty. captions: of the clips in the pictures.
    """

    title: str
    subtitle: str
    tried: str
    headline: str
    background: str
    world: World
    findings: Sequence[Finding]
    rows: Sequence[Row]
    notes: Sequence[str]
    sheets: Mapping[str, Sheet]
    strip: str
    captions: Sequence[str]
    panels: Sequence[curves.Panel]
    commands: Sequence[str]
    environment: Mapping[str, str]
    settings: str
    links: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """All sentences of the verdict."""
        return " ".join(finding.text for finding in self.findings)


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the table. tint: class of its colour; the places are percent of a strip."""

    value: str
    mark: str = ""
    interval: str = ""
    tint: str = "plain"
    dot: float | None = None
    bar: tuple[float, float] | None = None
    band: tuple[float, float] | None = None


def colours(rows: Sequence[Row]) -> dict[str, int]:
    """An index into the palette for every row, by name.

    References and the control always have the same; arms take the others in order.
    """
    names = [row.name for row in rows]
    arms = [name for name in names if name not in FIXED_COLOURS]
    num_free = len(curves.PALETTE) - len(FIXED_COLOURS)
    fixed = {name: index for index, name in enumerate(FIXED_COLOURS) if name in names}
    return fixed | {name: len(FIXED_COLOURS) + index % num_free for index, name in enumerate(arms)}


def render_page(page: Page) -> str:
    """The HTML document."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"label": label, "prose": prose, "png": png, "svg": svg}
    style = (files(__package__) / "templates" / "report.css").read_text(encoding="utf-8")
    series = [one for panel in page.panels for one in panel.series]
    first = shown_first([row.name for row in page.rows])
    strip_rows = [row for row in page.rows if row.name in first]
    plots = [(panel, curves.plot(panel)) for panel in page.panels]
    return environment.get_template("report.html").render(
        page=page,
        strip_rows=strip_rows,
        style=Markup(style),
        palette=curves.PALETTE,
        colour=colours(page.rows),
        outcome_class=OUTCOME_CLASS,
        table=table(page.rows, page.world.metrics),
        charts=page.world.charts(page.rows),
        curves={one.name: one.colour for one in series},
        has_dashed=any(one.dashed for one in series),
        plots=plots,
    )


def prose(text: str) -> Markup:
    """Text as HTML, with the sign of divergences set as one letter."""
    return escape(text.replace("||", "‖"))


def png(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def svg(document: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(document.encode()).decode()}"


def table(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[tuple[Metric, list[Cell]]]:
    """Every metric that some row has, with a cell for each row."""
    data = find(rows, DATA)
    return [(metric, cells(rows, metric, data)) for metric in shown(rows, metrics)]


def cells(rows: Sequence[Row], metric: Metric, data: Row | None) -> list[Cell]:
    """One line of the table. All strips have one scale, which holds every row's interval."""
    known = [row.scores[metric.key] for row in rows if metric.key in row.scores]
    ends = [end for score in known for end in (score.low, score.high) if math.isfinite(end)]
    low = min(ends, default=0.0)
    high = max(ends, default=1.0)
    if low == high:
        low -= 0.5
        high += 0.5

    def place(value: float) -> float:
        inside = min(max(value, low), high)
        return round(3 + 94 * (inside - low) / (high - low), 1)

    def span(score: Score | None) -> tuple[float, float] | None:
        if score is None or not math.isfinite(score.value):
            return None
        left = place(score.low)
        return left, round(place(score.high) - left, 1)

    reference = data.scores.get(metric.key) if data else None
    line = []
    for row in rows:
        score = row.scores.get(metric.key)
        if score is None or not math.isfinite(score.value):
            line.append(Cell("-"))
            continue
        mark = row.mark(metric.key, data)
        line.append(
            Cell(
                value=number(score.value, metric.digits),
                mark=mark if mark in ("↑", "↓") else "",
                interval=interval(score, metric.digits).strip("[]").replace(" ", " to "),
                tint=tint(score, reference, mark, metric),
                dot=place(score.value),
                bar=span(score),
                band=span(reference),
            )
        )
    return line


def tint(score: Score, data: Score | None, mark: str, metric: Metric) -> str:
    """Class of a cell by its distance to the data's value, in either direction."""
    if data is None or not mark:
        return "plain"
    if mark == "=":
        return "near"
    distance = abs(score.value - data.value) / metric.far
    if distance < 1 / 3:
        return "off1"
    return "off2" if distance < 2 / 3 else "off3"
