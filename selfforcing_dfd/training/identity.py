"""Which run a folder is of: the record of it against what would be trained now.

A record goes from created to training to finished. The same run goes on, or has nothing to do; with
more updates it goes on; anything else is refused with the difference.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from selfforcing_dfd import __version__
from selfforcing_dfd.common import PACKAGE, find_file, sha256_of
from selfforcing_dfd.config import Config
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.config_files import to_yaml
from selfforcing_dfd.training.build_data import build_reader
from selfforcing_dfd.training.compare import listed
from selfforcing_dfd.training.folders import CHECKPOINTS, run_folder
from selfforcing_dfd.training.same_run import INPUTS, MAY_CHANGE, changes
from selfforcing_dfd.training.tracking import METRICS_FILE, read_metrics
from selfforcing_dfd.weights.run_record import RunError, RunRecord, changed_result, read_record
from selfforcing_dfd.weights.runs import CONFIG_FILE, STUDENT_FILE

logger = logging.getLogger(__name__)

NEW_RUN = "give this run another run.name"


def find_record(config: Config, resume: bool) -> RunRecord:
    """The record with which a run begins or goes on; nothing is written.

    Its state is finished where there is nothing to do. RunError for a folder of another run, and
    for one whose content cannot be trusted.
    """
    folder = run_folder(config)
    now = new_record(config)
    before = read_record(folder)
    if before is None or before.state == "created":
        return adopt(folder, now) if resume else refuse_used(folder, now)
    if not resume:
        raise RunError(
            f"{folder} already holds a run, {before.state}; "
            "resume that run, or give this one another folder (--resume, or run.name=OTHER)"
        )
    check_same(folder, before, now)
    check_updates(folder, before, config)
    wanted = replace(before, config=now.config, state="training")
    if before.state != "finished":
        check_not_lost(folder, before)
        return wanted
    reason = what_is_left(folder, before, config)
    if not reason:
        return before
    if not has_checkpoints(folder):
        raise RunError(
            f"{folder}: {reason}, but its checkpoints are gone. Bring them back, or train it again "
            f"in another folder ({NEW_RUN})"
        )
    logger.warning("%s: %s; going on from its newest checkpoint", folder, reason)
    return wanted


def new_record(config: Config) -> RunRecord:
    """What a run of these settings would be, here and now."""
    hash_once = cache(hash_of_weights)
    weights = {}
    for role, start in stage_of(config).starts(config).items():
        weights[role] = hash_once(start.path)
        if start.adapter:
            weights[f"{role}_adapter"] = hash_once(start.adapter)
    with_noise = bool(stage_of(config).needs_noise(config))
    data = data_fingerprint(build_reader(config), with_noise)
    return RunRecord(state="created", config=to_yaml(config), weights=weights, data=data)


def adopt(folder: Path, now: RunRecord) -> RunRecord:
    """The record for a folder without one: of an older version, or of a run that never began.

    RunError unless config.yaml has the same settings and a checkpoint, which is checked when it is
    loaded, shows how far training came.
    """
    if not has_checkpoints(folder):
        if (folder / STUDENT_FILE).exists():
            raise RunError(
                f"{folder} holds {STUDENT_FILE} but neither run.json nor checkpoints, so nothing "
                f"shows how it was trained. {NEW_RUN}, or move the file away to train it again; "
                "as weights it can be used from any place"
            )
        return now
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise RunError(
            f"{folder} holds checkpoints but neither run.json nor {CONFIG_FILE}, so nothing shows "
            f"which run they are of; {NEW_RUN}"
        )
    stored = replace(now, config=path.read_text(encoding="utf-8"))
    check_same(folder, stored, now, MAY_CHANGE - INPUTS)
    check_schedule(folder, stored, now)
    logger.warning("%s has no run.json yet; it goes on from its newest checkpoint", folder)
    return replace(now, state="training")


def proof_of(config: Config) -> dict[str, Any]:
    """What the record of a finished run proves of it, for reports.

    RunError for a run that is not finished, is of other settings, or whose student was changed.
    """
    folder = run_folder(config)
    record = read_record(folder)
    if record is None or record.state != "finished":
        state = "has no run.json" if record is None else "is not finished"
        raise RunError(
            f"{folder} {state}, so a report could not say what made its numbers; go on with "
            "train.py --resume"
        )
    check_same(folder, record, replace(record, config=to_yaml(config)))
    problem = changed_result(folder, record, STUDENT_FILE)
    if problem or record.student_updates != config.run.student_updates:
        problem = problem or f"{folder} was trained for {record.student_updates} student updates"
        raise RunError(f"{problem}; go on with train.py --resume")
    return {
        "student": record.results[STUDENT_FILE]["sha256"],
        "student_updates": record.student_updates,
        "weights": record.weights,
        "data": record.data,
        "code": list(record.code),
        "aside": record.aside,
    }


def refuse_used(folder: Path, now: RunRecord) -> RunRecord:
    """The record of a new run; RunError for a folder with something of another one."""
    metrics = folder / METRICS_FILE
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    if has_metrics or has_checkpoints(folder) or (folder / STUDENT_FILE).exists():
        raise RunError(
            f"{folder} already holds a run's metrics, checkpoints or weights; "
            "resume that run, or give this one another folder (--resume, or run.name=OTHER)"
        )
    return now


def check_same(
    folder: Path, before: RunRecord, now: RunRecord, allowed: frozenset[str] = MAY_CHANGE
) -> None:
    """RunError that names every difference between two records but for what may change."""
    lines = changes(settings_of(before), settings_of(now), allowed, "the run")
    for role in {**before.weights, **now.weights}:
        if before.weights.get(role) != now.weights.get(role):
            lines.append(f"weights.{role}: the file is not the one that the run started from")
    if before.data != now.data:
        lines.append("data.shards: the clips, their captions or their noise are others")
    if lines:
        raise RunError(
            f"{folder} is of another run:{listed(lines, len(lines))}\nTo go on with it, restore "
            f"these; for a new run, {NEW_RUN}. May change on resume: {', '.join(sorted(allowed))}"
        )


def check_updates(folder: Path, before: RunRecord, config: Config) -> None:
    """RunError for a number of updates with which the run would not be the same."""
    asked = config.run.student_updates
    if before.state == "finished" and asked < before.student_updates:
        raise too_few(folder, asked, before.student_updates)
    check_schedule(folder, before, replace(before, config=to_yaml(config)))


def check_not_lost(folder: Path, record: RunRecord) -> None:
    """RunError for a run that saved checkpoints of which none is there any more.

    It would begin again without a word, and drop the metrics that it has.
    """
    path = folder / METRICS_FILE
    if has_checkpoints(folder) or not path.exists():
        return
    made = sum(line["kind"] == "student" for line in read_metrics(path))
    every = settings_of(record)["checkpoint"]["every"]
    if made > every:
        raise RunError(
            f"{folder} has made {made} student updates and saved every {every}, but its "
            f"checkpoints are gone. Bring them back, or train it again in another folder "
            f"({NEW_RUN})"
        )


def too_few(folder: Path, asked: int, done: int) -> RunError:
    return RunError(
        f"run.student_updates is {asked}, but {folder} has made {done}, and a run cannot be "
        f"shortened; use run.student_updates={done} or more, or take the weights of an earlier "
        "checkpoint with `selfforcing-dfd convert`"
    )


def check_schedule(folder: Path, before: RunRecord, now: RunRecord) -> None:
    """RunError for another number of updates under a learning rate that decays to the last one.

    The updates that were made would have had other rates, so the longer run would be no run that
    those settings describe.
    """
    began_with = settings_of(before)["run"]["student_updates"]
    settings = settings_of(now)
    asked = settings["run"]["student_updates"]
    decays = [turn for turn, optimizer in settings["optim"].items() if optimizer["decay"] != 1]
    if asked != began_with and decays:
        raise RunError(
            f"optim.{decays[0]}.decay lets the learning rate fall until the last update, so every "
            f"update depends on run.student_updates: {folder} began with {began_with}, and {asked} "
            f"are asked for. Restore run.student_updates={began_with}, or start a new run from "
            f"weights.student={folder / STUDENT_FILE}"
        )


def what_is_left(folder: Path, record: RunRecord, config: Config) -> str:
    """Why a finished run has something to do, in words; empty if it has not."""
    more = config.run.student_updates - record.student_updates
    if more:
        return f"{more} more student updates are asked for"
    dtype = settings_of(record)["checkpoint"]["export"]
    if dtype != config.checkpoint.export:
        return f"its weights were exported as {dtype}, not {config.checkpoint.export}"
    changes = (changed_result(folder, record, name) for name in record.results)
    return next((change for change in changes if change), "")


def settings_of(record: RunRecord) -> dict[str, Any]:
    """The record's settings as nested dicts."""
    settings = OmegaConf.to_container(OmegaConf.create(record.config))
    if not isinstance(settings, dict):
        raise RunError("the config in run.json or config.yaml holds no settings; restore it")
    return {str(name): value for name, value in settings.items()}


