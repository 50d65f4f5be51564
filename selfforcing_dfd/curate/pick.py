"""A contact sheet for each cluster and a table to write picks into, or picks by a rule."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfforcing_dfd.common import UserError, atomic_file, is_as_sealed, sealed
from selfforcing_dfd.config import ranged
from selfforcing_dfd.curate.candidates import Candidate, Shown, even_ranks, look_at, pick_by_rule
from selfforcing_dfd.curate.folder import (
    CANDIDATES,
    PICKS,
    SHEETS,
    Clusters,
    Embedded,
    again,
    missing,
)
from selfforcing_dfd.curate.intake import FrameReader, Looks
from selfforcing_dfd.curate.picks import Sheet, write_picks
from selfforcing_dfd.curate.progress import ProgressFile
from selfforcing_dfd.curate.sheets import LONGEST, write_sheet
from selfforcing_dfd.data.sources.listing import Clip
from selfforcing_dfd.processes.engine import HERE, Engine


@dataclass(frozen=True, slots=True)
class PickSettings:
    """candidates: of each cluster. pictures: of each candidate. picks: by rule, of each cluster; 0
    leaves them to a person. duplicate: cosine above which two clips are the same to the rule.
    """

    candidates: int = ranged(40, 1, 400)
    pictures: int = ranged(5, 1, 20)
    picks: int = ranged(0, 0, 400)
    duplicate: float = ranged(0.98, -1, 1)


@dataclass(frozen=True, slots=True)
class Task:
    """A cluster that is to be shown: its candidates, not looked at yet, and their clips."""

    cluster: int
    size: int
    mean_distance: float
    candidates: tuple[Candidate, ...]
    clips: tuple[Clip, ...]


@dataclass(frozen=True, slots=True)
class SheetMaker:
    """Looks at the candidates of a cluster and draws them. Can be sent to another process."""

    folder: Path
    looks: Looks
    pictures: int

    def __call__(self, task: Task) -> Sheet:
        shown = self.looked_at(task)
        title = (
            f"cluster {task.cluster}: {task.size} clips, mean distance {task.mean_distance:.3f}; "
            "the nearest to the centre first"
        )
        write_sheet(sheet_path(self.folder, task.cluster), title, shown, self.pictures)
        looked_at = tuple(one.candidate for one in shown)
        return Sheet(task.cluster, task.size, task.mean_distance, looked_at)

    def looked_at(self, task: Task) -> list[Shown]:
        """The candidates in order. Windows of one file are read one after the other."""
        reader = FrameReader(self.looks, range(self.looks.num_frames))
        pairs = list(zip(task.clips, task.candidates, strict=True))
        pairs.sort(key=lambda pair: (pair[0].path, pair[0].first or 0))
        shown = [look_at(reader, clip, one, self.pictures) for clip, one in pairs]
        return sorted(shown, key=lambda one: one.candidate.number)


def sheet_path(folder: Path, cluster: int) -> Path:
    return folder / SHEETS / f"cluster_{cluster:04d}.jpg"


def show_clusters(
    embedded: Embedded,
    clusters: Clusters,
    settings: PickSettings,
    *,
    engine: Engine = HERE,
    overwrite: bool = False,
) -> list[Sheet]:
    """Write sheets, candidates.jsonl and picks.csv into the curation folder.

    A killed call goes on with the next cluster. Raises UserError where there are picks already:
    they may be a person's work.
    """
    folder = embedded.folder
    partial = folder / f"{CANDIDATES}.partial"
    if overwrite:
        for path in (folder / CANDIDATES, folder / PICKS, partial):
            path.unlink(missing_ok=True)
    elif (folder / PICKS).exists():
        raise UserError(
            f"{folder / PICKS} exists, and may hold somebody's picks; replace it with --overwrite"
        )
    progress = ProgressFile(partial, job_of(clusters, settings))
    tasks = list(tasks_of(embedded, clusters, settings))
    left = tasks[len(progress.done) :]
    looks = Looks(embedded.intake.num_frames, embedded.intake.fps, LONGEST)
    make = SheetMaker(folder, looks, settings.pictures)
    with tqdm(total=len(tasks), initial=len(tasks) - len(left), desc="sheets", disable=None) as bar:
        for sheet in engine.each_in_order(make, left):
            progress.add(asdict(sheet))
            bar.update()
    sheets = [sheet_of(line) for line in progress.done]
    write_candidates(folder, clusters, progress.done)
    write_picks(folder / PICKS, sheets, picks_by_rule(embedded, sheets, settings))
    partial.unlink()
    return sheets


def job_of(clusters: Clusters, settings: PickSettings) -> dict[str, Any]:
    """What decides the sheets; picks by rule are made of them afterwards."""
    shown = {"candidates": settings.candidates, "pictures": settings.pictures}
    return {"clusters": clusters.seal, **shown}


def tasks_of(embedded: Embedded, clusters: Clusters, settings: PickSettings) -> Iterator[Task]:
    """Every cluster that has clips, in order."""
    clips = embedded.clips()
    for cluster, size in enumerate(clusters.about["sizes"]):
        if not size:
            continue
        members = clusters.members(cluster)
        rows = [int(members[rank]) for rank in even_ranks(size, settings.candidates)]
        candidates = tuple(
            Candidate(number, row, embedded.names[row], round(float(clusters.distances[row]), 6))
            for number, row in enumerate(rows)
        )
        mean = round(float(clusters.distances[members].mean(dtype="float64")), 6)
        yield Task(cluster, size, mean, candidates, tuple(clips[row] for row in rows))


def picks_by_rule(
    embedded: Embedded, sheets: Sequence[Sheet], settings: PickSettings
) -> dict[int, list[int]]:
    """By cluster; none where no picks are asked for."""
    if not settings.picks:
        return {}
    picks = {}
    for sheet in sheets:
        vectors = embedded.features[[one.row for one in sheet.candidates]]
        picks[sheet.cluster] = pick_by_rule(
            sheet.candidates, vectors, settings.picks, settings.duplicate
        )
    return picks


def write_candidates(folder: Path, clusters: Clusters, lines: Sequence[dict[str, Any]]) -> None:
    """A line that says to which clusters they belong, and a line for each cluster."""
    head = sealed({"of": clusters.seal, "clusters": len(lines)})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *lines))
    with atomic_file(folder / CANDIDATES) as file:
        file.write_text(text, encoding="utf-8")


def sheet_of(line: dict[str, Any]) -> Sheet:
    candidates = tuple(Candidate(**fields) for fields in line["candidates"])
    return Sheet(line["cluster"], line["size"], line["mean_distance"], candidates)


def read_sheets(folder: Path, clusters: Clusters) -> list[Sheet]:
    """UserError for a folder without sheets, or with those of other clusters."""
    path = folder / CANDIDATES
    if not path.is_file():
        raise UserError(missing(path))
    try:
        head, *lines = map(json.loads, path.read_text("utf-8").splitlines())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {again('pick')}") from error
    if not is_as_sealed(head) or head["clusters"] != len(lines):
        raise UserError(f"{path} is not as it was written; {again('pick')}")
    if head["of"] != clusters.seal:
        raise UserError(f"{path} belongs to other clusters; {again('pick')}")
    return [sheet_of(line) for line in lines]
