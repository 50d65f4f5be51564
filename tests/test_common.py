"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfforcing_dfd import common
from selfforcing_dfd.common import atomic_file, atomic_folder, exchange, replace_folder


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "x").write_text(content)
    return path


def content(path: Path) -> str:
    return (path / "x").read_text()


def names(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


@pytest.fixture(params=["exchanged", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder: file systems without exchange are tested as well."""
    if request.param == "two renames":
        monkeypatch.setattr(common, "exchange", lambda one, other: False)
    return str(request.param)


def test_a_folder_is_replaced_without_leftovers(tmp_path: Path, way: str) -> None:
    """Catches a rename onto a folder that is not empty, and an old folder left beside the new."""
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "x").write_text(text)
            (partial / "deep").mkdir()
        assert content(tmp_path / "out") == text
    assert names(tmp_path) == ["out"]


def test_an_error_leaves_what_was_there(tmp_path: Path, way: str) -> None:
    """Catches a half-written folder or file that replaces a whole one."""
    folder(tmp_path / "out", "old")
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as path:
        path.write_text("half")
        raise RuntimeError
    assert content(tmp_path / "out") == (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file", "out"]


@pytest.mark.parametrize("old_name", ["out", ".old-out"])
def test_a_failed_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_name: str
) -> None:
    """Catches two renames of which the second fails: nothing would have the name.

    .old-out: a kill left the only copy there, which must not be deleted first.
    """
    monkeypatch.setattr(common, "exchange", lambda one, other: False)
    partial = folder(tmp_path / ".tmp-out", "new")
    out = tmp_path / "out"
    folder(tmp_path / old_name, "old")

    def rename(source: Path, target: Path) -> Path:
        if source == partial:
            raise OSError("Input/output error")
        os.rename(source, target)
        return target

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        replace_folder(partial, out)
    assert content(out) == "old"


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, way: str) -> None:
    """Catches a next run that deletes the only copy before it has another one."""
    folder(tmp_path / ".old-out", "old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out"):
        raise RuntimeError
    assert content(tmp_path / ".old-out") == "old"
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("new")
    assert content(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]


REPLACE_FOR_EVER = """
import sys
from pathlib import Path
from selfforcing_dfd.common import atomic_folder
for number in range(10**6):
    with atomic_folder(Path(sys.argv[1])) as partial:
        (partial / "x").write_text(str(number))
    print(number, flush=True)
"""


def test_the_name_is_never_free_while_a_folder_is_replaced(tmp_path: Path) -> None:
    """Catches the moment between two renames, in which a reader or a kill finds nothing."""
    one = folder(tmp_path / "one", "1")
    assert exchange(one, folder(tmp_path / "other", "2")), "this file system cannot exchange names"
    assert content(one) == "2"
    out = tmp_path / "out"
    command = [sys.executable, "-c", REPLACE_FOR_EVER, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        missing = 0
        rounds = 0
        # The last replacements before the kill are not printed: wait for more than are wanted.
        while int(content(out)) <= 40 and rounds < 100:  # a busy machine replaces slowly
            missing += sum(not out.is_dir() for _ in range(20_000))
            rounds += 1
        process.kill()
        replaced = len(process.stdout.readlines())
    assert replaced > 20, "too few replacements; the test proves nothing"
    assert missing == 0
    assert int(content(out)) >= replaced
