"""All results as one page of Markdown: predicted beside measured, and what was not measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

from benchmarks.gpu.expected import CONDITIONS, TABLES, Figure
from benchmarks.gpu.record import NO_TIME
from benchmarks.gpu.record import RESULTS as RESULTS

NOT_MEASURED = "not measured"
SHOWN_APART = {"tests"}
LONGEST_REASON = 300  # characters
MORE_IS_BETTER = {"FPS"}
"""Units. Of all others with a goal, milliseconds and gigabytes, less is better."""
Results = dict[str, dict[str, Any]]
INTRODUCTION = (
    "# On a GPU: predicted and measured",
    "",
    "Written by `python -m benchmarks.gpu page` from the JSON files in `benchmarks/gpu/results`;",
    "edit nothing here. How to measure: `benchmarks/gpu/README.md`.",
    "",
)


def read_results(folder: Path) -> Results:
    """The results of a folder by stage; none where there is no folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {result["stage"]: result for result in found}


def render(results: Results) -> str:
    lines = [*INTRODUCTION, *origin(results), ""]
    lines += wrapped(CONDITIONS)
    lines += [
        "",
        "Predictions come from counted operations and bytes and from rates that others report",
        "(`benchmarks/gpu/expected.yaml`). They were written before any measurement. 'As it was':",
        "the VAE's decoder before it was made leaner ([speed](speed.md)).",
    ]
    for title, figures in TABLES.items():
        lines += ["", f"## {title}", "", "| | unit | predicted | goal | measured |"]
        lines += ["|---|---|---|---|---|"]
        lines += [table_row(figure, results) for figure in figures]
    lines += ["", "## Tests", "", *lines_of_tests(results)]
    left_out = list(gaps(results))
    if left_out:
        lines += ["", "## What has no figure, and why", "", *left_out]
    return "\n".join(lines) + "\n"


def wrapped(text: str, width: int = 100) -> list[str]:
    return wrap(text, width, break_on_hyphens=False)


def origin(results: Results) -> Iterator[str]:
    """Where and when it was measured, a line for each machine and commit."""
    if not results:
        yield "**Date: none. Nothing of this project was run on a GPU yet**, so every row says"
        yield f'"{NOT_MEASURED}".'
        return
    if any(result["machine"]["small"] for result in results.values()):
        yield "**A rehearsal at small sizes: these figures say nothing about a GPU.**"
        yield ""
    groups: dict[str, list[str]] = {}
    for stage, result in results.items():
        facts = result["machine"]
        words = [facts["device"], f"torch {facts['torch']}"]
        words += [f"CUDA {facts['cuda']}"] if facts["cuda"] else []
        words += [f"cuDNN {facts['cudnn']}"] if facts["cudnn"] else []
        words += [f"commit {facts['commit'] or 'unknown'}", result["date"][:10]]
        groups.setdefault(", ".join(words), []).append(stage)
    for place, stages in groups.items():
        yield from wrapped(f"{place}: {', '.join(stages)}.")


def table_row(figure: Figure, results: Results) -> str:
    cells = (figure.what, figure.unit, figure.predicted, figure.goal, measured(figure, results))
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def measured(figure: Figure, results: Results) -> str:
    """The figure, and against its goal; or why there is none."""
    row = results.get(figure.stage, {}).get("rows", {}).get(figure.row)
    if row is None:
        return NOT_MEASURED
    if "value" not in row:
        return kind_of(row)
    found: Any = row["value"]
    for key in figure.path:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, int | float):
        return NOT_MEASURED
    value = found * figure.factor
    counts = figure.goal and not results[figure.stage]["machine"]["small"]
    return number(value) + (f", {verdict(value, figure)}" if counts else "")


def verdict(value: float, figure: Figure) -> str:
    """Whether a goal is met; if not, by how many per cent of it."""
    goal = float(figure.goal)
    beyond = (value - goal if figure.unit in MORE_IS_BETTER else goal - value) / goal
    if beyond >= 0:
        return "goal met"
    return f"goal missed by {number(-100 * beyond)} %"


def number(value: float) -> str:
    """Three significant digits."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def lines_of_tests(results: Results) -> Iterator[str]:
    """Passed and failed of each file of tests/gpu."""
    if "tests" not in results:
        yield f"`tests/gpu`: {NOT_MEASURED}, that is: never run on a GPU."
        return
    for name, row in results["tests"]["rows"].items():
        value = row.get("value")
        if value is None:
            yield f"- `{name}`: {reason(row)}"
            continue
        faults = "; ".join(f"{test}: {plain(why)}" for test, why in value["failed"].items())
        empty = value["not for this machine"]
        apart = f", {empty} not for this machine" if empty else ""
        yield f"- `{name}`: {value['passed']} passed{apart}" + (
            f", failed: {faults}" if faults else ""
        )


def gaps(results: Results) -> Iterator[str]:
    """A line for each reason, with the rows of a stage that share it."""
    rows_of: dict[tuple[str, str], list[str]] = {}
    others = {stage: result for stage, result in results.items() if stage not in SHOWN_APART}
    for stage, result in others.items():
        for name, row in result["rows"].items():
            if "value" not in row:
                rows_of.setdefault((stage, reason(row)), []).append(name)
    for (stage, why), names in rows_of.items():
        yield f"- {stage}, {'; '.join(names)}: {why}"


def reason(row: dict[str, Any]) -> str:
    """One line, as it stands in a list."""
    return f"{kind_of(row)}: {plain(str(row.get('error') or row.get('missing')))}"


def plain(text: str) -> str:
    """A message on one line, without the folders of one machine and without links."""
    without_folders = re.sub(r"(?<![\w./])/(?:[\w.+@-]+/)+", "", " ".join(text.split()))
    return without_folders.replace("](", "] (")[:LONGEST_REASON]


def kind_of(row: dict[str, Any]) -> str:
    """Of a row without a value."""
    if "error" in row:
        return "failed"
    return NOT_MEASURED if row["missing"].startswith(NO_TIME) else "not available"
