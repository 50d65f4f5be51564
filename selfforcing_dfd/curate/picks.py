"""`picks.csv`: a line for each cluster, in which a person writes the numbers of candidates."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfforcing_dfd.common import UserError, atomic_file
from selfforcing_dfd.curate.candidates import Candidate

COLUMNS = ("cluster", "size", "mean_distance", "unreadable", "dark", "frozen", "picks", "notes")
NEEDED = ("cluster", "size", "picks")


@dataclass(frozen=True, slots=True)
class Sheet:
    """A cluster with its candidates, as candidates.jsonl has it."""

    cluster: int
    size: int
    mean_distance: float
    candidates: tuple[Candidate, ...]

    def number_of(self, fault: str) -> int:
        return sum(one.fault == fault for one in self.candidates)


def write_picks(path: Path, sheets: Sequence[Sheet], picks: Mapping[int, Sequence[int]]) -> None:
    """A line for each cluster; picks: by cluster, empty where there are none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sheet in sheets:
        faults = [sheet.number_of(fault) for fault in ("unreadable", "dark", "frozen")]
        numbers = ",".join(map(str, picks.get(sheet.cluster, ())))
        distance = f"{sheet.mean_distance:.4f}"
        writer.writerow([sheet.cluster, sheet.size, distance, *faults, numbers, ""])
    with atomic_file(path) as file:
        file.write_text(text.getvalue(), encoding="utf-8")


def read_picks(path: Path, sheets: Sequence[Sheet]) -> dict[int, list[int]]:
    """Numbers of candidates by cluster; a cluster without picks is dropped.

    UserError for anything but what `write_picks` wrote with numbers filled in; it names the line.
    """
    by_cluster = {sheet.cluster: sheet for sheet in sheets}
    picks: dict[int, list[int]] = {}
    seen: dict[int, int] = {}
    for line, row in lines_of(path):
        where = f"{path}: line {line}"
        cluster = whole_number(where, "cluster", row["cluster"])
        if cluster not in by_cluster:
            raise UserError(f"{where}: there is no cluster {cluster}; want 0 to {len(sheets) - 1}")
        if cluster in seen:
            raise UserError(f"{where}: cluster {cluster} has a line already, {seen[cluster]}")
        seen[cluster] = line
        sheet = by_cluster[cluster]
        if whole_number(where, "size", row["size"]) != sheet.size:
            raise UserError(
                f"{where}: cluster {cluster} has {sheet.size} clips and not {row['size']}; these "
                "picks belong to other clusters: make sheets and picks again"
            )
        if numbers := numbers_in(where, row["picks"], sheet):
            picks[cluster] = numbers
    missing = sorted(set(by_cluster) - set(seen))
    if missing:
        raise UserError(
            f"{path}: cluster {missing[0]} has no line; to drop a cluster leave its picks empty"
        )
    if not picks:
        raise UserError(
            f"{path}: nothing is picked; write numbers of candidates into `picks`, such as 0,3,17"
        )
    return picks


def lines_of(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Number and columns of every line after the first. UserError for a file of another form."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; selfforcing-dfd curate pick writes it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        check_header(path, header)
        found = []
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}: line {reader.line_num}: got {len(cells)} columns, want {len(header)};"
                    ' put picks in quotes, such as "0,3,17"'
                )
            found.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is no CSV ({error})") from error
    return found


def check_header(path: Path, header: Sequence[str]) -> None:
    missing = [name for name in NEEDED if name not in header]
    if missing:
        raise UserError(
            f"{path}: line 1: got the columns {', '.join(header) or 'of an empty file'}; want "
            f"{', '.join(COLUMNS)}, separated by commas"
        )
    if len(set(header)) < len(header):
        raise UserError(f"{path}: line 1 names a column twice; want {', '.join(COLUMNS)}")


def numbers_in(where: str, text: str, sheet: Sheet) -> list[int]:
    """The numbers in a cell of picks, which ascend."""
    if not text.strip():
        return []
    numbers = [whole_number(where, "picks", part) for part in text.split(",")]
    last = len(sheet.candidates) - 1
    for before, number in zip([-1, *numbers], numbers, strict=False):
        if number > last:
            raise UserError(f"{where}: picks has {number}; cluster {sheet.cluster} has 0 to {last}")
        if number == before:
            raise UserError(f"{where}: picks has {number} twice; name each candidate once")
        if number < before:
            raise UserError(
                f"{where}: picks has {number} after {before}; want ascending numbers such as 0,3,17"
            )
        candidate = sheet.candidates[number]
        if candidate.problem:
            raise UserError(
                f"{where}: picks has {number}, which cannot be read ({candidate.problem})"
            )
    return numbers


def whole_number(where: str, column: str, text: str) -> int:
    cleaned = text.strip()
    if not (cleaned.isascii() and cleaned.isdecimal()):
        example = "numbers such as 0,3,17" if column == "picks" else "a whole number"
        raise UserError(f"{where}: {column} has {text!r}, want {example}")
    return int(cleaned)
