"""A report as one HTML file: nothing is fetched from elsewhere, and only the sample videos lie
beside it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from selfforcing_dfd.evaluation import curves
from selfforcing_dfd.evaluation.style import STYLE
from selfforcing_dfd.evaluation.tables import (
    CONTROL,
    DATA,
    REFERENCES,
    Finding,
    Metric,
    Row,
    find,
    interval,
    metrics_of,
    number,
)
from selfforcing_dfd.tiny.metrics import Score
from selfforcing_dfd.tiny.world import MODE_PRIOR

_FIXED_COLOURS = (*REFERENCES, CONTROL)
_NUM_COLOURS = 8


@dataclass(frozen=True, slots=True)
class Sheet:
    """A row's clips: PNG of the contact sheet, and the sample video's address relative to the page."""

    picture: bytes
    video: str


@dataclass(frozen=True, slots=True)
class Page:
    """All that the page shows. captions: of the contact sheets' columns; notes: how to read the
    table.
    """

    title: str
    subtitle: str
    findings: Sequence[Finding]
    rows: Sequence[Row]
    notes: Sequence[str]
    sheets: Mapping[str, Sheet]
    captions: Sequence[str]
    panels: Sequence[curves.Panel]
    commands: Sequence[str]
    environment: Mapping[str, str]
    settings: str
    links: Mapping[str, str]


def colours(names: Sequence[str]) -> dict[str, int]:
    """An index into the palette for every row: references and control always the same, arms in
    order.
    """
    arms = [name for name in names if name not in _FIXED_COLOURS]
    free = _NUM_COLOURS - len(_FIXED_COLOURS)
    fixed = {name: index for index, name in enumerate(_FIXED_COLOURS) if name in names}
    return fixed | {name: len(_FIXED_COLOURS) + index % free for index, name in enumerate(arms)}


def render_page(page: Page) -> str:
    """The HTML document."""
    palette = colours([row.name for row in page.rows])
    sections = [
        _section(
            "Scores",
            _table(page.rows, palette)
            + "".join(f'<p class="note">{_prose(n)}</p>' for n in page.notes),
        ),
        _section("Clips", _clips(page, palette)) if page.sheets else "",
        _section("Modes", _modes(page.rows, palette)),
        _section("Training", _training(page.panels)) if page.panels else "",
        _section("How this was made", _making(page)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="eyebrow">{escape(page.subtitle)}</p><h1>{escape(page.title)}</h1>'
        f"{_verdict(page)}</header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _verdict(page: Page) -> str:
    kinds = {"helped": "good", "harmed": "bad", "mixed": "mixed"}
    lines = [
        f'<p class="{kinds.get(finding.outcome, "open")}">{_emphasised(finding)}</p>'
        for finding in page.findings
    ]
    return f'<div class="verdict">{"".join(lines)}</div>'


def _emphasised(finding: Finding) -> str:
    """The sentence with the name it begins with set apart, and the details after the first colon
    smaller.
    """
    head, colon, details = finding.text.partition(": ")
    start = f"<b>{escape(finding.name)}</b>{escape(head.removeprefix(finding.name))}"
    return f"{start}{colon.strip()} <span>{_prose(details)}</span>" if details else start


def _prose(text: str) -> str:
    """Text as HTML, with the sign of divergences set as one."""
    return escape(text.replace("||", "‖"))


def _chip(name: str, palette: Mapping[str, int]) -> str:
    return f'<i class="chip c{palette[name]}"></i>'


def _table(rows: Sequence[Row], palette: Mapping[str, int]) -> str:
    heads = "".join(
        f'<th scope="col" title="{escape(row.about, quote=True)}">{_chip(row.name, palette)}{escape(row.name)}</th>'
        for row in rows
    )
    lines = "".join(_table_line(rows, metric, palette) for metric in metrics_of(rows))
    return (
        f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
        '<p class="legend"><span class="key near">the data&rsquo;s</span><span class="key off1">near</span>'
        '<span class="key off2">apart</span><span class="key off3">far</span>'
        "<span>↑ ↓ above or below the data&rsquo;s interval; the grey band is the data&rsquo;s interval, "
        "the line each row&rsquo;s own</span></p>"
    )


def _table_line(rows: Sequence[Row], metric: Metric, palette: Mapping[str, int]) -> str:
    data = find(rows, DATA)
    reference = data.scores.get(metric.key) if data else None
    scores = [row.scores.get(metric.key) for row in rows]
    low, high = _range([score for score in scores if score is not None])
    cells = []
    for row, score in zip(rows, scores, strict=True):
        if score is None:
            cells.append("<td>-</td>")
            continue
        mark = row.mark(metric.key, data)
        strip = _strip(score, reference, low, high, palette[row.name])
        cells.append(
            f'<td class="{_tint(score, reference, mark, metric)}"><b>{number(score.value, metric.digits)}</b>'
            f"<span class=mark>{mark if mark in ('↑', '↓') else ''}</span>"
            f"{strip}<small>{interval(score, metric.digits).strip('[]').replace(' ', ' &ndash; ')}</small></td>"
        )
    return f'<tr><th scope="row">{_prose(metric.title)}<small>{escape(metric.about)}</small></th>{"".join(cells)}</tr>'


def _tint(score: Score, data: Score | None, mark: str, metric: Metric) -> str:
    """Class of a cell by its distance to the data's value, in either direction."""
    if data is None or not mark:
        return "plain"
    if mark == "=":
        return "near"
    distance = abs(score.value - data.value) / metric.far
    return "off1" if distance < 1 / 3 else "off2" if distance < 2 / 3 else "off3"


