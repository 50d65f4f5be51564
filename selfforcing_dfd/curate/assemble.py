"""Which clips make up a training set, and the record of why: picks, gates, quota."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import UserError, sealed
from selfforcing_dfd.config import MILLION, ranged
from selfforcing_dfd.curate.choose import Chosen, Limits, choose, rows_like
from selfforcing_dfd.curate.folder import PICKS, Clusters, Embedded, read_clusters
from selfforcing_dfd.curate.leakage import Gate
from selfforcing_dfd.curate.pick import read_sheets
from selfforcing_dfd.curate.picks import Sheet, read_picks
from selfforcing_dfd.curate.progress import names_hash
from selfforcing_dfd.data.sources.listing import Clip

RECORD = "curation.json"


@dataclass(frozen=True, slots=True)
class PackSettings:
    """quota: clips of the set; 0 is the picks alone. duplicate: cosine above which a clip is passed
    over, as one like it was taken. near: share of word sequences from which a caption leaks an
    evaluation prompt. held_out: cosine with a held-out clip from which a clip stays out.
    """

    quota: int = ranged(0, 0, MILLION)
    duplicate: float = ranged(0.98, -1, 1)
    near: float = ranged(0.6, 0, 1, above=True)
    held_out: float = ranged(0.95, -1, 1)


@dataclass(frozen=True, slots=True)
class Excluded:
    """A clip that may not be in the set. why: captions, held out, or the leaked prompt."""

    row: int
    clip: str
    why: str


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """chosen: in the order of the source, so that long files are decoded once. dropped: picks that
    were excluded. record: for a file.
    """

    chosen: Sequence[Chosen]
    excluded: Sequence[Excluded]
    dropped: Sequence[Excluded]
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [one.clip for one in self.chosen]

    @property
    def num_picked(self) -> int:
        return sum(one.picked for one in self.chosen)

    @property
    def reasons(self) -> Counter[str]:
        """How many clips were excluded, by the first word or words of the reason."""
        return Counter(one.why.partition(":")[0] for one in self.excluded)

    def write(self, folder: Path) -> None:
        """The record, beside shards."""
        text = json.dumps(self.record, indent=1, ensure_ascii=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def assemble(
    embedded: Embedded,
    clips: Sequence[Clip],
    settings: PackSettings,
    prompts: Sequence[str] = (),
    held_out: Sequence[str] = (),
) -> TrainingSet:
    """The set of the picks in a curation folder.

    clips: those of the folder, in its order, with the captions that will be packed. prompts: on
    which the model will be evaluated. held_out: names of clips that are kept for evaluation.
    UserError for parts that do not belong together, for held-out clips that are not there, and for
    a quota that cannot be met.
    """
    clusters = read_clusters(embedded)
    sheets = read_sheets(embedded.folder, clusters)
    picks = read_picks(embedded.folder / PICKS, sheets)
    kept_out = held_out_rows(embedded, held_out, settings.held_out)
    excluded = excluded_clips(clips, kept_out, Gate(prompts, settings.near))
    rows = {one.row: one for one in excluded}
    limits = Limits(settings.quota, settings.duplicate, rows.keys())
    chosen = sorted(choose(embedded, clusters, sheets, picks, limits), key=lambda one: one.row)
    if not chosen:
        raise UserError("no pick may be in the set: each is held out, leaks or has no caption")
    dropped = [rows[row] for row in picked_rows(sheets, picks) if row in rows]
    record = {
        "embedded": dict(embedded.about),
        "clusters": of_clusters(clusters),
        "picks": picks,
        "settings": asdict(settings),
        "prompts": listed(prompts),
        "held_out": listed(held_out),
        "dropped_picks": list(map(asdict, dropped)),
        "chosen": list(map(asdict, chosen)),
    }
    return TrainingSet(chosen, excluded, dropped, sealed(json.loads(json.dumps(record))))


def of_clusters(clusters: Clusters) -> dict[str, Any]:
    """What identifies clusters."""
    return {name: clusters.about[name] for name in ("clusters", "seed", "sha256")}


def listed(texts: Sequence[str]) -> dict[str, Any]:
    """What identifies a list of texts."""
    return {"number": len(texts), "sha256": names_hash(texts)}


def excluded_clips(clips: Sequence[Clip], kept_out: set[int], gate: Gate) -> list[Excluded]:
    """All clips that may not be in the set, in order."""
    reasons = [reason_against(row, clip, kept_out, gate) for row, clip in enumerate(clips)]
    pairs = enumerate(zip(clips, reasons, strict=True))
    return [Excluded(row, clip.name, why) for row, (clip, why) in pairs if why]


def reason_against(row: int, clip: Clip, kept_out: set[int], gate: Gate) -> str:
    """Why a clip may not be in the set; empty if it may."""
    if row in kept_out:
        return "held out"
    if clip.problem:
        return f"problem: {clip.problem}"
    for caption in clip.captions.values() or [clip.caption]:
        leak = gate.leak(caption)
        if leak:
            return f"{leak.how} to an evaluation prompt: {leak.prompt}"
    return ""


def held_out_rows(embedded: Embedded, names: Sequence[str], least: float) -> set[int]:
    """Rows of held-out clips, of other windows of their files, and of clips that look like them."""
    files = [file_of(name) for name in embedded.names]
    wanted = {file_of(name) for name in names}
    rows = [row for row, file in enumerate(files) if file in wanted]
    missing = sorted(set(names) - {*embedded.names, *files})
    if missing:
        raise UserError(
            f"{missing[0]} is held out and is none of the clips; want names as in clips.jsonl"
        )
    return rows_like(embedded, rows, least)


def file_of(name: str) -> str:
    """`film.mp4` for `film.mp4#81` and for itself."""
    file, _, first = name.rpartition("#")
    return file if file and first.isdecimal() else name


def picked_rows(sheets: Sequence[Sheet], picks: Mapping[int, Sequence[int]]) -> list[int]:
    """Of all picks, in order."""
    return [
        sheet.candidates[number].row for sheet in sheets for number in picks.get(sheet.cluster, ())
    ]
