"""Lists that people write by hand: .csv, .jsonl and .txt, in UTF-8."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from selfforcing_dfd.data.format import PackError

TABLES = (".csv", ".jsonl")


def read_table(path: Path, *wanted: str) -> list[dict[str, str]]:
    """Rows of a .csv file with a header, or of a .jsonl file of objects.

    PackError: no rows, or one of the wanted columns is missing.
    """
    rows: list[dict[str, str]]
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text_of(path), newline=""), strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise PackError(f"{path}: row {reader.line_num} is no CSV ({error})") from error
    else:
        rows = [
            object_of(path, number, line)
            for number, line in enumerate(lines_of(path), 1)
            if line.strip()
        ]
    if not rows:
        raise PackError(
            f"{path}: no rows; want a column or key {' and '.join(wanted)} and a row for each clip"
        )
    for number, row in enumerate(rows, 1):
        missing = [name for name in wanted if row.get(name) is None]
        if missing:
            found = ", ".join(str(name) for name in row)
            raise PackError(f"{path}: row {number} has no {' and '.join(missing)}; it has {found}")
    return rows


def object_of(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PackError(f"{path}: line {number} is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise PackError(
            f"{path}: line {number} is {line[:40]}, "
            'want an object such as {"video": ..., "caption": ...}'
        )
    return {name: value for name, value in row.items() if isinstance(value, str)}


def lines_of(path: Path) -> list[str]:
    """Lines without their ends. Only line feeds end one: captions may hold other separators."""
    lines = [line.removesuffix("\r") for line in text_of(path).split("\n")]
    return lines if lines[-1] else lines[:-1]


def text_of(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise PackError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except FileNotFoundError as error:
        raise PackError(f"{path}: no such file") from error
