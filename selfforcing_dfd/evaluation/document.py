"""A report's files: JSON for programs, Markdown and HTML for people, and the text that a terminal
shows.
"""

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
from selfforcing_dfd.evaluation.tables import CONTROL, FEWEST, FEWEST_FOR_MODES, MARKS, RULE, Row
from selfforcing_dfd.tiny.world import MODE_PRIOR

REPORT_FILE = "report.json"


def notes_on(rows: Sequence[Row], num_clips: int, num_seeds: int = 1) -> list[str]:
    """How to read the table of these rows."""
    several = num_seeds > 1
    spread = f"the range over {num_seeds} seeds" if several else "95 % bootstrap intervals"
    expected = tables.expected_modes(num_clips)
    said = [
        f"{num_clips} clips a row{' and seed' if several else ''}, the same captions and noise in each, with {spread}. "
        f"So many independent draws from the prior hit {expected:.1f} of the 24 modes on average. Means over fewer "
        f"than {FEWEST} valid clips, and KL from fewer than {FEWEST_FOR_MODES}, are not stated."
    ]
    if several:
        said.append("Above or below the data means: in every seed, with disjoint 95 % intervals.")
    if tables.find(rows, CONTROL):
        said.append(RULE)
    if not several:
        said.append("One seed; a claim needs at least three.")
    return said


def environment(device: str, seconds: float) -> dict[str, str]:
    """What a report was made on, and in how many seconds."""
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
    """Write report.json, with `more` (the config among it) beside what the page shows, report.md
    and report.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_clips = int(more["config"]["report"]["clips"])
    document = {
        "title": page.title,
        "verdict": " ".join(finding.text for finding in page.findings),
        "findings": [{"name": f.name, "outcome": f.outcome, "text": f.text} for f in page.findings],
        "num_clips": num_clips,
        "expected_modes": tables.expected_modes(num_clips),
        "mode_prior": MODE_PRIOR.tolist(),
        "rows": [tables.to_json(row) for row in page.rows],
        "environment": dict(page.environment),
        **more,
    }
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(page), encoding="utf-8")
    (folder / "report.html").write_text(render_page(page), encoding="utf-8")


def _markdown(page: Page) -> str:
    findings = "\n\n".join(f"**{finding.text}**" for finding in page.findings)
    notes = "\n".join(f"- {note.replace('||', '‖')}" for note in (MARKS, *page.notes))
    about = "\n".join(f"- {row.name}: {row.about}" for row in page.rows)
    facts = ", ".join(f"{name} {value}" for name, value in page.environment.items())
    commands = "\n".join(page.commands)
    return (
        f"# {page.title}\n\n{page.subtitle}.\n\n{findings}\n\n{tables.markdown_table(page.rows)}\n\n{notes}\n\n"
        f"Rows:\n{about}\n\n```\n{commands}\n```\n\n{facts}\n"
    )


def printed(page: Page, folder: Path) -> str:
    """The table and the verdict for a terminal."""
    notes = "\n".join(textwrap.fill(note, 110) for note in (MARKS, *page.notes))
    said = textwrap.fill(" ".join(finding.text for finding in page.findings), 110)
    head = f"{page.title}: {page.subtitle}"
    return f"\n{head}\n\n{tables.plain_table(page.rows)}\n\n{notes}\n\n{said}\n\n{folder / 'report.html'}"
