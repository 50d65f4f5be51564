"""Finding a Wan transformer in a file or folder of any kind: which models it holds, and every
tensor under one name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.models.hub import (
    ARCHITECTURE,
    CAUSAL,
    RECIPE,
    STUDENT_CLASSES,
    TEACHER_CLASSES,
    Role,
    role_of,
)
from selfforcing_dfd.weights.checkpoint_files import (
    is_training_checkpoint,
    read_training_checkpoint,
)
from selfforcing_dfd.weights.names import (
    Layout,
    Shape,
    extras_in,
    is_gan_head,
    layouts_in,
    to_diffusers,
    unwrap,
)
from selfforcing_dfd.weights.stored import (
    WEIGHTS,
    StoredTensor,
    WeightsError,
    is_torch_file,
    models_in,
    read_folder,
    read_safetensors,
    read_torch_file,
    stored,
)

logger = logging.getLogger(__name__)

PREFERRED = ("generator_ema", "generator", "model", "ema")
"""Which model of a file with several is read where none is asked for: the first of these that is
there.
"""
ENTRY_ROLES: dict[str, Role] = {
    "generator": "student",
    "generator_ema": "student",
    "critic": "teacher",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WAN_SETTINGS = {
    "model_type": "t2v",
    "window_size": [-1, -1],
    "qk_norm": True,
    "cross_attn_norm": True,
}
SIZES_IN_WAN = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_heads": "num_attention_heads",
}
SIZES = (
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "eps",
)
"""WanTransformer's arguments."""
NUM_SHOWN = 8
FETCH = (
    "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir DIR fetches Wan2.1, "
    "hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir DIR a Self-Forcing student"
)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """One network's weights that have not been read, by diffusers' names; unknown tensors keep
    their own.

    config: the WanTransformer arguments that the source tells besides its tensors; it may be empty.
    """

    source: str  # path, and entry where there are several
    kind: str  # in words
    layout: Layout  # whose names the source uses
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    role: Role = "unknown"
    recipe: Mapping[str, Any] | None = None
    entries: tuple[str, ...] = ()  # all that the source holds, the one that was read first

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def notes(self) -> dict[str, Any]:
        """What a config says of the weights' meaning, see models/hub.py."""
        told = {} if self.role == "unknown" else {CAUSAL: self.role == "student"}
        return told | ({RECIPE: dict(self.recipe)} if self.recipe else {})


def read_weights(
    source: Path | str, entry: str = "", drop_gan_heads: bool = False
) -> StoredWeights:
    """Where every tensor of a source is, what its shape is and what it is called here; no tensor is
    read yet.

    entry: which model of a source with several; by default the first of PREFERRED. drop_gan_heads:
    leave those of a Self-Forcing critic out. Raises WeightsError for a source that is missing,
    damaged, refused or no Wan transformer.
    """
    path = Path(source)
    if not path.exists():
        raise WeightsError(f"{path} does not exist; wanted: a folder or file of weights. {FETCH}")
    if path.is_file():
        return _read_file(path, entry, drop_gan_heads)
    if is_training_checkpoint(path):
        return _read_checkpoint(path, entry)
    folder = path if (path / "config.json").is_file() else path / "transformer"
    if not (folder / "config.json").is_file():
        names = ", ".join(sorted(child.name for child in path.iterdir())[:NUM_SHOWN]) or "nothing"
        raise WeightsError(
            f"{path} has no config.json and no folder transformer, but {names}; name the weights in it"
        )
    raw = _read_json(folder / "config.json")
    name = raw.get("_class_name")
    if name not in (*TEACHER_CLASSES, *STUDENT_CLASSES, "WanTransformer"):
        raise WeightsError(
            f"{folder} holds {name}; wanted: WanTransformer3DModel, or WanModel of original Wan"
        )
    _refuse_entry(path, entry)
    layout: Layout = "wan" if name in ("WanModel", *STUDENT_CLASSES) else "diffusers"
    kind = "original Wan folder" if layout == "wan" else "diffusers folder"
    weights = _named(str(folder), kind, read_folder(folder), raw, drop_gan_heads)
    if weights.layout != layout:
        raise WeightsError(
            f"{folder}: config.json is of a {name}, but the tensors have names of the other kind; fix one"
        )
    return weights


def _read_file(path: Path, entry: str, drop_gan_heads: bool) -> StoredWeights:
    """A safetensors file. Where it says nothing of its sizes, the config.json beside diffusers' and
    Wan's files does.
    """
    if is_torch_file(path):
        return _read_torch(path, entry, drop_gan_heads)
    _refuse_entry(path, entry)
    raw, metadata = read_safetensors(path)
    config = _parse(metadata["config"], path) if "config" in metadata else {}
    beside = path.with_name("config.json")
    if not config and path.name.startswith(WEIGHTS) and beside.is_file():
        config = _read_json(beside)
    return _named(str(path), "safetensors file", raw, config, drop_gan_heads)


def _read_torch(path: Path, entry: str, drop_gan_heads: bool) -> StoredWeights:
    content = read_torch_file(path)
    models = models_in(content, path)
    name, entries = _choose(path, entry, tuple(models))
    model = models[name]
    wrong = [
        str(key)
        for key, value in model.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor))
    ]
    if wrong:
        raise WeightsError(
            f"{path}: {name or 'the state dict'} holds {wrong[0]}, which is no tensor; take it out"
        )
    config: Mapping[str, Any] = (
        {CAUSAL: ENTRY_ROLES[name] == "student"} if name in ENTRY_ROLES else {}
    )
    told = content.get("config")
    if isinstance(told, Mapping) and "_class_name" in told:  # our own exports say it themselves
        config = told
    raw = {key: stored(key, tensor) for key, tensor in model.items()}
    where = f"{path} (entry {name})" if name else str(path)
    return _named(where, "torch file", raw, config, drop_gan_heads, entries)


