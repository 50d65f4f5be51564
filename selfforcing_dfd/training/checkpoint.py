"""Checkpoints that survive being killed: written aside, completed, then renamed into place.

A checkpoint is a folder `student_update=000040` in the format of `weights/checkpoint_files.py`. It
appears by one atomic rename after everything is on disk. With a process group all ranks call
together; without one none has to be made. `training/saving.py` writes them while training goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from selfforcing_dfd import __version__
from selfforcing_dfd.common import (
    DAMAGED,
    PARTIAL,
    REPLACED,
    move_aside,
    partial_of,
    remove_folder,
    replace_folder,
    sealed,
)
from selfforcing_dfd.processes.ranks import gather_entries, on_first_rank
from selfforcing_dfd.training.compare import describe, differences, listed
from selfforcing_dfd.training.finite import check_stored
from selfforcing_dfd.training.same_run import config_fingerprint
from selfforcing_dfd.training.state import State, flatten, give_back, put_values, unfold
from selfforcing_dfd.weights.checkpoint_files import (
    FORMAT_VERSION,
    META_FILE,
    CheckpointError,
    TensorFiles,
    damage,
    deep_damage,
    describe_files,
    load_tensors,
    read_meta,
    save_tensors,
)
from selfforcing_dfd.weights.tensors import model_fingerprint

logger = logging.getLogger(__name__)

NAME = re.compile(rf"({re.escape(REPLACED)})?student_update=\d{{6,}}")
LIBRARIES = ("torch", "numpy", "diffusers", "accelerate", "safetensors")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a checkpoint will hold.

    sizes: bytes of the tensors of all ranks, by key; values: those of all ranks.
    """

    path: Path
    tensors: dict[str, Tensor]
    values: State
    sizes: dict[str, int]


