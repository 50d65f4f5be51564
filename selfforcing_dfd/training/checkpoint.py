"""Checkpoints that survive being killed: written aside, completed, then renamed into place.

A checkpoint is a folder `student_update=000040` with tensors in torch.distributed.checkpoint (DCP)
format, one file a rank, and `meta.json`: plain values, where the run came from, size and SHA-256 of
every file. It appears by one atomic rename after everything is on disk. With a process group all
ranks call together; without one none has to be made.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from selfforcing_dfd import __version__
from selfforcing_dfd.common import UserError, sync
from selfforcing_dfd.training.ema import NUM_SHOWN, describe, differences, model_fingerprint
from selfforcing_dfd.training.ema import load_optimizer_state as load_optimizer_state
from selfforcing_dfd.training.ema import load_weights as load_weights
from selfforcing_dfd.training.ema import optimizer_state as optimizer_state
from selfforcing_dfd.training.ema import save_weights as save_weights

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
META_FILE = "meta.json"
TEMPORARY = ".tmp-"
NAME = re.compile(r"student_update=(\d{6,})(\.replaced)?")
LIBRARIES = ("torch", "numpy", "diffusers", "accelerate", "safetensors")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

T = TypeVar("T")
State = dict[str, Any]
"""Nested dicts with string keys whose leaves are tensors, int, float, str, bool or None. At the top
level also objects with `state_dict` and `load_state_dict`: modules, EMA, Clock.
"""


class CheckpointError(UserError):
    """A checkpoint cannot be written, or is not the one this run needs."""


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

    def save(self, step: int, state: State) -> Path:
        """Write `state` at student update `step` and return where it is; older ones are deleted
        only after that.

        CheckpointError on a full disk or any other failure; what was there before is untouched
        then.
        """
        self.check_may_save(step)
        tensors, values = _flatten(_unfold(state))
        values = _over_ranks(values)
        if dist.is_initialized():
            _over_ranks(
                {
                    key: model_fingerprint({"": t})
                    for key, t in tensors.items()
                    if not isinstance(t, DTensor)
                }
            )
        path = self.folder / f"student_update={step:06d}"
        temporary = path.with_name(TEMPORARY + path.name)
        with _cleaned_up(temporary):
            _on_first_rank(lambda: self._make_room(temporary))
            with _quiet_without_group():
                dcp_save(dict(tensors), storage_writer=FileSystemWriter(temporary, sync_files=True))
            _on_first_rank(lambda: self._publish(temporary, path, values))
        return path

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None if there is none. Damaged ones are passed over with
        a warning.
        """
        for path in reversed(self._all()):
            damage = _damage(path)
            if damage is None:
                return path
            logger.warning("%s is passed over: %s", path, damage)
        return None

    def load(self, path: Path | str, state: State) -> None:
        """Fill the tensors and values of `state` in place, bit for bit.

        CheckpointError, before anything is changed, if the checkpoint is damaged or any key, shape
        or dtype differs.
        """
        path = Path(path)
        meta = read_meta(path)
        _on_first_rank(lambda: _check_hashes(path, meta["files"]))
        unfolded = _unfold(state)
        tensors, values = _flatten(unfolded)
        _check_layout(path, {"models": self.models, "values": values}, meta, tensors)
        with _quiet_without_group():
            dcp_load(dict(tensors), storage_reader=FileSystemReader(path))
        _put_values(unfolded, meta["values"])
        for name, holder in state.items():
            if isinstance(holder, Stateful):
                holder.load_state_dict(unfolded[name])
            elif not isinstance(holder, dict | Tensor):
                state[name] = unfolded[name]

    def check_may_save(self, step: int) -> None:
        """CheckpointError if the folder holds a checkpoint beyond `step`: it would be taken for
        this run's newest.
        """
        later = [path for path in self._all() if _step(path) > step]
        if later:
            raise CheckpointError(
                f"{later[-1]} is beyond student update {step} and would be taken for the newest of this run; "
                "resume from it, use another run folder, or move it away"
            )

    def _all(self) -> list[Path]:
        """Oldest first; one that is just being replaced by another of the same step comes before
        it.
        """
        paths = self.folder.iterdir() if self.folder.is_dir() else iter(())
        return sorted(
            (p for p in paths if NAME.fullmatch(p.name)), key=lambda p: (_step(p), not p.suffix)
        )

    def _make_room(self, temporary: Path) -> None:
        """Remove what dead saves left behind and start this one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{TEMPORARY}student_update=*"):
            shutil.rmtree(leftover)
        temporary.mkdir()

    def _publish(self, temporary: Path, path: Path, values: State) -> None:
        """Complete the checkpoint with meta.json and give it its name, then drop the oldest.

        One that has the name already steps aside to one that `latest` knows too: no moment is
        without a whole one.
        """
        meta = {
            "format_version": FORMAT_VERSION,
            "student_update": _step(path),
            "config_fingerprint": config_fingerprint(self.config),
            "config_yaml": OmegaConf.to_yaml(OmegaConf.create(self.config)),
            "models": self.models,
            "versions": {"selfforcing_dfd": __version__, "python": platform.python_version()}
            | {name: version(name) for name in LIBRARIES},
            "values": values,
            "files": _describe_files(sorted(temporary.iterdir())),
        }
        (temporary / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        sync(temporary / META_FILE)
        sync(temporary)
        if path.exists():
            aside = path.with_suffix(".replaced")
            self._discard(aside)
            path.rename(aside)
        temporary.rename(path)
        sync(self.folder)
        whole = [p for p in self._all() if not p.suffix and _damage(p) is None]
        for other in self._all():
            if other.suffix or _step(other) < _step(whole[-self.keep :][0]):
                self._discard(other)

    def _discard(self, path: Path) -> None:
        """Delete a checkpoint; a kill in between leaves a leftover, never half a checkpoint under
        its name.
        """
        if path.exists():
            shutil.rmtree(path.rename(path.with_name(f"{TEMPORARY}{path.name}.discarded")))


def read_meta(path: Path | str) -> dict[str, Any]:
    """The meta.json of a complete checkpoint; CheckpointError for one that is missing, damaged or
    of another format.
    """
    path = Path(path)
    damage = _damage(path)
    if damage is not None:
        whole = sorted(
            other.name for other in path.parent.glob("student_update=*") if _damage(other) is None
        )
        raise CheckpointError(
            f"{path} is no complete checkpoint: {damage}. Complete ones beside it: {whole or 'none'}"
        )
    meta: dict[str, Any] = json.loads((path / META_FILE).read_text(encoding="utf-8"))
    if meta["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {meta['format_version']}, this version reads {FORMAT_VERSION}; "
            f"it was written by selfforcing_dfd {meta['versions']['selfforcing_dfd']}"
        )
    return meta


def check_config(path: Path | str, resolved: Mapping[str, Any], allowed: set[str]) -> None:
    """CheckpointError naming every setting that differs from the checkpoint's.

    allowed: dotted keys that may change on resume; the name of a section allows all of it.
    """
    before, now = (
        {
            key: leaf
            for key, leaf in _leaves(tree).items()
            if not any(f"{key}.".startswith(f"{a}.") for a in allowed)
        }
        for tree in (
            OmegaConf.to_container(OmegaConf.create(read_meta(path)["config_yaml"])),
            _as_yaml(resolved),
        )
    )
    lines = differences(before, now)
    if lines:
        raise CheckpointError(
            f"{path} was made with other settings:{_listed(lines, len(lines))}\nTo go on, restore these settings, or "
            "start a new run in another folder from exported weights. May change on resume: "
            f"{', '.join(sorted(allowed)) or 'nothing'}"
        )


def config_fingerprint(resolved: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(_as_yaml(resolved), sort_keys=True).encode()).hexdigest()


def _as_yaml(resolved: Mapping[str, Any]) -> Any:
    """As it reads back from YAML, so that a tuple equals the list it becomes."""
    return OmegaConf.to_container(
        OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(dict(resolved))))
    )


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested dicts; an empty dict is a leaf."""
    found: dict[str, Any] = {}
    for name, child in tree.items():
        part = (
            _leaves(child, f"{prefix}{name}.")
            if isinstance(child, dict) and child
            else {f"{prefix}{name}": child}
        )
        if part.keys() & found.keys():
            raise CheckpointError(
                f"two entries are called {sorted(part.keys() & found.keys())[0]}; rename one"
            )
        found |= part
    return found


