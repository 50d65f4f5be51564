"""Where a run writes, and which student a finished run or comparison made."""

from __future__ import annotations

from pathlib import Path

from selfforcing_dfd.config import Config, require
from selfforcing_dfd.stages import arms_of, load_config

STUDENT_FILE = "student.safetensors"
FAKE_FILE = "fake.safetensors"
CONFIG_FILE = "config.yaml"


def run_folder(config: Config) -> Path:
    return Path(config.run.out) / config.run.name


def student_of(run: Path) -> tuple[Config, Path]:
    """Config and weights of a run's student; of a comparison, its last arm's.

    Raises ConfigError for a folder without a run.
    """
    settings = run / CONFIG_FILE
    known = sorted(path.parent.as_posix() for path in run.glob(f"*/{CONFIG_FILE}"))
    advice = (
        f"name one of its arms: {', '.join(known)}" if known else "name a finished run's folder"
    )
    require(settings.is_file(), f"{run} has no {CONFIG_FILE}; {advice}")
    config = load_config(str(settings))
    last = list(arms_of(config))[-1]
    folder = run / last.run.name.rpartition("/")[2] if config.arms else run
    return last, folder / STUDENT_FILE
