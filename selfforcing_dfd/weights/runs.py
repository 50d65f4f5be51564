"""The files in a run's folder, found without the trainer's code."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from selfforcing_dfd.weights.run_record import RunError, read_record, require_result
from selfforcing_dfd.weights.stored import WeightsError

logger = logging.getLogger(__name__)

STUDENT_FILE = "student.safetensors"
FAKE_FILE = "fake.safetensors"
STUDENT_ADAPTER_FILE = "student_adapter.safetensors"
FAKE_ADAPTER_FILE = "fake_adapter.safetensors"
CONFIG_FILE = "config.yaml"


def config_of(run: Path) -> Path:
    """The config in a run's folder.

    Raises WeightsError for a folder without a run, RunError for a file that was changed.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        known = sorted(found.parent.as_posix() for found in run.glob(f"*/{CONFIG_FILE}"))
        advice = "name the folder of a finished run"
        if known:
            advice = f"name one of its arms: {', '.join(known)}"
        raise WeightsError(f"{run} has no {CONFIG_FILE}; {advice}")
    record = read_record(run)
    if record is not None and record.config != path.read_text(encoding="utf-8"):
        raise RunError(
            f"{path} is not what the run was trained with; `selfforcing-dfd doctor {run} --mend` "
            "brings that back and keeps yours beside it"
        )
    return path


def read_settings(run: Path) -> Mapping[str, Any]:
    """The settings of a run as plain values. Raises WeightsError for a folder without a run."""
    path = config_of(run)
    settings = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(settings, dict):
        raise WeightsError(f"{path} holds no settings; name the folder of a finished run")
    return {str(name): value for name, value in settings.items()}


def student_of(run: Path) -> Path:
    """Weights of a run's student; of a comparison, those of its last arm, with a warning.

    Raises WeightsError for a folder without a run, and for one that is not finished; RunError for
    weights that are not what the run exported.
    """
    if (run / STUDENT_FILE).is_file():
        require_result(run, STUDENT_FILE)
        return run / STUDENT_FILE
    arms = list(read_settings(run).get("arms") or {})
    found = run / arms[-1] / STUDENT_FILE if arms else run / STUDENT_FILE
    if not found.is_file():
        raise WeightsError(f"{found} does not exist; train first, or go on with train.py --resume")
    if len(arms) > 1:
        logger.warning(
            "%s compares %s; %s is taken, name another one's folder for that one",
            run,
            ", ".join(arms),
            arms[-1],
        )
    require_result(found.parent, STUDENT_FILE)
    return found
