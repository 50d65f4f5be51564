"""What was predicted before anything ran on a GPU, and what is wanted: the rows of the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONDITIONS = (
    "One H200, Wan2.1 1.3B with random weights, 480x832, bfloat16, chunks of 3 latent frames, "
    "K = 12 (sink 3 + window 9), 4 steps and a commit pass, Wan's VAE, 12 video frames a chunk; "
    "a row says what differs."
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: what, where its measurement lies, what was predicted and what is wanted.

    path: keys from a row's value down. factor: from the stored unit to the shown one.
    """

    what: str
    stage: str
    row: str
    path: list[str]
    unit: str = ""
    predicted: str = ""
    goal: str = ""
    factor: float = 1.0


def read_tables() -> dict[str, list[Figure]]:
    """The figures of `expected.yaml`, by the title of their table."""
    path = Path(__file__).with_name("expected.yaml")
    tables: dict[str, list[dict[str, Any]]] = yaml.safe_load(path.read_text())
    return {title: [Figure(**row) for row in rows] for title, rows in tables.items()}


TABLES = read_tables()