def _range(scores: Sequence[Score]) -> tuple[float, float]:
    """Values that all intervals lie between."""
    ends = [end for score in scores for end in (score.low, score.high) if math.isfinite(end)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _strip(score: Score, data: Score | None, low: float, high: float, colour: int) -> str:
    """A row's value and interval on the line of all rows' values, over the data's interval."""
    if not math.isfinite(score.value):
        return ""

    def place(value: float) -> float:
        return 3 + 94 * (min(max(value, low), high) - low) / (high - low)

    def span(kind: str, interval_of: Score) -> str:
        left, right = place(interval_of.low), place(interval_of.high)
        return f'<i class="{kind}" style="left:{left:.1f}%;width:{right - left:.1f}%"></i>'

    band = span("band", data) if data is not None and math.isfinite(data.value) else ""
    dot = f'<i class="dot" style="left:{place(score.value):.1f}%"></i>'
    return f'<span class="strip c{colour}">{band}{span("bar", score)}{dot}</span>'


def _clips(page: Page, palette: Mapping[str, int]) -> str:
    cards = []
    for row in page.rows:
        if row.name not in page.sheets:
            continue
        sheet = page.sheets[row.name]
        picture = base64.b64encode(sheet.picture).decode()
        name, video = escape(row.name), escape(sheet.video, quote=True)
        cards.append(
            f'<figure class="card clips"><figcaption>{_chip(row.name, palette)}<b>{name}</b>'
            f'<small>{escape(row.about)}</small></figcaption><img class="sheet" '
            f'alt="{name}: one clip a column, time downwards" src="data:image/png;base64,{picture}">'
            f'<video controls loop muted playsinline preload="metadata" src="{video}"></video></figure>'
        )
    asked = "; ".join(f"{index} {caption}" for index, caption in enumerate(page.captions, start=1))
    return (
        '<p class="note">One clip a column, time downwards. A column has the same caption and the same noise in every '
        f"sheet: {escape(asked)}.</p>{''.join(cards)}"
    )


def _modes(rows: Sequence[Row], palette: Mapping[str, int]) -> str:
    prior = MODE_PRIOR.tolist()
    cards = "".join(
        f'<figure class="card"><figcaption>{_chip(row.name, palette)}<b>{escape(row.name)}</b> '
        f"<small>{sum(row.modes)} valid clips, {sum(count > 0 for count in row.modes)} of 24 modes</small></figcaption>"
        f"{curves.histogram(row.modes, prior)}</figure>"
        for row in rows
    )
    return (
        '<p class="note">Share of the valid clips in each of the 24 modes, hue by direction of motion. '
        f'The dark ticks are the data&rsquo;s law.</p><div class="cards">{cards}</div>'
    )


def _training(panels: Sequence[curves.Panel]) -> str:
    names = {series.name: series.colour for panel in panels for series in panel.series}
    legend = "".join(
        f'<span><i class="chip c{colour}"></i>{escape(name)}</span>'
        for name, colour in names.items()
    )
    if any(series.dashed for panel in panels for series in panel.series):
        legend += "<span>solid: rows anchored by their own sample (DMD)</span><span>dashed: by data (DFD)</span>"
    cards = "".join(
        f'<figure class="card"><figcaption><b>{escape(panel.title)}</b> '
        f"<small>{escape(panel.unit)}</small></figcaption>{curves.plot(panel)}</figure>"
        for panel in panels
    )
    return f'<p class="legend">{legend}</p><div class="cards">{cards}</div>'


def _making(page: Page) -> str:
    links = "".join(
        f'<li><a href="{escape(address, quote=True)}">{escape(name)}</a></li>'
        for name, address in page.links.items()
    )
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in page.environment.items()
    )
    commands = escape("\n".join(page.commands))
    settings = (
        f"<details><summary>All settings</summary><pre>{escape(page.settings)}</pre></details>"
    )
    return (
        (f"<ul>{links}</ul>" if links else "")
        + f"<pre><code>{commands}</code></pre><dl>{facts}</dl>"
        + (settings if page.settings else "")
    )
