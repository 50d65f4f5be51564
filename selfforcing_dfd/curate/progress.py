"""The lines of a step that can be killed at any moment and goes on with the same command."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from selfforcing_dfd.common import UserError, sync
from selfforcing_dfd.data.journal import NUM_NAMED, differences

T = TypeVar("T")


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 of names in their order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    while batch := list(islice(items, size)):
        yield batch


class ProgressFile:
    """One line with what decides the result, then one line for each item that is done, in order.

    A last line without its end, as a killed process leaves it, is cut off and made again.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        """Start the file, or go on with it. UserError if it belongs to another job."""
        self.path = path
        self.done: list[dict[str, Any]] = []
        lines = self._whole_lines()
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(job) + "\n", encoding="utf-8")
            return
        changes = differences(lines[0], json.loads(json.dumps(job)))
        if changes:
            raise UserError(
                f"{path} was begun with other settings or clips: {'; '.join(changes[:NUM_NAMED])}. "
                "Go on with the same ones, or start again with --overwrite"
            )
        self.done = lines[1:]

    def add(self, line: Mapping[str, Any]) -> None:
        """Enter an item that is done; it is on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        sync(self.path)
        self.done.append(dict(line))

    def _whole_lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        text = self.path.read_bytes()
        os.truncate(self.path, text.rfind(b"\n") + 1)
        try:
            return [json.loads(line) for line in text.split(b"\n")[:-1]]
        except ValueError as error:
            raise UserError(
                f"{self.path} is damaged ({error}); start again with --overwrite"
            ) from error
