"""Models inside a training checkpoint (torch.distributed.checkpoint, written by
training/checkpoint.py), from any number of ranks, read one tensor at a time and without running
what its pickled index might call.
"""

from __future__ import annotations

import io
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from selfforcing_dfd.weights.stored import StoredTensor, WeightsError

META_FILE, INDEX = "meta.json", ".metadata"
ENTRIES = {"ema": "ema.shadow.", "student": "student.", "fake": "fake."}
"""Models of a checkpoint and what their tensors' keys begin with; the first is what a finished run
exports.
"""
ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": (
        "Size",
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "uint8",
        "bool",
    ),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}
"""All that an index of tensors is made of."""


class IndexUnpickler(pickle.Unpickler):
    """Reads a checkpoint's index, and refuses whatever else a pickle could name."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def is_training_checkpoint(folder: Path) -> bool:
    return (folder / META_FILE).is_file() and (folder / INDEX).is_file()


def read_training_checkpoint(
    folder: Path,
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, Any]]:
    """(models by entry, the run's resolved config). Raises WeightsError for a damaged or foreign
    index.
    """
    try:
        settings = (
            yaml.safe_load(
                json.loads((folder / META_FILE).read_text(encoding="utf-8"))["config_yaml"]
            )
            or {}
        )
        index = IndexUnpickler(io.BytesIO((folder / INDEX).read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{folder / INDEX} is refused, it is no index of tensors: {error}"
        ) from error
    except (ValueError, KeyError, EOFError, yaml.YAMLError) as error:
        raise WeightsError(
            f"{folder} is no complete training checkpoint ({error!r}); use the one before it"
        ) from error
    if not isinstance(index, Metadata) or not isinstance(settings, dict):
        raise WeightsError(f"{folder} is no training checkpoint of this package; use a whole one")
    return {
        name: models for name in ENTRIES if (models := _tensors(folder, index, ENTRIES[name]))
    }, settings


def _tensors(folder: Path, index: Metadata, prefix: str) -> dict[str, StoredTensor]:
    """One model's tensors by their names in the network."""
    places = {
        (place.fqn, tuple(place.offset or ())): info for place, info in index.storage_data.items()
    }
    tensors = {}
    for key, entry in index.state_dict_metadata.items():
        if not key.startswith(prefix) or not isinstance(entry, TensorStorageMetadata):
            continue
        chunks = [
            (tuple(c.offsets), tuple(c.sizes), places[key, tuple(c.offsets)]) for c in entry.chunks
        ]
        shape, dtype = tuple(entry.size), entry.properties.dtype
        read = partial(_read_chunks, folder, key, shape, dtype, chunks)
        tensors[key.removeprefix(prefix)] = StoredTensor(key, shape, dtype, read)
    return tensors


def _read_chunks(
    folder: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype, chunks: list[Any]
) -> Tensor:
    """A tensor put together from the pieces that the ranks wrote."""
    whole = torch.empty(shape, dtype=dtype, device="cpu")
    for offsets, sizes, place in chunks:
        path = folder / place.relative_path
        if Path(place.relative_path).name != place.relative_path:
            raise WeightsError(
                f"{folder / INDEX} names {place.relative_path}, which is not in its folder"
            )
        with path.open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        try:
            piece = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise WeightsError(f"{path}: {key} is damaged; use the checkpoint before it") from error
        target = whole
        for axis, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
            target = target.narrow(axis, start, size)
        target.copy_(piece)
    return whole
