"""The package as pip installs it: the wheel in an environment of its own, far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from selfforcing_dfd.common import shipped

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([*pip, "wheel", *options, str(ROOT)], check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel. Its dependencies are those of the environment of the tests.

    A line in a .pth file adds that environment's packages behind the wheel's, and not what .pth
    files there name: the checkout, where it is installed as editable, stays out of sight.
    """
    home = tmp_path_factory.mktemp("elsewhere") / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "--quiet", "install", "--no-deps", str(wheel)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def run(home: Path, *command: str) -> str:
    """What a program of the environment prints, run in an empty folder."""
    folder = home.parent / "work"
    folder.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = [str(home / "bin" / command[0]), *command[1:]]
    done = subprocess.run(
        program, cwd=folder, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_shipped_files_are_in_the_wheel(wheel: Path) -> None:
    """Catches a config, a tiny model, a page of the web server or the type marker left behind."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("assets", "configs"):
        files = [path for path in shipped(folder).rglob("*") if path.is_file()]
        packed = {f"selfforcing_dfd/presets/{path.relative_to(ROOT)}" for path in files}
        assert files and packed <= names
    package = ROOT / "selfforcing_dfd"
    sources = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    assert not any(name.startswith(("tests/", "inference/", "train")) for name in names)


def test_the_package_is_the_installed_one(home: Path) -> None:
    """Catches a test of the checkout under the name of a test of the wheel."""
    where = run(home, "python", "-c", "import selfforcing_dfd as s; print(s.__file__)")
    assert Path(where.strip()).is_relative_to(home)


def test_one_chunk_is_streamed(home: Path) -> None:
    """Catches an installed package that cannot find its models or stream settings."""
    run(home, "selfforcing-dfd", "stream", "--chunks", "1", "--out", "one.mp4")
    assert (home.parent / "work" / "one.mp4").stat().st_size > 1000


def test_training_is_planned(home: Path) -> None:
    """Catches an installed package that cannot find its configs, or the weights that they name."""
    plan = run(home, "selfforcing-dfd", "train", "--config", "dfd_ar.yaml", "--dry-run")
    assert "MISSING" not in plan
    assert "stage dfd" in plan


def test_the_public_names_stream(home: Path) -> None:
    """Catches a public name without a home, and a Python interface that needs the checkout."""
    program = (
        "from selfforcing_dfd import StreamSession, load_stream_model\n"
        "chunk = StreamSession(load_stream_model(), 'a disc moves').next_chunk()\n"
        "print(tuple(chunk.frames.shape))"
    )
    assert "(9, 64, 64, 3)" in run(home, "python", "-c", program)
