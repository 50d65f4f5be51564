"""Writing weights for others: diffusers' folders, original Wan's, Self-Forcing's .pt, or one file.

Each says the network's sizes, its role and a student's recipe. Bits are kept unless another dtype
is asked for. An export appears whole under its name, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd import __version__
from selfforcing_dfd.common import atomic_file, atomic_folder
from selfforcing_dfd.models.hub import ARCHITECTURE
from selfforcing_dfd.models.identity import STUDENT_ROLES, Identity, Recipe, Role
from selfforcing_dfd.models.picture import takes_picture
from selfforcing_dfd.weights.names import to_wan
from selfforcing_dfd.weights.read import transformer_on_meta
from selfforcing_dfd.weights.recipes import settle_recipe
from selfforcing_dfd.weights.sources import SIZES, WAN_IMAGE_DIM, StoredWeights, read_weights
from selfforcing_dfd.weights.stored import (
    DTYPES,
    INDEX,
    WEIGHTS,
    StoredTensor,
    WeightsError,
    byte_view,
)

FORMATS = ("diffusers", "wan", "self-forcing", "single-file")
FOLDER_FORMATS = ("diffusers", "wan")
CONFIG = "config.json"
EXPORTED = re.compile(
    rf"{re.escape(CONFIG)}|{re.escape(INDEX)}|{WEIGHTS}(-\d{{5}}-of-\d{{5}})?\.safetensors"
)
"""Files of an exported folder: nothing else is ever overwritten."""
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHARD_BYTES = 5 * 10**9
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64  # of the first tensor in a file: what mapped files are read fastest with


@dataclass(frozen=True, slots=True)
class Summary:
    """What was converted into what."""

    source: str
    format: str
    role: Role | None
    recipe: Recipe | None
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
    role: Role | None = None,
    recipe: Mapping[str, Any] | None = None,
    head_dim: int = 0,
    drop_gan_heads: bool = False,
    progress: bool = False,
) -> Summary:
    """Read weights in any format and write them in one of FORMATS.

    dtype: None keeps every bit. role: for sources that do not state theirs. recipe: settings of a
    student's `Recipe` that the source does not state, or that replace what it states; see
    `settle_recipe` for the warnings. Holds one tensor at a time in memory; all of them for
    self-forcing, whose format is written in one go. Raises WeightsError.
    """
    if to not in FORMATS:
        raise WeightsError(f"format is {to!r}; use one of {', '.join(FORMATS)}")
    destination = Path(destination)
    _check_destination(destination, to, overwrite)
    found = source
    if not isinstance(found, StoredWeights):
        found = read_weights(found, entry, drop_gan_heads)
    weights = _with_role(found, role, recipe or {})
    network = transformer_on_meta(weights, head_dim)
    sizes = {name: network.config[name] for name in SIZES}
    named = dict(weights.tensors)
    if to in ("wan", "self-forcing"):
        named = {_wan(name): tensor for name, tensor in named.items()}
    bar = tqdm(unit="B", unit_scale=True, desc=destination.name, disable=None if progress else True)
    outgoing = Outgoing(weights.source, dict(sorted(named.items())), dtype, bar.update)
    bar.total = sum(map(outgoing.num_bytes, named))
    appears = atomic_folder if to in FOLDER_FORMATS else atomic_file
    with bar, appears(destination) as temporary:
        _write(temporary, to, outgoing, sizes, weights, max_shard_bytes)
    num_files = sum(1 for _ in destination.iterdir()) if destination.is_dir() else 1
    return Summary(
        source=weights.source,
        format=weights.format,
        role=weights.role,
        recipe=weights.recipe,
        entries=weights.entries,
        destination=destination,
        num_tensors=len(named),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        num_bytes=bar.total,
        num_files=num_files,
    )


def _with_role(
    weights: StoredWeights, role: Role | None, settings: Mapping[str, Any]
) -> StoredWeights:
    """The weights with the asked role and, for a student, a settled recipe."""
    if role is not None and weights.role not in (None, role):
        raise WeightsError(
            f"{weights.source} says that its role is {weights.role}; leave role {role} out"
        )
    role = weights.role or role
    if role in STUDENT_ROLES:
        recipe = settle_recipe(weights.recipe, settings, role, weights.source)
        return dataclasses.replace(weights, identity=Identity(role, recipe, weights.identity.data))
    if settings:
        raise WeightsError(
            f"{weights.source}: a recipe ({', '.join(settings)}) is asked for, but the role is "
            f"{role or 'not known'}; only students have one: say --role causal_student, or leave "
            "the recipe out"
        )
    return dataclasses.replace(weights, identity=Identity(role, None, weights.identity.data))


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Tensors to be written, by their names in the file.

    dtype: for floating-point tensors; None keeps theirs. tick: called with the number of bytes of
    each tensor that was read.
    """

    source: str
    tensors: Mapping[str, StoredTensor]
    dtype: torch.dtype | None
    tick: Callable[[int], object] = lambda num_bytes: None

    def dtype_of(self, name: str) -> torch.dtype:
        own = self.tensors[name].dtype
        return self.dtype if self.dtype and own.is_floating_point else own

    def num_bytes(self, name: str) -> int:
        return torch.Size(self.tensors[name].shape).numel() * self.dtype_of(name).itemsize

    def read(self, name: str) -> Tensor:
        """Raises WeightsError for values that the dtype cannot hold."""
        tensor = self.tensors[name].read()
        dtype = self.dtype_of(name)
        cast = tensor.to(dtype)
        was_finite = tensor.dtype == dtype or bool(tensor.isfinite().all())
        if tensor.dtype != dtype and was_finite and not bool(cast.isfinite().all()):
            raise WeightsError(
                f"{self.source}: {name} has values up to {tensor.abs().max().item():.3g}, too "
                f"large for {dtype}; use bfloat16 or float32"
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
    """One format's files: in an empty folder, or in a file that does not exist yet."""
    config = diffusers_config(sizes) | weights.identity.notes()
    if to in ("single-file", "self-forcing") and weights.role is None:
        config["_class_name"] = "WanTransformer"  # this package's class, which has any role
    if to == "single-file":
        write_safetensors(place, outgoing, {**weights.about, "config": json.dumps(config)})
    elif to == "self-forcing":
        state = {f"model.{name}": outgoing.read(name) for name in outgoing.tensors}
        # given a path, torch would note its temporary name in the file
        with place.open("wb") as file:
            torch.save({"generator": state, "config": config}, file)
    else:
        if to == "wan":
            config = wan_config(sizes) | weights.identity.notes()
        _write_json(place / CONFIG, config)
        _write_shards(place, outgoing, max_shard_bytes)


def file_metadata(sizes: Mapping[str, Any], identity: Identity) -> dict[str, str]:
    """Metadata of a safetensors file from which `load_network` reads it without any settings.

    sizes: WanTransformer's arguments, such as a network's config; other keys are left out.
    """
    return {"config": json.dumps(network_config(sizes, identity))}


def network_config(sizes: Mapping[str, Any], identity: Identity) -> dict[str, Any]:
    """config.json of a network; sizes as in `file_metadata`."""
    return diffusers_config({name: sizes[name] for name in SIZES}) | identity.notes()


def diffusers_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of diffusers' WanTransformer3DModel, from WanTransformer's arguments."""
    sizes = {**sizes, "patch_size": list(sizes["patch_size"])}
    rest = {**ARCHITECTURE, "rope_max_seq_len": 1024}
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": diffusers.__version__,
        **sizes,
        **rest,
    }


def wan_config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an original Wan folder.

    Settings that Wan leaves out are written where they are not Wan's own.
    """
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "eps": sizes["eps"],
        "ffn_dim": sizes["ffn_dim"],
        "freq_dim": sizes["freq_dim"],
        "in_dim": sizes["in_channels"],
        "model_type": "i2v" if takes_picture(sizes) else "t2v",
        "num_heads": sizes["num_attention_heads"],
        "num_layers": sizes["num_layers"],
        "out_dim": sizes["out_channels"],
        "text_len": 512,
    }
    unusual = {
        "text_dim": (sizes["text_dim"], 4096),
        "patch_size": (list(sizes["patch_size"]), [1, 2, 2]),
        "image_dim": (sizes["image_dim"] or WAN_IMAGE_DIM, WAN_IMAGE_DIM),
    }
    return config | {key: value for key, (value, usual) in unusual.items() if value != usual}


