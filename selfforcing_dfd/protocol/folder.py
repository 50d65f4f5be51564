"""Where a protocol keeps what it makes, and what its files say of how they were made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import UserError, atomic_file, sha256_of
from selfforcing_dfd.protocol.plan import Cell

HASHES = "hashes.json"  # of weights, so that large files are read once
EVALUATION = "evaluation.json"
REPORT = "report.html"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of a protocol. A video is there if its file is; so is everything else."""

    root: Path

    def video(self, cell: Cell) -> Path:
        return self.root / "videos" / cell.method / f"{cell.name}.mp4"

    def prompt(self, cell: Cell) -> Path:
        """Its text, where `evaluate` looks for it."""
        return self.video(cell).with_suffix(".txt")

    def record(self, cell: Cell) -> Path:
        """What made the video."""
        return self.video(cell).with_suffix(".json")

    def numbers(self, cell: Cell) -> Path:
        return self.root / "numbers" / cell.method / f"{cell.name}.json"

    def features(self, cell: Cell, encoder: str) -> Path:
        """encoder: as the plan names it; its file name keeps letters and digits."""
        plain = "".join(letter if letter.isalnum() else "_" for letter in encoder)
        return self.root / "features" / plain / cell.method / f"{cell.name}.safetensors"

    def vbench(self, method: str) -> Path:
        """Where VBench's tool is run for a method's videos."""
        return self.root / "vbench" / method

    def lock(self, cell: Cell, what: str) -> Path:
        return self.root / "locks" / what / cell.method / cell.name

    def hash_of(self, path: Path) -> str:
        """SHA-256 of a file, or of all weights in a folder; kept until size or time changes."""
        files = [path] if path.is_file() else weights_in(path)
        known = read_json(self.root / HASHES) if (self.root / HASHES).exists() else {}
        found = {}
        for file in files:
            stamp = [file.stat().st_size, file.stat().st_mtime_ns]
            entry = known.get(str(file.resolve()))
            if entry is None or entry["stamp"] != stamp:
                entry = {"stamp": stamp, "sha256": sha256_of(file)}
            found[str(file.resolve())] = entry
        if any(known.get(name) != entry for name, entry in found.items()):
            write_json(self.root / HASHES, known | found)
        hashes = [entry["sha256"] for entry in found.values()]
        return hashes[0] if path.is_file() else hashlib.sha256("".join(hashes).encode()).hexdigest()


def weights_in(folder: Path) -> list[Path]:
    """Files of weights, of the transformer where the folder is that of a whole pipeline.

    All files of a folder of another kind, such as a training checkpoint.
    """
    inside = folder / "transformer"
    where = inside if inside.is_dir() else folder
    found = sorted(file for file in where.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    return found or sorted(file for file in where.rglob("*") if file.is_file())


def refuse_other(path: Path, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError if what a file says of its making is not what would be done now."""
    for name in sorted({*made, *now}):
        if made.get(name) != now.get(name):
            raise UserError(
                f"{path} was made with {name} {made.get(name)!r}, the plan now says "
                f"{now.get(name)!r}; restore that, give the plan another `out`, or delete the "
                "method's videos and numbers to make them again"
            )


def tidy(path: Path) -> None:
    """Remove what a killed process left of a result, its record included.

    Only for the holder of its lock.
    """
    for leftover in path.parent.glob(f".tmp-*-{path.stem}.*"):
        leftover.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
