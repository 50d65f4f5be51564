"""What is wrong with a run's folder, in plain words, and how to mend it without losing anything.

What cannot be used is renamed to `damaged-NAME`, never deleted. Only leftovers of unfinished writes
are deleted, which hold nothing whole.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from selfforcing_dfd.common import DAMAGED, PARTIAL, REPLACED, atomic_file, move_aside
from selfforcing_dfd.training.checkpoint import CheckpointManager
from selfforcing_dfd.training.compare import listed
from selfforcing_dfd.training.exclusive import LOCK_FILE, holder_of
from selfforcing_dfd.training.folders import CHECKPOINTS
from selfforcing_dfd.training.identity import has_checkpoints, settings_of
from selfforcing_dfd.training.metrics_file import Metrics, read_all_metrics
from selfforcing_dfd.training.same_run import MAY_CHANGE, changes
from selfforcing_dfd.training.tracking import METRICS_FILE
from selfforcing_dfd.weights.checkpoint_files import CheckpointError, deep_damage, read_meta
from selfforcing_dfd.weights.checkpoint_files import settings_of as settings_of_meta
from selfforcing_dfd.weights.run_record import (
    RUN_FILE,
    DamagedRecordError,
    RunError,
    RunRecord,
    changed_result,
    read_record,
)
from selfforcing_dfd.weights.runs import CONFIG_FILE, STUDENT_FILE
from selfforcing_dfd.weights.stored import WeightsError, not_finite_in

NUM_SHOWN = 3  # lines of metrics


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong. cure: what helps; mend: does that, where a program can."""

    problem: str
    cure: str
    mend: Callable[[], object] | None = None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of one run; a comparison's holds those of its arms."""
    return any((folder / name).exists() for name in (RUN_FILE, CHECKPOINTS, METRICS_FILE))


def examine(run: Path, is_held: bool = False) -> list[Finding]:
    """Everything that is wrong with a run's folder. All of it is read, and nothing is changed.

    is_held: the caller has locked the folder. Files of a run that is in use are no leftovers.
    """
    try:
        record = read_record(run)
    except RunError as error:
        record = None
        is_damaged = isinstance(error, DamagedRecordError)
        mend = partial(move_aside, run / RUN_FILE) if is_damaged else None
        found = [Finding(str(error), "it is renamed" if mend else "nothing is changed", mend)]
    else:
        found = list(_look_for_record(run, record))
    if is_held or not holder_of(run):
        found += _look_at_leftovers(run)
    found += _look_at_checkpoints(run, record)
    found += _look_at_metrics(run)
    if record is not None:
        found += _look_for_checkpoints(run, record)
        found += _look_at_config(run, record)
        found += _look_at_results(run, record)
    return found


def resume_command(run: Path) -> str:
    return f"`python train.py --config {run / CONFIG_FILE} --resume`"


def _look_for_record(run: Path, record: RunRecord | None) -> Iterator[Finding]:
    if record is None:
        yield Finding(
            f"there is no {RUN_FILE}: an older version trained it, so nothing shows what its "
            "results were made from",
            f"{resume_command(run)} writes one from the newest checkpoint, if there is one",
        )


def _look_at_leftovers(run: Path) -> Iterator[Finding]:
    """What killed saves left behind; nobody may be writing meanwhile."""
    for folder in (run, run / CHECKPOINTS):
        for path in sorted(folder.glob(f"{PARTIAL}*")):
            yield Finding(
                f"{path} is left over from a write that was killed",
                "it is deleted; it holds nothing whole",
                partial(_delete, path),
            )
        for path in sorted(folder.glob(f"{REPLACED}*")):
            yield Finding(
                f"{path} is left over from a replacement that was killed",
                "it gets its name back where that is free; else it was replaced and is deleted",
                partial(_put_back, path),
            )


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _put_back(path: Path) -> None:
    place = path.with_name(path.name.removeprefix(REPLACED))
    if place.exists():
        _delete(path)
    else:
        path.rename(place)


def _look_at_checkpoints(run: Path, record: RunRecord | None) -> Iterator[Finding]:
    for path in CheckpointManager(run / CHECKPOINTS).all():
        if path.name.startswith(REPLACED):
            continue
        problem = deep_damage(path)
        if problem is not None:
            yield Finding(
                f"{path} cannot be used: {problem}",
                "it is renamed, and training goes on from the one before it",
                partial(move_aside, path),
            )
        else:
            yield from _look_at_settings(path, record)


def _look_for_checkpoints(run: Path, record: RunRecord) -> Iterator[Finding]:
    """Whether a run that was not finished has what it would go on from."""
    path = run / METRICS_FILE
    if record.state != "training" or has_checkpoints(run) or not path.exists():
        return
    made = sum(kind == "student" for kind, _ in read_all_metrics(path).lines)
    every = settings_of(record)["checkpoint"]["every"]
    if made > every:
        yield Finding(
            f"{run} has made {made} student updates and saved every {every}, but its checkpoints "
            "are gone",
            "bring them back, or train it again in another folder",
        )


