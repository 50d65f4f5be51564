"""Files of tensors, read one tensor at a time: safetensors, folders of them, files of torch.save.

The kind of a file follows from its first bytes, not from its name. Only tensors are unpickled.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfforcing_dfd.common import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that are met in checkpoints."""
META_FILE = "meta.json"  # of a training checkpoint
WEIGHTS = "diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
# first bytes of files
ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
GIT_LFS = b"version https://git-lfs"
# what torch.load raises for files that are cut off, and for damaged ones
END_IS_MISSING = (EOFError, IndexError, struct.error)
UNREADABLE = (
    *END_IS_MISSING,
    BadZipFile,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
FASTGEN_NETWORKS = ("net", "ema", "fake_score", "teacher", "discriminator")


class WeightsError(UserError):
    """Weights that cannot be read or written, or that belong to another model."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that has not been read; `read` gives a contiguous copy on the CPU."""

    key: str  # its name where it is stored
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def is_training_checkpoint(folder: Path) -> bool:
    """Whether a folder is one of this package's own checkpoints."""
    return (folder / META_FILE).is_file()


def stored(key: str, tensor: Tensor) -> StoredTensor:
    """A tensor in memory, or in a mapped file, as if it were stored."""
    return StoredTensor(key, tuple(tensor.shape), tensor.dtype, partial(_copy, tensor.detach()))


def is_torch_file(path: Path) -> bool:
    """Whether a file begins as those of torch.save do, the older kind included.

    A safetensors file may begin with the same byte: of its header's length. Its header follows.
    """
    beginning = _beginning(path)
    return beginning.startswith((ZIP, PICKLE)) and beginning[8:9] != b"{"


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """(tensors by key, metadata) of a file, of which only the header is read.

    Tensors come by plain reads, so none is in memory twice. Raises WeightsError for a truncated
    file, a Git LFS pointer, and anything else that is no safetensors file.
    """
    if _beginning(path).startswith(GIT_LFS):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
        )
    try:
        with safe_open(path, framework="pt"):  # checks the header against the file's size
            pass
    except SafetensorError as error:
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or no safetensors file: {error}. "
            "Fetch or export it again"
        ) from error
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(num_bytes))
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for key, entry in header.items():
        shape = tuple(entry["shape"])
        start = 8 + num_bytes + entry["data_offsets"][0]
        if entry["dtype"] not in DTYPES:
            raise WeightsError(
                f"{path}: {key} has dtype {entry['dtype']}; wanted one of {', '.join(DTYPES)}"
            )
        dtype = DTYPES[entry["dtype"]]
        tensors[key] = StoredTensor(
            key, shape, dtype, partial(_read_span, path, start, shape, dtype)
        )
    return tensors, metadata