class CheckpointManager:
    """The newest `keep` checkpoints of one run in one folder, to which one run at a time writes.

    config: the resolved config; models: `model_fingerprint` by role, for models that are not saved
    (the teacher). Both are recorded, and `load` refuses a checkpoint made beside another model.
    """

    def __init__(
        self,
        folder: Path | str,
        keep: int = 3,
        *,
        config: Mapping[str, Any] | None = None,
        models: Mapping[str, str] | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must be kept")
        self.folder = Path(folder)
        self.keep = keep
        self.config = dict(config or {})
        self.models = dict(models or {})
        self._trusted: Path | None = None  # all of it was read and is whole

    def save(self, student_update: int, state: State) -> Path:
        """Write `state` and return where it is; older ones are deleted only after that.

        NonFiniteError for values that are not finite, CheckpointError on a full disk or any other
        failure; what was there before is untouched then.
        """
        return self.write(self.snapshot(student_update, state))

    def snapshot(self, student_update: int, state: State, copy: bool = False) -> Snapshot:
        """What `write` will write. NonFiniteError for values that are not finite.

        copy: to memory of the CPU, so that training may change the state meanwhile.
        """
        self.check_may_save(student_update)
        tensors, values = flatten(unfold(state))
        check_stored(tensors.items(), f"the checkpoint of student update {student_update}")
        values = _gather(values)
        _gather(_fingerprints(tensors))
        sizes = _gather({key: tensor.nbytes for key, tensor in tensors.items()})
        if copy:
            tensors = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
        path = self.folder / f"student_update={student_update:06d}"
        return Snapshot(path, tensors, values, sizes)

    def write(self, snapshot: Snapshot, group: ProcessGroup | None = None) -> Path:
        """Write a snapshot and return where it is.

        group: for what the ranks tell each other; None is the usual one. Raises CheckpointError.
        """
        unfinished = partial_of(snapshot.path)
        with _cleaned_up(unfinished):
            on_first_rank(partial(self._make_room, unfinished), group)
            save_tensors(unfinished, snapshot.tensors, snapshot.sizes, group)
            on_first_rank(partial(self._publish, unfinished, snapshot), group)
        return snapshot.path

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None if none was ever written.

        Complete: everything that was written is there, unchanged and finite. A damaged one is
        renamed to `damaged-NAME` with a warning, so that nothing takes it for a checkpoint again;
        one process calls, for all. CheckpointError if all are damaged: a run must not begin again
        unasked.
        """
        for path in reversed(self.all()):
            lack = deep_damage(path)
            if lack is None:
                self._trusted = path
                return path
            aside = move_aside(path)
            logger.warning("%s is passed over: %s; it is now %s", path, lack, aside.name)
        damaged = self.damaged()
        if damaged:
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints in {self.folder} is complete, the newest, "
                f"{damaged[-1].name}: {deep_damage(damaged[-1])}; delete them to start the run "
                "again"
            )
        return None

    def damaged(self) -> list[Path]:
        """Checkpoints that were renamed because something is wrong with them, oldest first."""
        found = self.folder.glob(f"{DAMAGED}*student_update=*")
        return sorted(found, key=_student_update)

    def load(self, path: Path | str, state: State) -> None:
        """Fill the tensors and values of `state` in place, bit for bit.

        CheckpointError, before anything is changed, if the checkpoint is damaged or any key, shape
        or dtype differs.
        """
        path = Path(path)
        meta = read_meta(path)
        lack = on_first_rank(lambda: None if path == self._trusted else deep_damage(path))
        if lack is not None:
            raise CheckpointError(
                f"{path} is damaged: {lack}. Move it away and resume from the one before it"
            )
        unfolded = unfold(state)
        tensors, values = flatten(unfolded)
        files = TensorFiles(path)
        stored = _layout(meta["models"], meta["values"], _as_stored(files))
        wanted = _layout(self.models, values, tensors)
        _check_layout(path, stored, _gather(wanted))
        load_tensors(files, tensors)
        put_values(unfolded, meta["values"])
        give_back(state, unfolded)

    def check_may_save(self, student_update: int) -> None:
        """CheckpointError if the folder holds a later checkpoint, which `latest` would return."""
        later = [path for path in self.all() if _student_update(path) > student_update]
        if later:
            raise CheckpointError(
                f"{later[-1]} is beyond student update {student_update} and would be taken for the "
                "newest of this run; resume from it, use another run folder, or move it away"
            )

    def all(self) -> list[Path]:
        """Checkpoints, whole or not, oldest first.

        One that is just being replaced comes before the one that replaces it.
        """
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        found = [path for path in paths if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_student_update(path), not _is_replaced(path)))

    def _make_room(self, unfinished: Path) -> None:
        """Remove what dead saves left behind and start this one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{PARTIAL}*student_update=*"):
            _remove(leftover)
        unfinished.mkdir()

    def _publish(self, unfinished: Path, snapshot: Snapshot) -> None:
        """Complete the checkpoint with meta.json and give it its name, then drop the oldest."""
        meta = self._describe(_student_update(snapshot.path), snapshot.values)
        meta["files"] = describe_files(sorted(unfinished.iterdir()))
        (unfinished / META_FILE).write_text(json.dumps(sealed(meta), indent=1), encoding="utf-8")
        replace_folder(unfinished, snapshot.path)
        self._drop_oldest()

    def _describe(self, student_update: int, values: State) -> dict[str, Any]:
        versions = {"selfforcing_dfd": __version__, "python": platform.python_version()}
        return {
            "format_version": FORMAT_VERSION,
            "student_update": student_update,
            "config_fingerprint": config_fingerprint(self.config),
            "config_yaml": OmegaConf.to_yaml(OmegaConf.create(self.config)),
            "models": self.models,
            "versions": versions | {name: version(name) for name in LIBRARIES},
            "values": values,
        }

    def _drop_oldest(self) -> None:
        whole = [path for path in self.all() if not _is_replaced(path) and damage(path) is None]
        first_kept = _student_update(whole[-self.keep :][0])
        for path in self.all():
            if _is_replaced(path) or _student_update(path) < first_kept:
                remove_folder(path)


def _remove(path: Path) -> None:
    """Delete a folder, or a file or link that lies in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _student_update(path: Path) -> int:
    return int(path.name.rpartition("=")[2])


def _is_replaced(path: Path) -> bool:
    """Whether a kill left this while another of its number took its place; see `common`."""
    return path.name.startswith(REPLACED)


def _fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of plain tensors, of which only one rank's are stored; nothing for DTensors."""
    if not torch.distributed.is_initialized():
        return {}
    return {
        key: model_fingerprint({"": tensor})
        for key, tensor in tensors.items()
        if not isinstance(tensor, DTensor)
    }


def _gather(own: State) -> State:
    """Entries of all ranks. CheckpointError for a tensor or value that differs between ranks."""
    try:
        return gather_entries(own)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _as_stored(files: TensorFiles) -> dict[str, Tensor]:
    """Tensors without content, of the shapes and dtypes in the files."""
    return {
        key: torch.empty(shape, dtype=dtype, device="meta")
        for key, (shape, dtype) in files.shapes().items()
    }


def _layout(
    models: Mapping[str, str], values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """All that must be the same in a checkpoint and in the run that loads it, in words."""
    layout = {f"{role} (fingerprint)": mark for role, mark in models.items()}
    layout |= {key: type(value).__name__ for key, value in values.items()}
    return layout | {key: describe(tensor) for key, tensor in tensors.items()}


def _check_layout(path: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    lines = differences(stored, wanted)
    if lines:
        num_entries = len(stored.keys() | wanted.keys())
        raise CheckpointError(
            f"{path}: this checkpoint was made by another model, {len(lines)} of {num_entries} "
            f"entries differ:{listed(lines)}\n"
            f"Use the model settings in its {META_FILE}, or start a new run from exported weights"
        )


@contextmanager
def _cleaned_up(unfinished: Path) -> Iterator[None]:
    """Whatever stops a save, the disk gets its space back.

    A failure to write becomes a CheckpointError.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, Exception) or isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError(_explain(cause, unfinished.parent)) from cause


def _explain(cause: BaseException, folder: Path) -> str:
    """Why a save failed, from the first error in a chain of errors."""
    chain = [cause]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    what = f"{type(chain[-1]).__name__}: {chain[-1]}"
    if any(isinstance(error, OSError) and error.errno in DISK_FULL for error in chain):
        what = "the disk is full; free some space or keep fewer"
    return f"could not save in {folder}, earlier checkpoints are untouched: {what}"
