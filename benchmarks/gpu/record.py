"""The rows of one stage, in a JSON file that is written after each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
RESULTS = Path(__file__).parent / "results"
NO_TIME = "no time was left"
"""How the reason of a row begins that another call may still measure."""
LONG_S = 240.0
"""A row that did not end in so many seconds has a fault of its own: the next call leaves it out."""


AGAIN = 3
"""Exit status of a stage that another process can go on with; `stage.sh` starts one."""


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

    def responds(self) -> bool:
        """Whether this process can still use its device: some faults on a GPU last until it ends.

        What then follows would fail for that reason alone.
        """
        if not self.on_gpu:
            return True
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

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

    A stage that is stopped loses the running row alone, which says so. limit_s: no row begins
    later. only: rows whose name has it are measured, again if they were. go_on: rows that an
    earlier call measured, or that failed in it, are left out.
    """

    path: Path
    stage: str
    machine: Machine
    limit_s: float
    only: str = ""
    go_on: bool = False
    rows: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    facts: dict[str, Any] = field(init=False)
    complete: bool = field(init=False, default=False)

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.started)

    def __post_init__(self) -> None:
        """Rows of an earlier call by the same code on such a machine stay, if this one adds."""
        self.facts = self.machine.facts()
        before = earlier(self.path) if self.only or self.go_on else None
        if before and all(before["machine"].get(name) == self.facts[name] for name in SAME):
            self.rows = before["rows"]

    def wants(self, name: str) -> bool:
        """Whether a row is to be measured in this call."""
        if self.only:
            return self.only in name
        return not (self.go_on and is_settled(self.rows.get(name)))

    def row(self, name: str, measure: Callable[[], Mapping[str, Any]], needs_s: float = 0) -> None:
        """Measure one row, whatever becomes of it, and say it in one line.

        needs_s: with less time left it does not begin.
        """
        if not self.wants(name):
            return
        begun = time.monotonic()
        if self.left_s <= needs_s:
            found: dict[str, Any] = {"missing": f"{NO_TIME} in this call"}
        else:
            self.rows[name] = unfinished(self.left_s)  # if all of the stage is stopped
            self.save()
            found = self.outcome(measure)
        found["seconds"] = round(time.monotonic() - begun, 2)
        self.rows[name] = found
        self.save()
        print(f"{self.stage}, {name}: {json.dumps(found)[:200]}", flush=True)
        if "error" in found and not self.machine.responds():
            print("the device answers nothing more in this process", flush=True)
            sys.exit(AGAIN)

    def outcome(self, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        given_s = self.left_s
        try:
            found = {"value": dict(measure())}
            json.dumps(found, allow_nan=False)  # a NaN is a fault of this row, not of the file
            return found
        except Missing as why:
            return {"missing": str(why)}
        except subprocess.TimeoutExpired as stopped:
            return {**unfinished(given_s), "until then": last_words(stopped)}
        except Exception as error:  # of whatever is measured: the next row may do better
            traceback.print_exc(limit=-4)
            return {"error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]}

    def end(self) -> None:
        """Say whether another call has anything left to measure."""
        self.complete = not self.only and all(map(is_settled, self.rows.values()))
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "stage": self.stage,
            "date": self.date,
            "seconds": round(time.monotonic() - self.started, 1),
            "machine": self.facts,
            "complete": self.complete,
            "rows": self.rows,
        }
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        beside.replace(self.path)


def earlier(path: Path) -> dict[str, Any] | None:
    """A stage's results of an earlier call: where this one writes, or among those brought along."""
    for place in (path, RESULTS / path.name):
        if place.is_file():
            found: dict[str, Any] = json.loads(place.read_text())
            return found
    return None


def unfinished(given_s: float) -> dict[str, Any]:
    """What a row says that did not end in the time it had."""
    if given_s < LONG_S:
        return {"missing": f"{NO_TIME}: it did not end in the {given_s:.0f} s of its call"}
    return {"error": f"it did not end in {given_s:.0f} s"}


def last_words(stopped: subprocess.TimeoutExpired) -> str:
    """The end of what a process said before it was stopped."""
    said = (stopped.stdout, stopped.stderr)
    texts = [text.decode(errors="replace") if isinstance(text, bytes) else text for text in said]
    return "\n".join(text[-LONGEST_ERROR:] for text in texts if text)


def is_settled(row: dict[str, Any] | None) -> bool:
    """Whether measuring a row once more would give what it has."""
    return row is not None and not str(row.get("missing", "")).startswith(NO_TIME)
