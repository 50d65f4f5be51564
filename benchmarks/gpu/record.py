"""The rows of one stage, in a JSON file that is written after each of them."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.benchmark.table import device_facts, git_commit

LONGEST_ERROR = 800  # characters
COMMIT = "COMMIT"
"""Environment variable with the commit, where the checkout came without its history."""


SAME = ("device", "torch", "cuda", "cudnn", "commit", "small")
"""Facts that rows of one file share. Of a GPU, the clock is among the others."""


class Missing(Exception):
    """Something that this machine, or this version, does not have; the message says what."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a stage runs. small: sizes for a rehearsal on a CPU."""

    device: torch.device
    small: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def compiler(self) -> dict[str, str]:
        """Options of torch.compile. A rehearsal leaves out inductor, which takes minutes there."""
        return {"backend": "eager"} if self.small else {}

    def facts(self) -> dict[str, Any]:
        """What every result says about where it was measured."""
        return {
            **device_facts(self.device),
            "torch": torch.__version__,
            "commit": git_commit() or os.environ.get(COMMIT),
            "small": self.small,
        }


@dataclass(slots=True)
class Record:
    """Rows by name. Each holds `value`, or `missing` (why there is none), or `error`.

    A stage that is stopped loses the running row alone. limit_s: no row begins later than this.
    """

    path: Path
    stage: str
    machine: Machine
    limit_s: float
    only: str = ""
    rows: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.started)

    def __post_init__(self) -> None:
        """With `only`, rows of an earlier call by the same code on such a machine stay."""
        if self.only and self.path.is_file():
            before = json.loads(self.path.read_text())
            facts = self.machine.facts()
            if all(before["machine"].get(name) == facts[name] for name in SAME):
                self.rows = before["rows"]

    def row(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> None:
        """Measure one row, whatever becomes of it, and say it in one line."""
        if self.only and self.only not in name:
            return
        begun = time.monotonic()
        if self.left_s <= 0:
            found: dict[str, Any] = {"missing": "no time was left in this call"}
        else:
            found = self.outcome(measure)
        found["seconds"] = round(time.monotonic() - begun, 2)
        self.rows[name] = found
        self.save()
        print(f"{self.stage}, {name}: {json.dumps(found)[:200]}", flush=True)

    def outcome(self, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        try:
            return {"value": dict(measure())}
        except Missing as why:
            return {"missing": str(why)}
        except Exception as error:  # of whatever is measured: the next row may do better
            traceback.print_exc(limit=-4)
            return {"error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "stage": self.stage,
            "date": self.date,
            "seconds": round(time.monotonic() - self.started, 1),
            "machine": self.machine.facts(),
            "rows": self.rows,
        }
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        beside.replace(self.path)
