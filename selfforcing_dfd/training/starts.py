"""What can be said of a run before anything is made: its device, trackers and starting weights."""

from __future__ import annotations

from selfforcing_dfd.common import find_device, find_file
from selfforcing_dfd.config import Config, ConfigError, require
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.training.tracking import check_trackers


def check_start(config: Config) -> None:
    """UserError for a device, trackers or weights that are not there, before anything is made."""
    check_trackers(config.log.trackers)
    find_device(config.run.device, "run.device")
    check_adapters(config)
    for setting, path in stage_of(config).reads(config).items():
        require(
            find_file(path).exists(),
            f"{setting} is {path}, which does not exist; fetch or train it first, or correct the "
            "path",
        )
    starts = stage_of(config).starts(config).values()
    used = {start.path for start in starts} | {start.adapter for start in starts}
    for role, name in (
        ("student", config.weights.student),
        ("teacher", config.weights.teacher),
        ("fake", config.weights.fake),
        ("causal", config.weights.causal),
        ("student_adapter", config.weights.student_adapter),
        ("fake_adapter", config.weights.fake_adapter),
    ):
        if name in used and name and not find_file(name).exists():
            raise ConfigError(
                f"weights.{role} is {name}, which does not exist; "
                "train it first, or correct the path"
            )


def check_adapters(config: Config) -> None:
    """ConfigError for adapters that would not be used, or not over the weights they belong to."""
    weights = config.weights
    for role, adapter, own in (
        ("student", weights.student_adapter, weights.student),
        ("fake", weights.fake_adapter, weights.fake),
    ):
        require(
            not adapter or config.model.lora_rank > 0,
            f"weights.{role}_adapter is {adapter}, but model.lora_rank is 0, so no adapter is "
            "trained; set model.lora_rank to the rank of that one",
        )
        require(
            not (adapter and own),
            f"weights.{role}_adapter and weights.{role} are both set; the adapter is over the "
            f"teacher's weights: use weights.{role}=",
        )
