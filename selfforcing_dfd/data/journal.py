"""The progress file of an unfinished shard folder, from which an interrupted run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import sync
from selfforcing_dfd.data.format import Entry, PackError, Shard

JOURNAL_NAME = "progress.jsonl"
NUM_NAMED = 5  # differences and clips that a message names


@dataclass(frozen=True, slots=True)
class Refusal:
    """A clip that was left out, and why. damaged: it cannot be decoded; else it does not fit."""

    file: str
    reason: str
    damaged: bool = False

    def to_fields(self) -> dict[str, Any]:
        fields = {"file": self.file, "reason": self.reason}
        return {**fields, "damaged": True} if self.damaged else fields


@dataclass(frozen=True, slots=True)
class Job:
    """All that decides the bytes of a shard folder, except the clips themselves.

    name: for messages. num_items: clips in the source. files: further files beside the shards, by
    name, the same in every run. may_be_empty: a folder without samples is no error.
    """

    name: str
    num_items: int
    latent_shape: tuple[int, ...]
    text_shape: tuple[int, ...]
    fingerprints: dict[str, str]
    about: dict[str, Any]
    shard_size: int
    files: Mapping[str, bytes] = field(default_factory=dict)
    may_be_empty: bool = False

    def header(self) -> dict[str, Any]:
        """What a resumed run must have in common with the interrupted one, as JSON gives it."""
        names = ("latent_shape", "text_shape", "fingerprints", "about", "shard_size")
        header = {name: getattr(self, name) for name in names}
        return dict(json.loads(json.dumps(header)))


class Journal:
    """One line with the job's header, then one line for each shard that is complete on disk.

    `next` is the first item that no complete shard has dealt with.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        """Start the journal of `folder`, or read it and remove unfinished files.

        Raises PackError if it belongs to another job or a shard has changed.
        """
        self.path = folder / JOURNAL_NAME
        self.shard_size = job.shard_size
        self.next = 0
        self.shards: list[Shard] = []
        self.samples: list[Entry] = []
        self.refused: list[Refusal] = []
        lines = self._complete_lines()
        if lines:
            self._check_header(lines[0], job)
        else:
            self.path.write_text(json.dumps(job.header()) + "\n")
        for line in lines[1:]:
            self._enter(line)
        complete = {JOURNAL_NAME, *(shard.name for shard in self.shards)}
        for path in folder.iterdir():
            if path.name not in complete:
                path.unlink()

    def add(
        self, shard: Shard, samples: list[Entry], refused: list[Refusal], next_item: int
    ) -> None:
        """Enter a shard whose file is on disk. next_item: the number after its last sample's."""
        line = {
            "shard": asdict(shard),
            "samples": [sample.to_fields() for sample in samples],
            "refused": [refusal.to_fields() for refusal in refused],
            "next": next_item,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        sync(self.path)
        self._enter(line)

    def _enter(self, line: dict[str, Any]) -> None:
        shard = Shard(**line["shard"])
        path = self.path.with_name(shard.name)
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise PackError(
                f"{path} has changed since it was written ({shard.bytes} bytes); "
                "start again with --overwrite"
            )
        self.shards.append(shard)
        self.samples += [Entry.from_fields(fields) for fields in line["samples"]]
        self.refused += [Refusal(**fields) for fields in line["refused"]]
        self.next = line["next"]

    def _check_header(self, header: dict[str, Any], job: Job) -> None:
        changes = differences(header, job.header())
        if changes:
            raise PackError(
                f"{self.path.parent} belongs to a run with other settings or clips: "
                f"{'; '.join(changes[:NUM_NAMED])}. "
                "Go on with the same ones, or start again with --overwrite in place of --resume"
            )

    def _complete_lines(self) -> list[dict[str, Any]]:
        """All lines; a last one without its end, as a killed process leaves it, is cut off."""
        if not self.path.is_file():
            return []
        text = self.path.read_bytes()
        os.truncate(self.path, text.rfind(b"\n") + 1)
        return [json.loads(line) for line in text.split(b"\n")[:-1]]


def num_complete_shards(folder: Path) -> int:
    """Shards that an interrupted run completed: the journal's whole lines after the first."""
    journal = folder / JOURNAL_NAME
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.is_file() else 0


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """`settings.fps was 16, is 24` for every value in which two trees differ."""
    found = []
    for name in {**before, **now}:
        old = before.get(name)
        new = now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{path}{name}.")
        elif old != new:
            found.append(f"{path}{name} was {old}, is {new}")
    return found
