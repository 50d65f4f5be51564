"""`run.json` in a run's folder: what the run is, how far it is, and what its results are.

It is the one account of a run that is believed. Training writes it under the folder's lock, see
`training/identity.py`; whatever reads a run's results asks here whether they are still what that
run exported.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from selfforcing_dfd.common import UserError, atomic_file, is_as_sealed, sealed, sha256_of

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
VERSION = 1
State = Literal["created", "training", "finished"]
STATES: tuple[State, ...] = get_args(State)


class RunError(UserError):
    """A run's folder is not what is asked of it; the message says how to go on."""


class DamagedRecordError(RunError):
    """A run.json that is not what was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run is, and what became of it.

    config: the resolved settings, as YAML. weights: SHA-256 of the weights that each network
    started from, by role. data: fingerprint of the samples. code: what trained it, with the student
    update `since` which it did. results: size and SHA-256 of each exported file. student_updates:
    made by the results; 0 while there are none. aside: samples that training leaves out, by key,
    with the position in the data from which on. retries: how often training went back after values
    that were not finite.
    """

    state: State
    config: str
    weights: Mapping[str, str]
    data: str
    code: tuple[Mapping[str, Any], ...] = ()
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    student_updates: int = 0
    aside: Mapping[str, int] = field(default_factory=dict)
    retries: int = 0


KINDS = {
    "state": str,
    "config": str,
    "weights": dict,
    "data": str,
    "code": list,
    "results": dict,
    "student_updates": int,
    "aside": dict,
    "retries": int,
}
"""What each entry of run.json must be."""


def write_record(run: Path, record: RunRecord) -> None:
    """A kill leaves the record before or this one."""
    content = sealed({"version": VERSION, **dataclasses.asdict(record)})
    with atomic_file(run / RUN_FILE) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_record(run: Path) -> RunRecord | None:
    """The record in a run's folder, None if there is none.

    DamagedRecordError for one that is damaged or was changed by hand, RunError for one of a later
    version.
    """
    path = run / RUN_FILE
    if not path.exists():
        return None
    problem = ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem = _problem(content)
    except (ValueError, RecursionError) as error:
        problem = f"it is no JSON ({error})"
    if problem:
        raise DamagedRecordError(
            f"{path} cannot be believed: {problem}. `selfforcing-dfd doctor {run} --mend` renames "
            "it, and train.py --resume then writes a new one from the newest checkpoint"
        )
    if content["version"] != VERSION:
        raise RunError(
            f"{path} has version {content['version']}, and this program reads {VERSION}; use the "
            "version that wrote it"
        )
    values = {name: content[name] for name in KINDS}
    return RunRecord(**values | {"code": tuple(content["code"])})


def _problem(content: Any) -> str:
    """Why the content of run.json is not a record as it was written; empty if it is."""
    if not isinstance(content, dict) or "version" not in content:
        return "it holds no version"
    if not is_as_sealed(content):
        return "it is not what was written (SHA-256 differs)"
    if content["version"] != VERSION:
        return ""
    wrong = [name for name, kind in KINDS.items() if type(content.get(name)) is not kind]
    if wrong or content["state"] not in STATES:
        return f"its {(wrong or ['state'])[0]} is not what this program writes"
    return ""


def describe_result(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of an exported file, as the record holds them."""
    return {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}


def changed_result(run: Path, record: RunRecord, name: str) -> str:
    """How an exported file differs from what the run exported; empty if it does not."""
    path = run / name
    if name not in record.results:
        return f"{path} is not among the results in {RUN_FILE}"
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != record.results[name]["size_bytes"]:
        wanted = record.results[name]["size_bytes"]
        return f"{path} has {path.stat().st_size:,} bytes, and the run exported {wanted:,}"
    if describe_result(path) != record.results[name]:
        return f"{path} is not what the run exported (SHA-256 differs)"
    return ""


def require_result(run: Path, name: str) -> None:
    """RunError unless a result is what the run exported; a warning where there is no record."""
    record = read_record(run)
    if record is None:
        logger.warning(
            "%s has no %s, so nothing shows what %s was trained with; train.py --resume with the "
            "run's config writes one",
            run,
            RUN_FILE,
            name,
        )
        return
    problem = changed_result(run, record, name)
    if problem:
        raise RunError(
            f"{problem}; `train.py --resume` exports it again from the newest checkpoint. To use "
            "the file as it is, copy it out of the run's folder and name it as weights"
        )
    if record.state != "finished":
        logger.warning(
            "%s goes on training; these are its weights after %d student updates",
            run,
            record.student_updates,
        )