def _look_at_settings(checkpoint: Path, record: RunRecord | None) -> Iterator[Finding]:
    """Whether a whole checkpoint is one of this version, and of this run."""
    try:
        stored = settings_of_meta(read_meta(checkpoint))
    except CheckpointError as error:
        yield Finding(str(error), "this program leaves it as it is")
        return
    stored.pop("networks", None)  # facts of the networks, which are no settings
    lines = changes(stored, settings_of(record), MAY_CHANGE) if record is not None else []
    if lines:
        yield Finding(
            f"{checkpoint} was made with other settings than the run has{listed(lines)}",
            "it is renamed, and training goes on from the one before it",
            partial(move_aside, checkpoint),
        )


def _look_at_metrics(run: Path) -> Iterator[Finding]:
    path = run / METRICS_FILE
    if not path.exists():
        return
    found = read_all_metrics(path)
    mend = partial(rewrite_metrics, path, found)
    if found.unreadable:
        shown = ", ".join(map(str, found.unreadable[:NUM_SHOWN]))
        yield Finding(
            f"{path}: {len(found.unreadable)} lines cannot be read, the first in line {shown}",
            "the others are kept, and the whole file as it is under another name",
            mend,
        )
    elif found.num_doubled:
        yield Finding(
            f"{path}: {found.num_doubled} turns are there twice",
            "the later line of each is kept, and the whole file under another name",
            mend,
        )
    missing = _missing_turns(found)
    if missing:
        yield Finding(
            f"{path}: lines are missing: {missing}",
            "they cannot be made again; weights are not affected",
        )


def _missing_turns(found: Metrics) -> str:
    """How many turns of each kind have no line although a later one has; empty for none."""
    counts: Counter[str] = Counter(kind for kind, _ in found.lines)
    last = {kind: max(n for own, n in found.lines if own == kind) for kind in counts}
    missing = {kind: last[kind] - counts[kind] for kind in counts}
    return ", ".join(f"{number} of {kind} turns" for kind, number in missing.items() if number)


def rewrite_metrics(path: Path, found: Metrics) -> None:
    """Keep the readable lines, and the whole file under another name."""
    if not path.exists():
        return
    move_aside(path)
    with atomic_file(path) as partial_file:
        partial_file.write_text(found.text(), encoding="utf-8")


def _look_at_config(run: Path, record: RunRecord) -> Iterator[Finding]:
    path = run / CONFIG_FILE
    is_there = path.is_file()
    if is_there and path.read_bytes() == record.config.encode():
        return
    if is_there or record.state != "created":
        yield Finding(
            f"{path} {'is not what the run was trained with' if is_there else 'is missing'}",
            f"it is written from {RUN_FILE}; what is there is kept under another name",
            partial(_restore_config, path, record),
        )


def _restore_config(path: Path, record: RunRecord) -> None:
    if path.exists():
        move_aside(path)
    with atomic_file(path) as partial_file:
        partial_file.write_text(record.config, encoding="utf-8")


def _look_at_results(run: Path, record: RunRecord) -> Iterator[Finding]:
    cure = f"{resume_command(run)} exports it again from the newest checkpoint"
    if not has_checkpoints(run):
        cure = "there is no checkpoint to export it from: bring the file back, or train again"
    for name in record.results:
        problem = changed_result(run, record, name)
        if problem:
            yield Finding(problem, cure)
    path = run / STUDENT_FILE
    if record.state == "finished" and path.is_file():
        try:
            bad = not_finite_in(path)
        except WeightsError:
            return  # it was changed, which is said above
        if bad is not None:
            yield Finding(f"{path} holds values that are not finite, first in {bad}", cure)


def summary(run: Path) -> list[str]:
    """What a run's folder holds, in a few lines."""
    lines = []
    try:
        record = read_record(run)
    except RunError:
        record = None
    if record is not None:
        asked = settings_of(record)["run"]["student_updates"]
        lines.append(f"{record.state}; {asked} student updates asked for")
        if record.results:
            results = ", ".join(record.results)
            lines.append(f"exported after {record.student_updates} student updates: {results}")
        if record.aside:
            lines.append(
                f"{len(record.aside)} samples left out after {record.retries} turns with values "
                f"that were not finite: {', '.join(list(record.aside)[:8])}"
            )
    manager = CheckpointManager(run / CHECKPOINTS)
    found = [path.name for path in manager.all() if not path.name.startswith(REPLACED)]
    newest = f", the newest {found[-1]}" if found else ""
    lines.append(f"{len(found)} checkpoints{newest}")
    aside = [path.name for path in sorted(run.glob(f"{DAMAGED}*"))]
    aside += [path.name for path in manager.damaged()]
    if aside:
        lines.append(f"set aside as damaged, and yours to delete: {', '.join(aside)}")
    holder = holder_of(run)
    if holder:
        lines.append(f"in use by {holder}")
    elif (run / LOCK_FILE).exists():
        lines.append("not in use; the lock file locks nothing by itself")
    return lines
