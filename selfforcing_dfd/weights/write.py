"""Writing weights for others: diffusers' folders, original Wan's, Self-Forcing's .pt, and one file
with everything.

Bits are kept unless another dtype is asked for. An export appears whole under its name, or not at
all.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd import __version__
from selfforcing_dfd.common import sync
from selfforcing_dfd.models.hub import ARCHITECTURE, Role
from selfforcing_dfd.weights.names import to_wan
from selfforcing_dfd.weights.read import meta_network
from selfforcing_dfd.weights.sources import SIZES, StoredWeights, read_weights
from selfforcing_dfd.weights.stored import (
    DTYPES,
    INDEX,
    WEIGHTS,
    StoredTensor,
    WeightsError,
    byte_view,
)

FORMATS = ("diffusers", "wan", "self-forcing", "single-file")
CONFIG = "config.json"
EXPORTED = re.compile(
    rf"{re.escape(CONFIG)}|{re.escape(INDEX)}|{WEIGHTS}(-\d{{5}}-of-\d{{5}})?\.safetensors"
)
"""Files of an exported folder: nothing else is ever overwritten."""
UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
SHARD_BYTES = 5 * 10**9
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64  # of the first tensor in a file: what mapped files are read fastest with


@dataclass(frozen=True, slots=True)
class Summary:
    """What was converted into what."""

    source: str
    kind: str
    role: Role
    entries: tuple[str, ...]  # of the source, the one that was read first
    destination: Path
    num_tensors: int
    num_parameters: int
    num_bytes: int
    num_files: int


def convert(
    source: Path | str | StoredWeights,
    destination: Path | str,
    to: str,
    *,
    entry: str = "",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    role: Role = "unknown",
    head_dim: int = 0,
    drop_gan_heads: bool = False,
    progress: bool = False,
) -> Summary:
    """Read weights in any format and write them in one of FORMATS.

    dtype: None keeps every bit. role: for sources that do not tell whether they hold a student or a
    teacher. Holds one tensor at a time in memory; all of them for self-forcing, whose format is
    written in one go. Raises WeightsError.
    """
    if to not in FORMATS:
        raise WeightsError(f"format is {to!r}; use one of {', '.join(FORMATS)}")
    destination = Path(destination)
    _check_destination(destination, to, overwrite)
    weights = (
        source if isinstance(source, StoredWeights) else read_weights(source, entry, drop_gan_heads)
    )
    if role != "unknown" and weights.role not in ("unknown", role):
        raise WeightsError(
            f"{weights.source} says that it holds a {weights.role}; leave role {role} out"
        )
    weights = dataclasses.replace(weights, role=role if weights.role == "unknown" else weights.role)
    network = meta_network(weights, head_dim)
    sizes = {name: network.config[name] for name in SIZES}
    bar = tqdm(unit="B", unit_scale=True, desc=destination.name, disable=None if progress else True)
    named = {
        _wan(name) if to in ("wan", "self-forcing") else name: t
        for name, t in weights.tensors.items()
    }
    outgoing = Outgoing(weights.source, dict(sorted(named.items())), dtype, bar.update)
    bar.total = sum(map(outgoing.num_bytes, named))
    with bar, _whole(destination, overwrite) as temporary:
        _write(temporary, to, outgoing, sizes, weights, max_shard_bytes)
        _sync_all(temporary)
    num_files = sum(1 for _ in destination.iterdir()) if destination.is_dir() else 1
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    found = (weights.source, weights.kind, weights.role, weights.entries)
    return Summary(
        *found,
        destination,
        len(named),
        num_parameters,
        sum(map(outgoing.num_bytes, named)),
        num_files,
    )


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Tensors on their way into files, by their names there; dtype None keeps theirs. tick: told of
    bytes that are read.
    """

    source: str
    tensors: Mapping[str, StoredTensor]
    dtype: torch.dtype | None
    tick: Callable[[int], object]

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype or self.tensors[name].dtype

    def num_bytes(self, name: str) -> int:
        return torch.Size(self.tensors[name].shape).numel() * self.dtype_of(name).itemsize

    def read(self, name: str) -> Tensor:
        """Raises WeightsError for values that the dtype cannot hold."""
        tensor, dtype = self.tensors[name].read(), self.dtype_of(name)
        cast = tensor.to(dtype)
        if (
            tensor.dtype != dtype
            and bool(tensor.isfinite().all())
            and not bool(cast.isfinite().all())
        ):
            raise WeightsError(
                f"{self.source}: {name} has values up to {tensor.abs().max().item():.3g}, too large for {dtype}; use "
                "bfloat16 or float32"
            )
        self.tick(cast.nbytes)
        return cast

    def only(self, names: list[str]) -> Outgoing:
        return dataclasses.replace(self, tensors={name: self.tensors[name] for name in names})


