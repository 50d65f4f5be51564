"""The tables of docs/metrics.md, from what `calibration.calibrate` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selfforcing_dfd.metrics.calibration import LADDER, TRUTH, Judged, judge

SIGNS = {"worse": "+", "same": "·", "better": "**fooled**", "none": "-"}
HEADS = {
    "valid": "valid",
    "modes": "modes",
    "kl_prior_sample": "KL",
    "saturation": "saturation",
    "contrast": "contrast",
    "speed_px": "px a frame",
    "jitter_px": "jitter px",
}
FEWEST_SHOWN = LADDER[1]  # of the sets with fewer modes, the first that the table has


def tables(found: Mapping[str, Any]) -> str:
    """Markdown: the exact truth of every set, then what every metric makes of it."""
    return f"{truth_table(found)}\n\n{verdict_table(found)}\n"


def truth_table(found: Mapping[str, Any]) -> str:
    """One line for each set; the fresh sets are one line of means."""
    fresh = found["sets"][: found["fresh"]]
    usual = {name: mean_of(fresh, name) for name in TRUTH}
    lines = [row_of(["set", "what it is", *HEADS.values()])]
    lines.append(row_of(["---", "---", *["---:"] * len(TRUTH)]))
    lines.append(truth_row("data", fresh[0]["what"], usual))
    for row in found["sets"][found["fresh"] :]:
        lines.append(truth_row(row["set"], row["what"], row["truth"]))
    return "\n".join(lines)


def mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(row["truth"][name] for row in rows) / len(rows))


def truth_row(name: str, what: str, truth: Mapping[str, float | None]) -> str:
    cells = [number(truth[each], 0 if each == "modes" else 2) for each in HEADS]
    return row_of([name, what, *cells])


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def verdict_table(found: Mapping[str, Any]) -> str:
    """One line for each metric; + where it rates the set worse than the data."""
    judged = judge(found)
    shown = [name for name in judged[0].verdicts if name not in unshown()]
    lines = [row_of(["metric", "rank", *shown, "right"])]
    lines.append(row_of(["---", "---:", *[":-:"] * len(shown), "---:"]))
    lines += [verdict_row(each, shown) for each in judged]
    return "\n".join(lines)


def unshown() -> list[str]:
    """Sets that count in `rank` and `right` but have no column of their own."""
    return [f"{left} modes" for left in LADDER if left > FEWEST_SHOWN]


def verdict_row(judged: Judged, shown: Sequence[str]) -> str:
    verdicts = list(judged.verdicts.values())
    cells = [SIGNS[judged.verdicts[name]] for name in shown]
    right = f"{verdicts.count('worse')} of {len(verdicts)}"
    return row_of([judged.metric, f"{judged.rank:.2f}", *cells, right])


def row_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
