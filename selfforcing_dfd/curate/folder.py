"""What lies in a curation folder, and how its parts belong together.

| file | made by |
|---|---|
| `embed.json`, `features.npy`, `clips.jsonl` | `curate embed` |
| `clusters.json`, `clusters.safetensors` | `curate cluster` |
| `candidates.jsonl`, `sheets/`, `picks.csv` | `curate pick` |

Each step notes the hash of what it was made from, so parts of two runs are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from selfforcing_dfd.common import SEAL, UserError, atomic_file, is_as_sealed, sealed, sha256_of
from selfforcing_dfd.curate.intake import Intake, without_captions
from selfforcing_dfd.data.sources.listing import Clip, chosen_clips, list_clips

EMBED = "embed.json"
FEATURES = "features.npy"
CLIPS = "clips.jsonl"
CLUSTERS = "clusters.json"
ASSIGNMENT = "clusters.safetensors"
CANDIDATES = "candidates.jsonl"
SHEETS = "sheets"
PICKS = "picks.csv"

STEPS = {EMBED: "embed", CLUSTERS: "cluster", CANDIDATES: "pick"}


@dataclass(frozen=True, slots=True)
class Embedded:
    """What `curate embed` has made.

    about: content of embed.json. names: of all clips. problems: by name, of those without
    features. features: unit vectors [N, D] float32, zeros where there is a problem.
    """

    folder: Path
    about: Mapping[str, Any]
    names: Sequence[str]
    problems: Mapping[str, str]
    features: np.ndarray

    @property
    def seal(self) -> str:
        return str(self.about[SEAL])

    @property
    def usable(self) -> np.ndarray:
        """Rows of features that there are, in order."""
        rows = [row for row, name in enumerate(self.names) if name not in self.problems]
        return np.array(rows, dtype=np.int64)

    @property
    def intake(self) -> Intake:
        """The clips that were looked at."""
        fields = dict(self.about["intake"])
        fps = fields.pop("fps")
        source = self.folder / self.about["source"]
        return Intake(source.resolve(), fps=None if fps is None else Fraction(fps), **fields)

    def clips(self) -> list[Clip]:
        """All clips, in order. Windows are taken from their names, so no file is searched again."""
        intake = self.intake
        listed = map(without_captions, list_clips(intake.source, recursive=intake.recursive))
        return chosen_clips(list(listed), self.names)


@dataclass(frozen=True, slots=True)
class Clusters:
    """What `curate cluster` has made.

    about: content of clusters.json. labels: [N], -1 for clips without features. distances: [N], of
    each clip from its centre. centres: [k, D].
    """

    about: Mapping[str, Any]
    labels: np.ndarray
    distances: np.ndarray
    centres: np.ndarray

    @property
    def seal(self) -> str:
        return str(self.about[SEAL])

    def members(self, cluster: int) -> np.ndarray:
        """Rows of a cluster's clips, the nearest to the centre first."""
        rows = np.flatnonzero(self.labels == cluster)
        return rows[np.argsort(self.distances[rows], kind="stable")]


def write_json(path: Path, content: Mapping[str, Any]) -> str:
    """Write a file with its own hash in it; the hash."""
    entries = sealed(json.loads(json.dumps(content)))
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return str(entries[SEAL])


def read_json(path: Path) -> dict[str, Any]:
    """UserError for a file that is not there, or that is not as it was written."""
    step = STEPS[path.name]
    if not path.is_file():
        raise UserError(missing(path))
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {again(step)}") from error
    if not isinstance(content, dict) or not is_as_sealed(content):
        raise UserError(f"{path} is not as it was written; {again(step)}")
    return content


def missing(path: Path) -> str:
    """What to say of a file that an earlier step should have made."""
    step = STEPS[path.name]
    return f"{path.parent} has no {path.name}; run selfforcing-dfd curate {step} first"


def again(step: str) -> str:
    return f"run selfforcing-dfd curate {step} again with --overwrite"


def read_embedded(folder: Path) -> Embedded:
    """UserError for a folder without complete features."""
    about = read_json(folder / EMBED)
    lines = (folder / CLIPS).read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    features = np.load(folder / FEATURES, mmap_mode="r")
    if features.shape != (len(rows), about["dim"]):
        raise UserError(
            f"{folder / FEATURES} holds {list(features.shape)} numbers and {CLIPS} names "
            f"{len(rows)} clips of {about['dim']}; {again('embed')}"
        )
    problems = {row["video"]: row["problem"] for row in rows if "problem" in row}
    return Embedded(folder, about, [row["video"] for row in rows], problems, features)


def read_clusters(embedded: Embedded) -> Clusters:
    """UserError for a folder without clusters, or with those of other features."""
    folder = embedded.folder
    about = read_json(folder / CLUSTERS)
    if about["of"] != embedded.seal:
        raise UserError(f"{folder / CLUSTERS} belongs to other features; {again('cluster')}")
    path = folder / ASSIGNMENT
    if not path.is_file() or sha256_of(path) != about["sha256_of_assignment"]:
        raise UserError(f"{path} is gone or not as it was written; {again('cluster')}")
    stored = load_file(path)
    return Clusters(about, stored["labels"], stored["distances"], stored["centres"])