def _unfold(state: State) -> State:
    return {
        name: holder.state_dict() if isinstance(holder, Stateful) else holder
        for name, holder in state.items()
    }


def _flatten(unfolded: State) -> tuple[dict[str, Tensor], State]:
    """(tensors, plain values) by dotted key."""
    leaves = _leaves(unfolded)
    tensors = {key: leaf.detach() for key, leaf in leaves.items() if isinstance(leaf, Tensor)}
    values = {key: leaf for key, leaf in leaves.items() if key not in tensors and leaf != {}}
    for key, value in values.items():
        if type(value) not in (int, float, str, bool, type(None)):
            raise CheckpointError(
                f"{key} is a {type(value).__name__}; a checkpoint holds nested dicts of tensors, int, float, str, bool "
                "and None. For an optimizer pass optimizer_state(model, optimizer)"
            )
    return tensors, values


def _put_values(tree: State, values: State, prefix: str = "") -> None:
    for name, child in tree.items():
        if isinstance(child, dict):
            _put_values(child, values, f"{prefix}{name}.")
        elif not isinstance(child, Tensor):
            tree[name] = values[f"{prefix}{name}"]


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("student_update="))


def _describe_files(paths: list[Path]) -> dict[str, dict[str, Any]]:
    def one(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            return {
                "size_bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }

    with ThreadPool() as pool:
        return dict(zip((path.name for path in paths), pool.map(one, paths), strict=True))


def _damage(path: Path) -> str | None:
    """What a checkpoint lacks, None if it is whole. By sizes only, which is cheap; `load` checks
    the hashes.
    """
    try:
        files: dict[str, Any] = json.loads((path / META_FILE).read_text(encoding="utf-8"))["files"]
        for name in sorted({*files, ".metadata"}):
            size_bytes = (path / name).stat().st_size
            if size_bytes != files[name]["size_bytes"]:
                return f"{name} has {size_bytes} of {files[name]['size_bytes']} bytes"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{META_FILE} is not readable ({error!r})"
    return None


def _check_hashes(path: Path, files: Mapping[str, Any]) -> None:
    lines = differences(files, _describe_files([path / name for name in files]))
    if lines:
        raise CheckpointError(
            f"{path} is damaged, its files are not what was written. Move it away and resume from the one before it"
            + _listed(lines)
        )


def _check_layout(path: Path, wanted: State, meta: State, tensors: Mapping[str, Tensor]) -> None:
    """Compare what is stored with what is wanted: tensors, types of values, fingerprints of models
    beside them.
    """
    before, now = (
        {f"{role} (fingerprint)": mark for role, mark in side["models"].items()}
        | {key: type(value).__name__ for key, value in side["values"].items()}
        for side in (meta, wanted)
    )
    for key, item in FileSystemReader(path).read_metadata().state_dict_metadata.items():
        assert isinstance(item, TensorStorageMetadata)  # `save` hands tensors only to DCP
        before[key] = describe(torch.empty(item.size, dtype=item.properties.dtype, device="meta"))
    now = _over_ranks(now | {key: describe(tensor) for key, tensor in tensors.items()})
    lines = differences(before, now)
    if lines:
        raise CheckpointError(
            f"{path}: this checkpoint was made by another model, {len(lines)} of {len(before | now)} entries differ:"
            f"{_listed(lines)}\nUse the model settings in its {META_FILE}, or start a new run from exported weights"
        )


def _listed(lines: list[str], num_shown: int = NUM_SHOWN) -> str:
    more = [f"and {len(lines) - num_shown} more"] if len(lines) > num_shown else []
    return "".join(f"\n  {line}" for line in lines[:num_shown] + more)


@contextmanager
def _cleaned_up(temporary: Path) -> Iterator[None]:
    """Whatever stops a save, the disk gets its space back; a failure to write becomes a
    CheckpointError.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        cause = (
            next(iter(error.failures.values()))[0]
            if isinstance(error, CheckpointException)
            else error
        )
        if not isinstance(cause, Exception) or isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError(_explain(cause, temporary.parent)) from error


def _explain(cause: BaseException, folder: Path) -> str:
    """DCP hides a full disk behind the error it met while handling it; from another rank only that
    one arrives.
    """
    chain = [cause]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    full = "unexpected pos" in str(cause) or any(
        isinstance(e, OSError) and e.errno in DISK_FULL for e in chain
    )
    what = (
        "the disk is full; free some space or keep fewer"
        if full
        else f"{type(chain[-1]).__name__}: {chain[-1]}"
    )
    return f"could not save in {folder}, earlier checkpoints are untouched: {what}"


def _on_first_rank(action: Callable[[], T]) -> T:
    """Do something once; all ranks get its result, or raise its error."""
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _over_ranks(own: State) -> State:
    """The entries of all ranks; CheckpointError, on all of them, if one key has different contents
    on two ranks.

    Only DTensors are stored by shard. Of a plain tensor or value one rank's would be kept,
    silently.
    """
    if not dist.is_initialized():
        return own
    ranks: list[State] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    merged: State = {}
    for rank, entries in enumerate(ranks):
        differing = sorted(
            key for key in entries.keys() & merged.keys() if entries[key] != merged[key]
        )
        if differing:
            raise CheckpointError(
                f"{differing[0]} on rank {rank} is not what other ranks have; put the rank in the key"
            )
        merged |= entries
    return merged


@contextmanager
def _quiet_without_group() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        yield
