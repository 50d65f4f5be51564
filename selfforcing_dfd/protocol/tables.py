"""A protocol's tables, as text for the terminal and as cells for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from selfforcing_dfd.protocol.compare import Difference
from selfforcing_dfd.protocol.exact import EXACT
from selfforcing_dfd.protocol.exact import SHOWN as EXACT_SHOWN
from selfforcing_dfd.protocol.plan import AVERAGE, PaperPlan, Protocol
from selfforcing_dfd.protocol.results import Result
from selfforcing_dfd.tiny.bootstrap import Score

SHOWN = (
    "saturation",
    "contrast",
    "colorful",
    "laplacian",
    "difference_by_contrast",
    "residual_share",
    "flow_top",
    "seam_excess",
    "frozen",
    "drift_saturation",
    "drift_contrast",
    "camera.endpoint_distance",
    "camera.trajectory_distance",
    *(f"{EXACT}{name}" for name in EXACT_SHOWN),
)
"""Of all scores those of the first table, beside all that features give."""
NOT_RUN = "not run"
NONE = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """head: of the columns, the first one names the rows. notes: sentences below."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def as_text(table: Table) -> str:
    """With columns aligned, for a terminal."""
    lines = [table.head, *table.rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.head))]
    text = [table.title]
    for line in lines:
        first, *others = line
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append("  ".join(["", first.ljust(widths[0]), *cells]).rstrip())
    text += [f"  {note}" for note in table.notes]
    return "\n".join(text)


def number(value: float) -> str:
    """Four figures, or a dash for what is not known."""
    return NONE if not math.isfinite(value) else f"{value:.4g}"


def shown_scores(protocol: Protocol, results: Mapping[str, Result]) -> list[str]:
    """Scores of the first table, in order: those of the plan, or SHOWN and all of features."""
    if protocol.show:
        return list(protocol.show)
    known = all_scores(results)
    # of features, poses, VBench and changes over time; others have their own choice in SHOWN
    chosen = ("camera.", EXACT)
    others = [name for name in known if "." in name and not name.startswith(chosen)]
    return [name for name in SHOWN if name in known] + others


def all_scores(results: Mapping[str, Result]) -> list[str]:
    return list(dict.fromkeys(name for result in results.values() for name in result.names))


def with_interval(score: Score) -> str:
    if not math.isfinite(score.low) or not math.isfinite(score.value):
        return number(score.value)
    return f"{number(score.value)} [{number(score.low)}, {number(score.high)}]"


def means_table(
    title: str, results: Mapping[str, Result], scores: Sequence[str], not_run: Mapping[str, str]
) -> Table:
    """A line for each score, a column for each method."""
    counts = [
        NOT_RUN if method in not_run else str(len(result.cells))
        for method, result in results.items()
    ]
    rows = [["videos", *counts]]
    for name in scores:
        cells = [
            NOT_RUN if method in not_run else with_interval(result.score(name))
            for method, result in results.items()
        ]
        rows.append([name, *cells])
    notes = ["In brackets: 95 % bootstrap intervals, over prompts with all their seeds."]
    return Table(title, ["", *results], rows, notes)


def pair_table(differences: Sequence[Difference]) -> Table:
    """One method and what it is compared with. All differences are of that pair."""
    one = differences[0]
    head = ["", one.method, one.other, "difference", "lower/higher", "p", "smallest", ""]
    rows = []
    for each in differences:
        row = [each.score, number(each.mean), number(each.other_mean)]
        row += [with_interval(each.difference), f"{each.signs.lower}/{each.signs.higher}"]
        row += [f"{each.signs.p:.2g}", number(each.smallest), "*" if each.is_shown else ""]
        rows.append(row)
    notes = ["* sign test below 5 % and interval without 0"]
    return Table(f"{one.method} less {one.other}", head, rows, notes)


def pair_tables(differences: Sequence[Difference], scores: Sequence[str]) -> list[Table]:
    """A table for each pair of methods, of these scores."""
    pairs: dict[tuple[str, str], list[Difference]] = {}
    for each in differences:
        if each.score in scores:
            pairs.setdefault((each.method, each.other), []).append(each)
    return [
        pair_table(sorted(group, key=lambda each: scores.index(each.score)))
        for group in pairs.values()
    ]


def paper_table(
    paper: PaperPlan, results: Mapping[str, Result], not_run: Mapping[str, str]
) -> Table:
    """The published numbers and, below each of them, ours where it is the same measure."""
    rows = []
    for method, numbers in paper.rows.items():
        known = [numbers.get(column) for column in paper.columns]
        published = [NONE if value is None else f"{value:.6g}" for value in known]
        rows.append([f"{method}, paper", *published])
        if method in not_run:
            rows.append([f"{method}, here", *(NOT_RUN for _ in paper.columns)])
        else:
            found = ours(paper, results[method])
            cells = [number(value) if math.isfinite(value) else NOT_RUN for value in found]
            rows.append([f"{method}, here", *cells])
    notes = [f"Published: {paper.source}.", *paper.notes]
    return Table("Beside the paper", ["", *paper.columns], rows, notes)


def ours(paper: PaperPlan, result: Result) -> list[float]:
    """Our value of every column; NaN where there is none."""
    found: list[float] = []
    for score in paper.columns.values():
        if score == AVERAGE:
            found.append(sum(found) / len(found) if found else math.nan)
        else:
            found.append(result.score(score).value if score else math.nan)
    return found
