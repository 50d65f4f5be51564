"""Finding a Wan transformer in a file or folder of any format, with diffusers' names."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.models.hub import ARCHITECTURE
from selfforcing_dfd.models.identity import (
    ROLE,
    STUDENT_CLASSES,
    TEACHER_CLASSES,
    Identity,
    Recipe,
    Role,
    identity_of,
)
from selfforcing_dfd.weights.eight_bits import from_8_bits
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
    is_training_checkpoint,
    models_in,
    read_folder,
    read_safetensors,
    read_torch_file,
    stored,
)

logger = logging.getLogger(__name__)

PREFERRED = ("generator_ema", "generator", "model", "ema", "net")
"""Of a file with several models the first of these is read unless another one is asked for."""
ENTRY_ROLES: dict[str, Role] = {
    "generator": "causal_student",
    "generator_ema": "causal_student",
    "critic": "fake_score",
    "fake_score": "fake_score",
    "teacher": "teacher",
}
"""Roles of the entries of Self-Forcing's files and of FastGen's."""
FOLDERS = ("diffusers folder", "original Wan folder")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODEL_TYPES = ("t2v", "i2v")
WAN_IMAGE_DIM = 1280
"""Width of the states of Wan's image encoder, which its own configs do not state."""
WAN_SETTINGS = {"window_size": [-1, -1], "qk_norm": True, "cross_attn_norm": True}
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
    "image_dim",
    "added_kv_proj_dim",
)
"""WanTransformer's arguments."""
DECODER_CLASS = "SmallDecoder"
"""Class in the config of a small decoder's file, which `decoders` reads."""
NUM_SHOWN = 8
FILE_KEYS = ("format", "selfforcing_dfd", "config")  # metadata that every file of ours has
FETCH = (
    "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir DIR fetches Wan2.1, "
    "hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir DIR "
    "a Self-Forcing student"
)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """One network's weights before they are read, by diffusers' names; unknown tensors keep theirs.

    config: the WanTransformer arguments that the source states beside its tensors; may be empty.
    identity: role, recipe and data, as far as stated. about: other notes of a safetensors file.
    """

    source: str  # path, and entry where there are several
    format: str  # in words
    layout: Layout  # whose names the source uses
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    identity: Identity = field(default_factory=Identity)
    entries: tuple[str, ...] = ()  # all that the source holds, the one that was read first
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def is_folder(self) -> bool:
        """Whether they come from a folder with a config.json, which can say what they are."""
        return self.format in FOLDERS

    @property
    def role(self) -> Role | None:
        return self.identity.role

    @property
    def recipe(self) -> Recipe | None:
        return self.identity.recipe


def read_weights(
    source: Path | str, entry: str = "", drop_gan_heads: bool = False
) -> StoredWeights:
    """Place, shape and name of every tensor of a source; no tensor is read yet.

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
            f"{path} has no config.json and no folder transformer, but {names}; name the weights "
            "in it"
        )
    raw = _read_json(folder / "config.json")
    name = raw.get("_class_name")
    if name not in (*TEACHER_CLASSES, *STUDENT_CLASSES, "WanTransformer"):
        raise WeightsError(
            f"{folder} holds {name}; wanted: WanTransformer3DModel, or WanModel of original Wan"
        )
    _refuse_entry(path, entry)
    layout: Layout = "wan" if name in ("WanModel", *STUDENT_CLASSES) else "diffusers"
    kind = FOLDERS[1] if layout == "wan" else FOLDERS[0]
    weights = _named(str(folder), kind, read_folder(folder), raw, drop_gan_heads)
    if weights.layout != layout:
        raise WeightsError(
            f"{folder}: config.json is of a {name}, but the tensors have names of the other kind; "
            "use the config.json that belongs to them"
        )
    return weights


def _read_file(path: Path, entry: str, drop_gan_heads: bool) -> StoredWeights:
    """A safetensors file; its config is in its metadata, or beside it (diffusers, Wan)."""
    if is_torch_file(path):
        return _read_torch(path, entry, drop_gan_heads)
    _refuse_entry(path, entry)
    raw, metadata = read_safetensors(path)
    config = _parse(metadata["config"], path) if "config" in metadata else {}
    beside = path.with_name("config.json")
    if not config and path.name.startswith(WEIGHTS) and beside.is_file():
        config = _read_json(beside)
    if config.get("_class_name") == DECODER_CLASS:
        raise WeightsError(
            f"{path} is a small decoder and no transformer; name it by --decoder-weights"
        )
    weights = _named(str(path), "safetensors file", from_8_bits(raw), config, drop_gan_heads)
    about = {key: value for key, value in metadata.items() if key not in FILE_KEYS}
    return dataclasses.replace(weights, about=about)


def _read_torch(path: Path, entry: str, drop_gan_heads: bool) -> StoredWeights:
    content = read_torch_file(path)
    models = models_in(content, path)
    name, entries = _choose(path, entry, tuple(models))
    model = models[name]
    for key, value in model.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"{path}: {name or 'the state dict'} holds {key}, which is no tensor; take it out"
            )
    config: Mapping[str, Any] = {ROLE: ENTRY_ROLES[name]} if name in ENTRY_ROLES else {}
    stated = content.get("config")
    if isinstance(stated, Mapping) and "_class_name" in stated:  # as our own exports have it
        config = stated
    raw = {key: stored(key, tensor) for key, tensor in model.items()}
    where = f"{path} (entry {name})" if name else str(path)
    return _named(where, "torch file", raw, config, drop_gan_heads, entries)


def _read_checkpoint(folder: Path, entry: str) -> StoredWeights:
    """One of our training checkpoints; its settings hold each network's config."""
    # torch's checkpoints take a second to import
    from selfforcing_dfd.weights.checkpoint_files import read_training_checkpoint

    models, settings = read_training_checkpoint(folder)
    name, entries = _choose(folder, entry, tuple(models))
    networks = settings.get("networks", {})
    config = networks.get("fake" if name == "fake" else "student", {})
    where = f"{folder} (entry {name})"
    return _named(where, "training checkpoint", models[name], config, False, entries)