def _write(
    place: Path,
    to: str,
    outgoing: Outgoing,
    sizes: Mapping[str, Any],
    weights: StoredWeights,
    max_shard_bytes: int,
) -> None:
    """One format's files at a place that does not exist yet. A student is noted as one; a teacher
    is by its class's name.
    """
    notes = weights.notes if weights.role == "student" else {}
    config = diffusers_config(sizes) | notes
    if to in ("single-file", "self-forcing") and weights.role == "unknown":
        config["_class_name"] = "WanTransformer"  # ours, which may be either
    if to == "single-file":
        write_safetensors(place, outgoing, {"config": json.dumps(config)})
    elif to == "self-forcing":
        state = {f"model.{name}": outgoing.read(name) for name in outgoing.tensors}
        # given a path, torch would note its temporary name in the file
        with place.open("wb") as file:
            torch.save({"generator": state, "config": config}, file)
    else:
        place.mkdir()
        _write_json(place / CONFIG, config if to == "diffusers" else wan_config(sizes) | notes)
        _write_shards(place, outgoing, max_shard_bytes)


def diffusers_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of diffusers' WanTransformer3DModel, from WanTransformer's arguments."""
    sizes = {**sizes, "patch_size": list(sizes["patch_size"])}
    rest = {**ARCHITECTURE, "pos_embed_seq_len": None, "rope_max_seq_len": 1024}
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": diffusers.__version__,
        **sizes,
        **rest,
    }


def wan_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an original Wan folder; settings that Wan leaves out are written where they
    are not Wan's own.
    """
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "eps": sizes["eps"],
        "ffn_dim": sizes["ffn_dim"],
        "freq_dim": sizes["freq_dim"],
        "in_dim": sizes["in_channels"],
        "model_type": "t2v",
        "num_heads": sizes["num_attention_heads"],
        "num_layers": sizes["num_layers"],
        "out_dim": sizes["out_channels"],
        "text_len": 512,
    }
    unusual = {
        "text_dim": (sizes["text_dim"], 4096),
        "patch_size": (list(sizes["patch_size"]), [1, 2, 2]),
    }
    return config | {key: value for key, (value, usual) in unusual.items() if value != usual}


def write_safetensors(path: Path, outgoing: Outgoing, metadata: Mapping[str, str]) -> None:
    """One safetensors file, with one tensor in memory at a time (the library's writer wants them
    all).
    """
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "selfforcing_dfd": __version__, **metadata}
    }
    end = 0
    # so that each is aligned
    order = sorted(outgoing.tensors, key=lambda name: -outgoing.dtype_of(name).itemsize)
    for name in order:
        start, end = end, end + outgoing.num_bytes(name)
        kind, shape = NAMES[outgoing.dtype_of(name)], list(outgoing.tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(byte_view(outgoing.read(name)))


def parse_bytes(text: str) -> int:
    """5GB, 500MB, 2GiB or a plain number. Raises WeightsError for anything else and for nothing."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?I?B?)", text.strip().upper())
    num_bytes = int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
    if num_bytes < 1:
        raise WeightsError(
            f"size is {text!r}; want a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB"
        )
    return num_bytes


def _write_shards(folder: Path, outgoing: Outgoing, max_shard_bytes: int) -> None:
    """`diffusion_pytorch_model.safetensors`, or shards of at most max_shard_bytes with their index.

    A tensor that is larger gets a shard of its own.
    """
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name in outgoing.tensors:
        if shards[-1] and num_bytes + outgoing.num_bytes(name) > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += outgoing.num_bytes(name)
    files = [
        f"{WEIGHTS}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        files = [f"{WEIGHTS}.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, outgoing.only(shard), {})
    if len(shards) > 1:
        placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(map(outgoing.num_bytes, outgoing.tensors))
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _wan(name: str) -> str:
    renamed = to_wan(name)
    assert renamed is not None, name  # the names have been checked
    return renamed


def _check_destination(destination: Path, to: str, overwrite: bool) -> None:
    """Raise WeightsError for a place that is taken, or that holds anything but an earlier export."""
    if not destination.exists():
        return
    if not overwrite:
        raise WeightsError(
            f"{destination} exists; name another place, or replace it with overwrite=True (--overwrite)"
        )
    if destination.is_dir() != (to in ("diffusers", "wan")):
        kind = "folder" if destination.is_dir() else "file"
        raise WeightsError(f"{destination} is a {kind}, which {to} is not; name another place")
    other = (
        sorted(p.name for p in destination.iterdir() if not EXPORTED.fullmatch(p.name))
        if destination.is_dir()
        else []
    )
    if other:
        raise WeightsError(
            f"{destination} holds more than an export: {', '.join(other[:8])}; name another place"
        )


@contextmanager
def _whole(destination: Path, overwrite: bool) -> Iterator[Path]:
    """A name beside the destination to write to, which takes the destination's at the end; removed
    when that fails.

    A folder that is replaced steps aside for a moment and is put back if the new one cannot take
    its place.
    """
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = (
        destination.with_name(f".tmp-{kind}{destination.name}") for kind in ("", "old-")
    )
    _remove(temporary)
    try:
        yield temporary
        if destination.exists() and not overwrite:
            raise WeightsError(f"{destination} has appeared meanwhile; name another place")
        if not destination.is_dir():
            temporary.replace(destination)
        else:
            _remove(aside)
            destination.rename(aside)
            try:
                temporary.rename(destination)
            except OSError:
                aside.rename(destination)
                raise
            _remove(aside)
        sync(destination.parent)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync_all(path: Path) -> None:
    for file in sorted(path.iterdir()) if path.is_dir() else []:
        sync(file)
    sync(path)