def _read_checkpoint(folder: Path, entry: str) -> StoredWeights:
    models, settings = read_training_checkpoint(folder)
    name, entries = _choose(folder, entry, tuple(models))
    model, stage = settings.get("model", {}), settings.get("run", {}).get("stage")
    told = {
        "num_attention_heads": model.get("num_heads"),
        "attention_head_dim": model.get("head_dim"),
    }
    config = {key: value for key, value in told.items() if value} | {
        CAUSAL: stage != "teacher" and name != "fake"
    }
    return _named(
        f"{folder} (entry {name})", "training checkpoint", models[name], config, False, entries
    )


def _choose(path: Path, entry: str, entries: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The entry to read, and all of them with that one first. Raises WeightsError for one that is
    not there.
    """
    held = ", ".join(entries)
    if entry and entry not in entries:
        raise WeightsError(
            f"{path} has no entry {entry!r}; "
            + (f"it holds {held}" if held else "it holds one model")
        )
    chosen = entry or (
        entries[0] if len(entries) == 1 else next((n for n in PREFERRED if n in entries), None)
    )
    if chosen is None:
        raise WeightsError(
            f"{path} holds {held or 'no model'}; say which with entry=NAME (--entry NAME for convert)"
        )
    if len(entries) > 1 and not entry:
        logger.info("%s holds %s; %s is read", path, held, chosen)
    return chosen, (chosen, *(name for name in entries if name != chosen))


def _named(
    source: str,
    kind: str,
    raw: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    drop_gan_heads: bool,
    entries: tuple[str, ...] = (),
) -> StoredWeights:
    """Raw tensors under diffusers' names. Raises WeightsError where keys collide, or are of no Wan,
    or of two kinds.
    """
    bare: dict[str, StoredTensor] = {}
    for key, tensor in raw.items():
        name = unwrap(key)
        if name in bare:
            raise WeightsError(
                f"{source}: {bare[name].key} and {key} are both {name}; keep one of them"
            )
        if not (drop_gan_heads and is_gan_head(name)):
            bare[name] = tensor
    layouts = layouts_in(bare)
    if not any(layouts.values()):
        first = ", ".join(list(bare)[:3]) or "nothing"
        raise WeightsError(
            f"{source} holds no Wan transformer: its tensors are {first} ...{describe_extras(bare)}"
        )
    if all(layouts.values()):
        raise WeightsError(
            f"{source} mixes names of original Wan ({layouts['wan'][0]}) and of diffusers ({layouts['diffusers'][0]}); "
            "convert one of the two models first"
        )
    layout: Layout = "wan" if layouts["wan"] else "diffusers"
    tensors = {
        (to_diffusers(name) or name) if layout == "wan" else name: tensor
        for name, tensor in bare.items()
    }
    other = next((name for name, tensor in tensors.items() if tensor.dtype not in FLOATS), None)
    if other:
        raise WeightsError(
            f"{source}: {tensors[other].key} is {tensors[other].dtype}: quantised, which is not supported; use weights in "
            "bfloat16, float16 or float32"
        )
    sizes = _told_sizes(config, source)
    return StoredWeights(
        source, kind, layout, tensors, sizes, role_of(config), config.get(RECIPE), entries
    )


def _told_sizes(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What a config of either kind says of WanTransformer's arguments. Raises WeightsError for
    another architecture.
    """
    is_wan = "dim" in config
    wanted = WAN_SETTINGS if is_wan else ARCHITECTURE
    other = {
        key: config[key] for key, value in wanted.items() if key in config and config[key] != value
    }
    if (
        "i2v" in str(config.get("model_type"))
        or config.get("image_dim")
        or config.get("added_kv_proj_dim")
    ):
        raise WeightsError(
            f"{source}: {other}: image-to-video, which is not supported; use text-to-video (Wan2.1 T2V)"
        )
    if other:
        raise WeightsError(
            f"{source}: config.json says {other}; wanted text-to-video Wan2.1, that is {wanted}"
        )
    told = (
        {SIZES_IN_WAN.get(key, key): value for key, value in config.items()}
        if is_wan
        else dict(config)
    )
    if is_wan and told.get("num_attention_heads"):
        told["attention_head_dim"] = config["dim"] // told["num_attention_heads"]
    if "patch_size" in told:
        told["patch_size"] = tuple(told["patch_size"])
    return {key: told[key] for key in SIZES if key in told}


def describe_extras(keys: Iterable[str]) -> str:
    """What is known of additional tensors, ready to be appended."""
    return "".join(
        f"; {len(found)} {extra.name} tensors: {extra.advice}"
        for extra, found in extras_in(keys).items()
    )


def _refuse_entry(path: Path, entry: str) -> None:
    if entry:
        raise WeightsError(f"{path} holds one model; leave entry {entry!r} out")


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(path.read_text(encoding="utf-8"), path)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{path}: its config is no JSON ({error}); fetch it again") from error
    if not isinstance(parsed, dict):
        raise WeightsError(
            f"{path}: its config is a {type(parsed).__name__}; wanted: a JSON object"
        )
    return parsed