def not_finite_in(path: Path) -> str | None:
    """The first tensor of a safetensors file that holds NaN or infinity, None if none does.

    One tensor is in memory at a time. Raises WeightsError like `read_safetensors`.
    """
    for key, tensor in read_safetensors(path)[0].items():
        if tensor.dtype.is_floating_point and not bool(tensor.read().isfinite().all()):
            return key
    return None


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of `diffusion_pytorch_model*.safetensors` in a folder, sharded or not.

    Raises WeightsError for missing shards, shards that disagree with the index, and other files.
    """
    found = sorted(path.name for path in folder.glob(f"{WEIGHTS}*.safetensors"))
    index = folder / INDEX
    if not index.is_file():
        wanted = _whole_set(folder, found)
        placed: dict[str, str] = {}
    else:
        placed = _read_index(index)
        wanted = sorted(set(placed.values()))
    _check_files(folder, wanted, found)
    tensors: dict[str, StoredTensor] = {}
    for name in wanted:
        for key, tensor in read_safetensors(folder / name)[0].items():
            if key in tensors:
                raise WeightsError(
                    f"{folder}: {key} is in two files, one of them {name}; delete or fetch again"
                )
            if placed.get(key, name) != name:
                raise WeightsError(
                    f"{index} puts {key} into {placed[key]}, but it is in {name}; fetch both again"
                )
            tensors[key] = tensor
    if placed and placed.keys() != tensors.keys():
        differing = sorted(placed.keys() ^ tensors.keys())
        raise WeightsError(
            f"{index} and its shards disagree about {len(differing)} tensors, first "
            f"{differing[0]}; fetch them again"
        )
    return tensors


def read_torch_file(path: Path) -> Any:
    """The content of a file of torch.save; tensors are mapped from the file and not read yet.

    Files from before torch 1.6 are read whole. Raises WeightsError for an incomplete file, and for
    content other than tensors and plain values, because unpickling could run it.
    """
    is_zip = _beginning(path).startswith(ZIP)
    if path.suffix == ".safetensors":  # torch.load goes by the name
        raise WeightsError(
            f"{path} is no safetensors file, but one of torch.save; rename it to "
            f"{path.with_suffix('.pt').name}"
        )
    try:
        if is_zip and not is_zipfile(path):
            raise EOFError
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refusal(path, str(error))) from error
    except UNREADABLE as error:
        raise WeightsError(_complaint(path, error)) from error


def _complaint(path: Path, error: Exception) -> str:
    """Why a file cannot be read, and what can be done."""
    num_bytes = path.stat().st_size
    cure = "Download or copy it again"
    if isinstance(error, END_IS_MISSING) or "unexpected EOF" in str(error):
        return f"{path} is incomplete: it has {num_bytes:,} bytes, and its end is missing. {cure}"
    reason = str(error).partition("\n")[0] or type(error).__name__
    return (
        f"{path} ({num_bytes:,} bytes) is damaged or was not written by torch.save: {reason}. "
        f"{cure}"
    )


def _refusal(path: Path, error: str) -> str:
    """Why a pickle was not read, and what can be done."""
    called = re.search(r"GLOBAL ([\w.]+)", error)
    what = f"would call {called[1]}" if called else "needs more than tensors and plain values"
    return (
        f"{path} is refused: to unpickle it {what}, and a pickle that is allowed to call may run "
        "any program. Nothing of it was run. Only tensors are read (torch.load with "
        "weights_only=True). If you do not know who made the file, delete it. If you do, take the "
        "tensors out where they were saved: safetensors.torch.save_file(state_dict, FILE), and "
        "read that"
    )


def _read_index(index: Path) -> dict[str, str]:
    """Shard of each tensor. Names that lead out of the folder are refused."""
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in placed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of shards ({error!r}); fetch it again") from error
    outside = sorted(name for name in names.values() if Path(name).name != name)
    if outside:
        raise WeightsError(
            f"{index} names {outside[0]}, which is not in its folder; do not trust this source"
        )
    return names


def _whole_set(folder: Path, found: list[str]) -> list[str]:
    """Files to read where there is no index: all shards of one set, or the only file."""
    shards = [name for name in found if re.fullmatch(rf"{WEIGHTS}-\d+-of-\d+\.safetensors", name)]
    if not shards:
        if len(found) != 1:
            held = found or sorted(path.name for path in folder.iterdir())[:8]
            names = ", ".join(held) or "nothing"
            raise WeightsError(
                f"{folder} holds {names}; wanted: one {WEIGHTS}.safetensors, or shards with {INDEX}"
            )
        return found
    total = int(shards[0].rpartition("-of-")[2].removesuffix(".safetensors"))
    digits = len(shards[0].removeprefix(f"{WEIGHTS}-").partition("-of-")[0])
    return [
        f"{WEIGHTS}-{i:0{digits}d}-of-{total:0{digits}d}.safetensors" for i in range(1, total + 1)
    ]


def _check_files(folder: Path, wanted: list[str], found: list[str]) -> None:
    missing = sorted(set(wanted) - set(found))
    beside = sorted(set(found) - set(wanted))
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} of {len(wanted)} shards are missing, first {missing[0]}; "
            "fetch the folder again (hf download continues where it stopped)"
        )
    if beside:
        raise WeightsError(
            f"{folder} holds {', '.join(beside)} besides the {len(wanted)} files of one set of "
            "weights; move it away, or name the one file that you want"
        )


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32)


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _read_span(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One tensor's bytes straight into its memory: a mapped file would stay in memory beside it."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    rest = byte_view(tensor)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while len(rest):
            num_read = file.readinto(rest)
            if not num_read:
                raise WeightsError(
                    f"{path} became shorter while it was read; fetch or export it again"
                )
            rest = rest[num_read:]
    return tensor


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def models_in(content: Any, path: Path) -> dict[str, Mapping[str, Any]]:
    """The state dicts in what torch.save wrote, by entry; a bare state dict has the entry "".

    FastGen keeps its models one level deeper, in `model`: as {"net": state dict, ...}, or as one
    state dict with the names `net.` ..., `fake_score.` .... Their entries are net, fake_score ....
    Raises WeightsError for content without tensors.
    """
    if isinstance(content, Mapping):
        entries = {str(name): value for name, value in content.items() if _has_tensors(value)}
        nested = content.get("model")
        if isinstance(nested, Mapping):
            entries |= {str(name): value for name, value in nested.items() if _has_tensors(value)}
            parts = _split_by_network(nested)
            if parts:
                entries.pop("model", None)
                entries |= parts
        if entries:
            return entries
        if _has_tensors(content):
            return _split_by_network(content) or {"": content}
    held = type(content).__name__
    if isinstance(content, Mapping):
        held = f"a dict of {', '.join(map(str, list(content)[:8]))}"
    raise WeightsError(
        f"{path} holds {held}; wanted: a state dict, or a dict of state dicts such as 'generator'"
    )


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _split_by_network(state: Mapping[Any, Any]) -> dict[str, Mapping[str, Any]]:
    """The networks of FastGen in one state dict; empty unless every key begins with one of them."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        network, _, rest = str(key).partition(".")
        if network not in FASTGEN_NETWORKS or not rest:
            return {}
        parts.setdefault(network, {})[rest] = value
    return dict(parts)