def write_safetensors(path: Path, outgoing: Outgoing, metadata: Mapping[str, str]) -> None:
    """One safetensors file, with one tensor in memory at a time.

    The library's own writer wants all of them at once.
    """
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "selfforcing_dfd": __version__, **metadata}
    }
    start = 0
    # wide dtypes first, so that each tensor is aligned
    order = sorted(outgoing.tensors, key=lambda name: -outgoing.dtype_of(name).itemsize)
    for name in order:
        end = start + outgoing.num_bytes(name)
        header[name] = {
            "dtype": NAMES[outgoing.dtype_of(name)],
            "shape": list(outgoing.tensors[name].shape),
            "data_offsets": [start, end],
        }
        start = end
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
    if len(shards) == 1:
        write_safetensors(folder / f"{WEIGHTS}.safetensors", outgoing.only(shards[0]), {})
        return
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{WEIGHTS}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, outgoing.only(shard), {})
        placed |= dict.fromkeys(shard, file)
    if placed:
        total = sum(map(outgoing.num_bytes, outgoing.tensors))
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _wan(name: str) -> str:
    renamed = to_wan(name)
    assert renamed is not None, name  # the names have been checked
    return renamed


def _check_destination(destination: Path, to: str, overwrite: bool) -> None:
    """Raise WeightsError for a taken place, or one that holds anything but an earlier export."""
    if not destination.exists():
        return
    if not overwrite:
        raise WeightsError(
            f"{destination} exists; name another place, or replace it with overwrite=True "
            "(--overwrite)"
        )
    if destination.is_dir() != (to in FOLDER_FORMATS):
        kind = "folder" if destination.is_dir() else "file"
        raise WeightsError(f"{destination} is a {kind}, which {to} is not; name another place")
    files = sorted(path.name for path in destination.iterdir()) if destination.is_dir() else []
    other = [name for name in files if not EXPORTED.fullmatch(name)]
    if other:
        raise WeightsError(
            f"{destination} holds more than an export: {', '.join(other[:8])}; name another place"
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
