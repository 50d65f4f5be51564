"""`journal.jsonl` in a run's folder: what happened to the run, a line each, for people to read."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

JOURNAL_FILE = "journal.jsonl"


def note(run: Path, event: str, **facts: Any) -> None:
    """Append one line with the time; it is on the disk when this returns."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with (run / JOURNAL_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now, "event": event, **facts}) + "\n")
        file.flush()
        os.fsync(file.fileno())
