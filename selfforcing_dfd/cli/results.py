"""Files of a benchmark's result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfforcing_dfd.common import UserError


def check_result_file(path: Path) -> None:
    """Raise UserError, before minutes of measuring, for a result that cannot be written there."""
    if path.suffix == ".html":
        raise UserError("--out names the JSON; the page is written beside it as .html")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it, such as {path / 'result.json'}")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} does not exist; make that folder, or name another one")


def write_result(path: Path, line: str, timed_result: dict[str, Any] | None) -> list[Path]:
    """Write the JSON, and of a timed result the page; returns the files.

    That comes before anything is printed, since the reader of a pipe may have left.
    """
    path.write_text(line + "\n")
    if timed_result is None:
        return [path]
    from selfforcing_dfd.benchmark.page import render

    page = path.with_suffix(".html")
    page.write_text(render(timed_result))
    return [path, page]