def has_checkpoints(folder: Path) -> bool:
    """Whether training saved anything, whole or damaged."""
    return any((folder / CHECKPOINTS).glob("*student_update=*"))


def hash_of_weights(name: str) -> str:
    """SHA-256 of a weights file, or of all files of a folder; `none` for fresh weights."""
    path = find_file(name)
    if not name:
        return "none"
    if path.is_file():
        return sha256_of(path)
    inner = path / "transformer"  # of a whole pipeline
    digest = hashlib.sha256()
    for file in files_of(inner if inner.is_dir() else path):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def data_fingerprint(reader: ShardReader, with_noise: bool) -> str:
    """Of the samples that a run sees. Noise counts where it starts from it.

    Noise may be added to shards later, for other runs.
    """
    digest = hashlib.sha256()
    index = reader.index
    negative = (index.about.get("negative") or {}).get("sha256", "")
    digest.update(f"{tuple(index.latent_shape)} {tuple(index.text_shape)} {negative}\n".encode())
    for entry in index.samples:
        digest.update(f"{entry.key} {entry.caption}\n".encode())
        for level, caption in sorted(entry.captions.items()):
            digest.update(f"{level} {caption}\n".encode())
        for name, member in sorted(entry.members.items()):
            if with_noise or not name.startswith("noise"):
                digest.update(f"{name} {member.size} {member.crc32}\n".encode())
    return digest.hexdigest()


@cache
def running_code() -> dict[str, str]:
    """What trains: versions, and a hash of the package's own source."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {sha256_of(path)}\n".encode())
    return {
        "selfforcing_dfd": __version__,
        "source": digest.hexdigest(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
