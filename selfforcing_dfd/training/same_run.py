"""Is a checkpoint of the run that would go on from it? Its settings against the present ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from selfforcing_dfd.training.compare import differences, listed
from selfforcing_dfd.training.state import leaves
from selfforcing_dfd.weights.checkpoint_files import CheckpointError, read_meta, settings_of


def check_config(path: Path | str, resolved: Mapping[str, Any], allowed: set[str]) -> None:
    """CheckpointError naming every setting that differs from the checkpoint's.

    allowed: dotted keys that may change on resume; the name of a section allows all of it.
    """
    before = _fixed(settings_of(read_meta(path)), allowed)
    lines = differences(before, _fixed(_as_yaml(resolved), allowed))
    if lines:
        raise CheckpointError(
            f"{path} was made with other settings:{listed(lines, len(lines))}\n"
            "To go on, restore these settings, or start a new run in another folder from exported "
            f"weights. May change on resume: {', '.join(sorted(allowed)) or 'nothing'}"
        )


def config_fingerprint(resolved: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(_as_yaml(resolved), sort_keys=True).encode()).hexdigest()


def _fixed(settings: Mapping[str, Any], allowed: set[str]) -> dict[str, Any]:
    """Settings by dotted key without those that may change."""
    return {key: leaf for key, leaf in leaves(settings).items() if not _is_in(key, allowed)}


def _is_in(key: str, allowed: set[str]) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in allowed)


def _as_yaml(resolved: Mapping[str, Any]) -> Any:
    """As it reads back from YAML, so that a tuple equals the list it becomes."""
    text = OmegaConf.to_yaml(OmegaConf.create(dict(resolved)))
    return OmegaConf.to_container(OmegaConf.create(text))
