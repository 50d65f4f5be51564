"""The report of a protocol: `evaluation.json` for programs, `report.html` for people."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from selfforcing_dfd.common import atomic_file
from selfforcing_dfd.evaluation import curves
from selfforcing_dfd.evaluation.page import svg
from selfforcing_dfd.protocol import horizon
from selfforcing_dfd.protocol.compare import Difference, all_compared, power_note
from selfforcing_dfd.protocol.document import evaluation_of
from selfforcing_dfd.protocol.folder import EVALUATION, REPORT, write_json
from selfforcing_dfd.protocol.plan import Cell
from selfforcing_dfd.protocol.prepared import Prepared
from selfforcing_dfd.protocol.results import Result, gather
from selfforcing_dfd.protocol.tables import (
    Table,
    all_scores,
    as_text,
    means_table,
    pair_tables,
    paper_table,
    shown_scores,
)

SHOWN_PROMPTS = 6  # whose videos the page shows, of the first seeds
SHOWN_SEEDS = 2


@dataclass(frozen=True, slots=True)
class Strip:
    """The videos of one prompt and seed: method -> address relative to the page; empty for none."""

    prompt: str
    seed: int
    videos: dict[str, str]


def write_report(prepared: Prepared) -> str:
    """Write both files from what is measured so far; returns what a terminal shows."""
    results = gather(prepared)
    for result in results.values():
        horizon.add_changes(result)
    differences = all_compared(prepared.protocol, results)
    root = prepared.folder.root
    write_json(root / EVALUATION, evaluation_of(prepared, results, differences))
    scores = shown_scores(prepared.protocol, results)
    first = first_tables(prepared, results, differences, scores)
    notes = notes_on(prepared, results, differences)
    with atomic_file(root / REPORT) as partial:
        partial.write_text(render(prepared, results, differences, first, notes), encoding="utf-8")
    shown = [as_text(table) for table in first]
    return "\n\n".join([*shown, "\n".join(notes), str(root / REPORT)])


def first_tables(
    prepared: Prepared,
    results: Mapping[str, Result],
    differences: Sequence[Difference],
    scores: Sequence[str],
) -> list[Table]:
    """The tables of the terminal: means, each method against the control, the paper's numbers."""
    protocol = prepared.protocol
    tables = []
    if len(prepared.not_run) < len(protocol.methods):
        tables.append(means_table("Means", results, scores, prepared.not_run))
    with_control = [each for each in differences if each.other == protocol.control]
    tables += pair_tables(with_control, scores)
    if protocol.paper is not None:
        tables.append(paper_table(protocol.paper, results, prepared.not_run))
    return tables


def notes_on(
    prepared: Prepared, results: Mapping[str, Result], differences: Sequence[Difference]
) -> list[str]:
    """What a reader has to know: what was not run, what is not finished, what n can show."""
    reasons: dict[str, list[str]] = {}
    for name, why in prepared.not_run.items():
        reasons.setdefault(why, []).append(name)
    for text, why in prepared.no_features.items():
        reasons.setdefault(why, []).append(f"features {text}")
    notes = [f"{', '.join(names)}: not run, {why}" for why, names in reasons.items()]
    for name, result in results.items():
        wanted = len(prepared.cells(name))
        if len(result.cells) < wanted:
            notes.append(f"{name}: {len(result.cells)} of {wanted} videos are measured so far.")
        if result.failures:
            notes.append(f"{name}: {len(result.failures)} videos have no camera poses.")
    return notes + power_note(prepared.protocol, differences)


def render(
    prepared: Prepared,
    results: Mapping[str, Result],
    differences: Sequence[Difference],
    first: Sequence[Table],
    notes: Sequence[str],
) -> str:
    """The page. It needs nothing but the videos beside it."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": svg}
    style = files("selfforcing_dfd.evaluation") / "templates" / "report.css"
    protocol = prepared.protocol
    methods = list(protocol.methods)
    scores = all_scores(results)
    other = [each for each in differences if each.other != protocol.control]
    return environment.get_template("protocol.html").render(
        name=Path(prepared.name).stem,
        protocol=protocol,
        num_prompts=len(prepared.prompts),
        style=Markup(style.read_text(encoding="utf-8")),
        palette=curves.PALETTE,
        colour={name: place % len(curves.PALETTE) for place, name in enumerate(methods)},
        first=first,
        references=pair_tables(other, shown_scores(protocol, results)),
        everything=[
            means_table("All scores", results, scores, prepared.not_run),
            *pair_tables(differences, scores),
        ],
        notes=notes,
        plots=list(horizon.plots(horizon.all_curves(results), methods)),
        strips=strips(prepared),
        evaluation=EVALUATION,
    )


def strips(prepared: Prepared) -> list[Strip]:
    """The first prompts' videos of all methods, of equal seeds beside each other."""
    found = []
    for prompt in prepared.prompts[:SHOWN_PROMPTS]:
        for seed in prepared.protocol.seeds[:SHOWN_SEEDS]:
            cells = [Cell(name, prompt, seed) for name in prepared.protocol.methods]
            videos = {cell.method: address(prepared, cell) for cell in cells}
            if any(videos.values()):
                found.append(Strip(prompt.text, seed, videos))
    return found


def address(prepared: Prepared, cell: Cell) -> str:
    if cell.method in prepared.not_run or not prepared.video(cell).exists():
        return ""
    return Path(os.path.relpath(prepared.video(cell), prepared.folder.root)).as_posix()