def _choose(path: Path, entry: str, entries: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The entry to read, and all of them with that one first.

    Raises WeightsError for one that is not there, and where it is not clear which one is wanted.
    """
    held = ", ".join(entries)
    if entry and entry not in entries:
        what = f"it holds {held}" if held else "it holds one model"
        raise WeightsError(f"{path} has no entry {entry!r}; {what}")
    chosen = entry or next((name for name in PREFERRED if name in entries), None)
    if len(entries) == 1:
        chosen = entries[0]
    if chosen is None:
        raise WeightsError(
            f"{path} holds {held or 'no model'}; say which with entry=NAME "
            "(--entry NAME for convert)"
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
    """Raw tensors under diffusers' names.

    Raises WeightsError for keys that collide, that belong to no Wan, or that follow two layouts.
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
            f"{source} mixes names of original Wan ({layouts['wan'][0]}) and of diffusers "
            f"({layouts['diffusers'][0]}); convert one of the two models first"
        )
    layout: Layout = "wan" if layouts["wan"] else "diffusers"
    tensors = bare
    if layout == "wan":
        tensors = {to_diffusers(name) or name: tensor for name, tensor in bare.items()}
    other = next((name for name, tensor in tensors.items() if tensor.dtype not in FLOATS), None)
    if other:
        raise WeightsError(
            f"{source}: {tensors[other].key} is {tensors[other].dtype}: quantised, which is not "
            "supported; use weights in bfloat16, float16 or float32"
        )
    sizes = _stated_sizes(config, source)
    return StoredWeights(source, kind, layout, tensors, sizes, identity_of(config), entries)


def _stated_sizes(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """WanTransformer's arguments in a config of either layout.

    Raises WeightsError for another architecture.
    """
    is_wan = "dim" in config
    wanted = WAN_SETTINGS if is_wan else ARCHITECTURE
    other = {key: config[key] for key, value in wanted.items() if config.get(key, value) != value}
    if config.get("model_type", "t2v") not in MODEL_TYPES:
        other["model_type"] = config["model_type"]
    if other:
        raise WeightsError(
            f"{source}: config.json says {other}; wanted Wan2.1 for text-to-video or "
            f"image-to-video, that is {wanted}"
        )
    stated = dict(config)
    if is_wan:
        stated = {SIZES_IN_WAN.get(key, key): value for key, value in config.items()}
        if stated.get("num_attention_heads"):
            stated["attention_head_dim"] = config["dim"] // stated["num_attention_heads"]
        stated |= _picture_sizes(config)
    if "patch_size" in stated:
        stated["patch_size"] = tuple(stated["patch_size"])
    return {key: stated[key] for key in SIZES if key in stated}


def _picture_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model type of original Wan says about the parts for a picture."""
    if "model_type" not in config:
        return {}
    if config["model_type"] != "i2v":
        return {"image_dim": None, "added_kv_proj_dim": None}
    return {"image_dim": config.get("image_dim", WAN_IMAGE_DIM), "added_kv_proj_dim": config["dim"]}


def describe_extras(keys: Iterable[str]) -> str:
    """What is known about additional tensors, ready to be appended to a message."""
    found = extras_in(keys)
    return "".join(f"; {len(n)} {extra.name} tensors: {extra.advice}" for extra, n in found.items())


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a transformer's folder or of its subfolder `transformer`; {} without one."""
    for path in (Path(folder) / "config.json", Path(folder) / "transformer" / "config.json"):
        if path.is_file():
            return _read_json(path)
    return {}


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
