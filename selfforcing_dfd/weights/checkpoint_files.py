"""The format of a training checkpoint: tensors in safetensors files, all the rest in meta.json.

torch.distributed.checkpoint (DCP) writes and reads the tensors, from any number of processes to any
other number. Nothing is pickled, so reading a checkpoint runs no code. `training/checkpoint.py`
says when they are written.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from selfforcing_dfd.common import SEAL, is_as_sealed
from selfforcing_dfd.weights.stored import META_FILE as META_FILE
from selfforcing_dfd.weights.stored import StoredTensor, WeightsError, not_finite_in

FORMAT_VERSION = 2
FIELDS = {
    "student_update": int,
    "config_yaml": str,
    "models": dict,
    "versions": dict,
    "values": dict,
    "files": dict,
}
"""What meta.json must hold beside the format version."""
KEYS = {"format_version", "config_fingerprint", SEAL, *FIELDS}
"""All that it may hold."""
FILE_BYTES = 1 << 30
"""A file is put together in memory before it is written, so it should not be larger."""
ENTRIES = {"ema": "ema.shadow.", "student": "student.", "fake": "fake."}
"""Models of a checkpoint, and what their tensors' keys begin with. A finished run exports the
first.
"""


class CheckpointError(WeightsError):
    """A checkpoint cannot be written, or is not the one that is needed."""


class TensorFiles(HuggingFaceStorageReader):
    """DCP's reader of a folder of safetensors files, which reads their headers once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self._metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """Shape, dtype and place of every tensor. CheckpointError if the headers are damaged."""
        if self._metadata is None:
            try:
                self._metadata = super().read_metadata()
            except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{self.folder}: the tensors' headers are not readable ({error!r}); "
                    "use the checkpoint before it"
                ) from error
        return self._metadata

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor by key.

        CheckpointError for a tensor of which pieces are missing.
        """
        found = {}
        for key, entry in self.read_metadata().state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)  # the only kind in safetensors files
            num_stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if num_stored != math.prod(entry.size):
                raise CheckpointError(
                    f"{self.folder}: {key} has {num_stored} of {math.prod(entry.size)} values; "
                    "use the checkpoint before it"
                )
            found[key] = (tuple(entry.size), entry.properties.dtype)
        return found

    def read(self, key: str) -> Tensor:
        """One whole tensor on the CPU, whichever processes wrote its pieces."""
        entry = self.read_metadata().state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        load_tensors(self, {key: tensor}, alone=True)
        return tensor


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    group: ProcessGroup | None = None,
) -> None:
    """Write tensors, synced to the disk; with a process group all ranks call together.

    Of a DTensor every rank writes its shard, of a plain tensor one rank writes the whole. sizes:
    bytes of the tensors of all ranks. group: the ranks agree through it; None is the usual one.
    """
    writer = HuggingFaceStorageWriter(
        str(folder), save_distributed=True, fqn_to_index_mapping=_split_into_files(sizes)
    )
    with _without_warning():
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        dcp_save(contiguous, storage_writer=writer, process_group=group)


def load_tensors(files: TensorFiles, tensors: Mapping[str, Tensor], alone: bool = False) -> None:
    """Fill tensors in place. With a process group all ranks call together, or one `alone`."""
    with _without_warning():
        dcp_load(dict(tensors), storage_reader=files, no_dist=alone)


def read_meta(folder: Path | str) -> dict[str, Any]:
    """The meta.json of a complete checkpoint.

    CheckpointError for one that is missing, damaged or of another format.
    """
    folder = Path(folder)
    lack = damage(folder)
    if lack is not None:
        beside = folder.parent.glob("student_update=*")
        whole = sorted(other.name for other in beside if damage(other) is None)
        raise CheckpointError(
            f"{folder} is no complete checkpoint: {lack}. "
            f"Complete ones beside it: {whole or 'none'}"
        )
    meta = _parse_meta(folder)
    if meta["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format {meta['format_version']}, this version reads {FORMAT_VERSION} "
            "(format 1 held a pickle, which may run any program); "
            "finish that run with the version that wrote it, or start from its exported weights"
        )
    return meta


def settings_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved config in a checkpoint's meta.json, as nested dicts."""
    try:
        settings = yaml.safe_load(meta["config_yaml"])
    except yaml.YAMLError as error:
        raise CheckpointError(f"config_yaml in {META_FILE} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"config_yaml in {META_FILE} holds no settings")
    return settings


def damage(folder: Path) -> str | None:
    """What a checkpoint lacks, None if it is whole.

    By names, sizes and the seal of meta.json only, which is cheap; `deep_damage` reads everything.
    A checkpoint of another format passes: `read_meta` says what to do with it.
    """
    try:
        meta = _parse_meta(folder)
    except CheckpointError as error:
        return str(error)
    if meta["format_version"] != FORMAT_VERSION:
        return None
    for name, kind in FIELDS.items():
        if type(meta.get(name)) is not kind:
            return f"{META_FILE} has no {name}"
    named = re.fullmatch(r"student_update=(\d+)", folder.name)
    if named and int(named[1]) != meta["student_update"]:
        return f"it is the checkpoint of student update {meta['student_update']}, by another name"
    files: dict[str, Any] = meta["files"]
    unknown = {path.name for path in folder.iterdir()} - {META_FILE, *files}
    if unknown:
        return f"{min(unknown)} was not written with it"
    for name, entry in files.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            return f"{META_FILE} names {name}, which is no safetensors file of this folder"
        if not (folder / name).is_file():
            return f"{name}: No such file or directory"
        size_bytes = (folder / name).stat().st_size
        if not isinstance(entry, dict) or size_bytes != entry.get("size_bytes"):
            return f"{name} has {size_bytes} bytes; {META_FILE} says {entry}"
    return _changes_of(meta)


def _changes_of(meta: Mapping[str, Any]) -> str | None:
    """What shows that meta.json is not as it was written, None if nothing does.

    It holds the hashes of all other files, so its seal covers the whole checkpoint.
    """
    unknown = sorted(meta.keys() - KEYS)
    if unknown:
        return f"{META_FILE} has an entry {unknown[0]}, which is not known"
    # checkpoints from before 2026-11-22 have no seal
    if SEAL in meta and not is_as_sealed(meta):
        return f"{META_FILE} is not what was written (SHA-256 differs)"
    return None


def deep_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint once all of it is read, None if nothing is.

    Hashes of all files, and values that are not finite.
    """
    lack = damage(folder)
    if lack is not None:
        return lack
    meta = _parse_meta(folder)
    if meta["format_version"] != FORMAT_VERSION:
        return None
    files = meta["files"]
    names = sorted(files)
    found = describe_files([folder / name for name in names])
    for name in names:
        if found[name] != files[name]:
            return f"{name} is not what was written (SHA-256 differs)"
    for name in names:
        try:
            bad = not_finite_in(folder / name)
        except WeightsError as error:
            return str(error)
        if bad is not None:
            return f"{name} holds values that are not finite, first in {bad}"
    return None


def describe_files(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files by name."""

    def one(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size_bytes": path.stat().st_size, "sha256": sha256}

    with ThreadPool() as pool:
        described = pool.map(one, paths)
    return {path.name: entry for path, entry in zip(paths, described, strict=True)}


def read_training_checkpoint(
    folder: Path,
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, Any]]:
    """(models by entry, the run's resolved config); no tensor is read yet. Raises CheckpointError.

    An entry's tensors have their names in the network. Of a run that trained adapters there are no
    models in a checkpoint, and the error says so.
    """
    settings = settings_of(read_meta(folder))
    if settings.get("model", {}).get("lora_rank"):
        raise CheckpointError(
            f"{folder} holds adapters alone, without the weights below them; use the student that "
            "the finished run exported"
        )
    files = TensorFiles(folder)
    models: dict[str, dict[str, StoredTensor]] = {}
    for key, (shape, dtype) in files.shapes().items():
        for entry, prefix in ENTRIES.items():
            if key.startswith(prefix):
                tensor = StoredTensor(key, shape, dtype, partial(files.read, key))
                models.setdefault(entry, {})[key.removeprefix(prefix)] = tensor
    return {entry: models[entry] for entry in ENTRIES if entry in models}, settings


def _parse_meta(folder: Path) -> dict[str, Any]:
    """CheckpointError unless meta.json is an object with a format version."""
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{META_FILE}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{META_FILE} is not readable ({error!r})") from error
    if not isinstance(meta, dict) or type(meta.get("format_version")) is not int:
        raise CheckpointError(f"{META_FILE} has no format_version")
    return meta


def _split_into_files(sizes: Mapping[str, int]) -> dict[str, int]:
    """Number of the file of each key, from 1: a new one after every FILE_BYTES."""
    numbers = {}
    number = 1
    num_bytes = 0
    for key, size in sizes.items():
        if num_bytes and num_bytes + size > FILE_BYTES:
            number += 1
            num_bytes = 0
        num_bytes += size
        numbers[key] = number
    return numbers


@contextmanager
def _without_warning() -> Iterator[None]:
    """Without DCP's warning that no process group was made, which is not needed."""
    with warnings.catch_warnings():
        message = "torch.distributed is disabled, unavailable or uninitialized"
        warnings.filterwarnings("ignore", message=message)
        yield
