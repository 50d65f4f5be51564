"""Is a checkpoint of the run that would go on from it? Its settings against the present ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from selfforcing_dfd.config import Config, as_dict
from selfforcing_dfd.stages import STAGES
from selfforcing_dfd.training.compare import differences, listed
from selfforcing_dfd.training.state import leaves
from selfforcing_dfd.weights.checkpoint_files import CheckpointError, read_meta, settings_of

INPUTS = frozenset(
    {
        "weights.student",
        "weights.teacher",
        "weights.fake",
        "weights.causal",
        "weights.student_adapter",
        "weights.fake_adapter",
        "data.shards",
    }
)
"""Settings that name files, which are compared by their content."""

MAY_CHANGE = INPUTS | {
    "run.student_updates",
    "run.device",
    "run.out",
    "run.gpus",
    "run.retries",
    "run.timeout_s",
    "model.shard_ranks",
    "model.sequence_ranks",
    "data.workers",
    "data.video_size",
    "checkpoint",
    "log",
    "report",
    "arms",
    "base",
}
"""Settings that a resumed run may change and still be the same run."""


def check_config(path: Path | str, resolved: Mapping[str, Any], allowed: Set[str]) -> None:
    """CheckpointError naming every setting that differs from the checkpoint's.

    allowed: dotted keys that may change on resume; the name of a section allows all of it.
    """
    lines = changes(settings_of(read_meta(path)), _as_yaml(resolved), allowed)
    if lines:
        raise CheckpointError(
            f"{path} was made with other settings:{listed(lines, len(lines))}\n"
            "To go on, restore these settings, or start a new run in another folder from exported "
            f"weights. May change on resume: {', '.join(sorted(allowed)) or 'nothing'}"
        )


def config_fingerprint(resolved: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(_as_yaml(resolved), sort_keys=True).encode()).hexdigest()


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Set[str], source: str = "checkpoint"
) -> list[str]:
    """A line for each setting of `before` that is another one now, but for those allowed.

    source: what `before` is of. A setting that came with a later version had its default before.
    """
    was = _fixed(before, allowed)
    wanted = _fixed(now, allowed)
    for key in (wanted.keys() - was.keys()) & default_settings().keys():
        was[key] = default_settings()[key]
    return differences(was, wanted, source)


@cache
def default_settings() -> dict[str, Any]:
    """Every setting's default by dotted key."""
    sections = {key: kind() for stage in STAGES.values() for key, kind in stage.sections.items()}
    return leaves(_as_yaml(as_dict(Config(stage=sections))))


def _fixed(settings: Mapping[str, Any], allowed: Set[str]) -> dict[str, Any]:
    """Settings by dotted key without those that may change."""
    return {key: leaf for key, leaf in leaves(settings).items() if not _is_in(key, allowed)}


def _is_in(key: str, allowed: Set[str]) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in allowed)


def _as_yaml(resolved: Mapping[str, Any]) -> Any:
    """As it reads back from YAML, so that a tuple equals the list it becomes."""
    text = OmegaConf.to_yaml(OmegaConf.create(dict(resolved)))
    return OmegaConf.to_container(OmegaConf.create(text))
