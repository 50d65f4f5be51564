"""A report's files: JSON for programs, Markdown and HTML for people, and text for a terminal."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.evaluation import tables
from selfforcing_dfd.evaluation.page import Page, render_page
from selfforcing_dfd.evaluation.tables import MARKS, TERMINAL, Row
from selfforcing_dfd.evaluation.world import World

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
MARKDOWN_FILE = "report.md"
FIRST_REPORTING_SEED = 2000  # evaluation seeds below are for tuning


def notes_on(
    world: World,
    rows: Sequence[Row],
    num_clips: int,
    evaluation_seeds: Sequence[int],
    num_runs: int = 1,
) -> list[str]:
    """How to read the table of these rows."""
    if num_runs > 1:
        each = f"{num_clips} clips a row and run"
        spread = f"the range over {num_runs} runs"
        last = "Above or below the data means: in every run, with disjoint 95 % intervals."
    else:
        each = f"{num_clips} clips a row"
        spread = "95 % bootstrap intervals"
        last = "One run; a claim needs several starts and several draws of each."
    first = f"{each}, the same captions and noise in each, with {spread}."
    return [first, evaluated_with(evaluation_seeds), *world.notes(rows, num_runs), last]


def evaluated_with(seeds: Sequence[int]) -> str:
    """Which captions, clips and noise were shown, and what they may be used for."""
    number = f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
    if is_for_reporting(seeds[0]):
        return f"Captions, real clips and noise are of evaluation {number}, kept for reporting."
    return (
        f"Captions, real clips and noise are of evaluation {number}, on which settings may have "
        f"been chosen; a claim needs report.seed={FIRST_REPORTING_SEED} or above."
    )


def is_for_reporting(seed: int) -> bool:
    """Whether an evaluation seed is kept for reporting, and was never used to choose settings."""
    return seed >= FIRST_REPORTING_SEED


def environment(device: str, seconds: float) -> dict[str, str]:
    """The machine that a report was made on, and the seconds it took."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "CPU cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": device,
        "seconds for this report": f"{seconds:.0f}",
    }


def save(folder: Path, page: Page, more: Mapping[str, Any]) -> None:
    """Write report.json, .md and .html. `more`, with the config, goes into the JSON as well."""
    folder.mkdir(parents=True, exist_ok=True)
    num_clips = int(more["config"]["report"]["clips"])
    findings = [
        {"name": finding.name, "outcome": finding.outcome, "text": finding.text}
        for finding in page.findings
    ]
    document = {
        "title": page.title,
        "world": page.world.name,
        "headline": page.headline,
        "background": page.background,
        "verdict": page.verdict,
        "findings": findings,
        "num_clips": num_clips,
        "rows": [tables.to_json(row) for row in page.rows],
        "environment": dict(page.environment),
        **page.world.facts(),
        **more,
    }
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / MARKDOWN_FILE).write_text(_markdown(page), encoding="utf-8")
    (folder / PAGE_FILE).write_text(render_page(page), encoding="utf-8")


def _markdown(page: Page) -> str:
    notes = "\n".join(f"- {note.replace('||', '‖')}" for note in (MARKS, *page.notes))
    about = "\n".join(f"- {row.name}: {row.about}" for row in page.rows)
    facts = ", ".join(f"{name} {value}" for name, value in page.environment.items())
    commands = "\n".join(page.commands)
    parts = [
        f"# {page.title}",
        page.headline,
        f"{page.subtitle}.",
        page.tried,
        *(f"**{finding.text}**" for finding in page.findings),
        page.background,
        tables.markdown_table(page.rows, page.world.metrics),
        notes,
        f"Rows:\n{about}",
        f"```\n{commands}\n```",
        facts,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def printed(page: Page, folder: Path) -> str:
    """The headline, the table and the verdict for a terminal."""
    parts = [
        textwrap.fill(page.headline, TERMINAL),
        f"{page.title}: {page.subtitle}",
        tables.plain_table(page.rows, page.world.metrics),
        "\n".join(textwrap.fill(note, TERMINAL) for note in (MARKS, *page.notes)),
        textwrap.fill(page.verdict, TERMINAL),
        textwrap.fill(page.background, TERMINAL),
        str(folder / PAGE_FILE),
    ]
    return "\n" + "\n\n".join(part for part in parts if part)
