"""Where a run writes. What lies there is in `weights/runs.py`."""

from __future__ import annotations

from pathlib import Path

from selfforcing_dfd.config import Config

CHECKPOINTS = "checkpoints"  # in a run's folder


def run_folder(config: Config) -> Path:
    return Path(config.run.out) / config.run.name
