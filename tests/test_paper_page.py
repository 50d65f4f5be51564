"""docs/paper.md repeats what the studies' own pages say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (DOCS / "paper.md").read_text().splitlines()
    if line.startswith("| ") and ".md) |" in line
]
"""Cells of all rows that name a study: claim, page, arms, what it showed, whether it holds."""


def scores(text: str) -> set[float]:
    """All numbers with decimals in a text, with their signs."""
    return {float(number) for number in re.findall(r"-?\d*\.\d+", text)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_numbers_are_those_of_the_arms_on_the_page(row):
    """Catches a sentence that was not written anew when its study went on."""
    page = (DOCS / re.findall(r"\((\w+\.md)\)", row[1])[0]).read_text()
    arms = re.findall(r"`(\w+)`", row[2])
    lines = {arm: re.findall(rf"^\| {arm} \|.*", page, re.M) for arm in arms}
    assert all(lines.values()), "an arm that the page does not have"
    there = scores("\n".join(line for found in lines.values() for line in found))
    assert scores(row[3]) <= there


def test_every_study_is_named():
    """Catches a page of results that the list of claims forgot."""
    named = {name for row in ROWS for name in re.findall(r"\((\w+)\.md\)", row[1])}
    studies = {path.stem for path in DOCS.glob("*.md") if path.read_text().startswith("# Study: ")}
    assert named == studies - {"screening"}
