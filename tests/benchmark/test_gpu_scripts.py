"""The scripts of the kit for a GPU, with a stand-in for Python that notes what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu.record import AGAIN
from benchmarks.gpu.stages import STAGES

KIT = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with the kit alone."""
    top = tmp_path / "tree"
    shutil.copytree(KIT, top / "benchmarks" / "gpu", ignore=shutil.ignore_patterns("wheels"))
    return top


def run_day(folder: Path, tree: Path, python: str, **environment: str) -> list[str]:
    """Stages that `day.sh` asks for, of a stand-in for Python that notes its arguments."""
    words = {"PYTHON": python, "SCRATCH": str(folder / "scratch"), "COMMIT": "abc1234"}
    asked = folder / "asked"
    asked.unlink(missing_ok=True)
    subprocess.run(
        ["bash", "benchmarks/gpu/day.sh", str(folder / "out")],
        cwd=tree,
        env={**os.environ, **words, "ASKED": str(asked), **environment},
        check=True,
        capture_output=True,
    )
    return asked.read_text().split() if asked.exists() else []


def test_a_day_asks_for_every_stage_and_packs_what_it_found(tmp_path: Path, tree: Path):
    """Catches a stage that no call runs, one that is run again though it is whole, and a lost file.

    The device's machine returns eight files at most, so there is one.
    """
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        'echo "$3" >> "$ASKED"\n'
        'echo "\\"complete\\": true, \\"commit\\": \\"$COMMIT\\"" > "$5/$3.json"\n'
    )
    python.chmod(0o755)
    asked = run_day(tmp_path, tree, str(python))
    assert asked == list(STAGES)
    with tarfile.open(tmp_path / "out" / "results.tgz") as packed:
        names = {Path(name).name for name in packed.getnames()}
    assert {f"{stage}.json" for stage in STAGES} <= names
    assert run_day(tmp_path, tree, str(python)) == []
    assert run_day(tmp_path, tree, str(python), COMMIT="def5678", STAGES="probe") == ["probe"]


def test_a_stage_goes_on_in_a_new_process_after_a_fault_of_the_device(tmp_path: Path, tree: Path):
    """Catches rows that no process measures after the first illegal access, and an endless loop."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\necho "$@" >> "{tmp_path}/asked"\nexit {AGAIN}\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "SCRATCH": str(tmp_path / "scratch")}
    command = ["bash", "benchmarks/gpu/stage.sh", "probe", str(tmp_path / "out")]
    subprocess.run(command, cwd=tree, env=environment, check=False, capture_output=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert ["--go-on" in line for line in asked] == [False, True, True]


def test_a_group_that_cannot_be_installed_costs_no_other(tmp_path: Path, tree: Path):
    """Catches wheels of another Python that end a day, and a group that is installed in part."""
    wheels = tree / "benchmarks" / "gpu" / "wheels"
    wheels.mkdir()
    for group, parts in {"base": 1, "bad": 1, "part": 2}.items():
        (tmp_path / f"{group}.whl").touch()
        with tarfile.open(wheels / f"{group}.00", "w") as packed:
            packed.add(tmp_path / f"{group}.whl", f"{group}.whl")
        (wheels / f"{group}.parts").write_text(f"{parts}\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\necho "$@" >> "{tmp_path}/asked"\n[[ "$*" != *bad.whl* ]]\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "SCRATCH": str(tmp_path / "scratch")}
    done = subprocess.run(
        ["bash", "benchmarks/gpu/install.sh"],
        cwd=tree,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "base: installed" in done.stdout
    assert "part: 1 of 2 parts are here" in done.stdout
    assert "bad: not installed" in done.stderr
    assert {path.name for path in (tmp_path / "scratch").glob("*.installed")} == {"base.installed"}
    assert "part.whl" not in (tmp_path / "asked").read_text()
