"""From files or a size's name to a model that streams: a Wan folder with a student, a run's folder,
or random weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from omegaconf import OmegaConf
from torch import Tensor, nn

from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.common import DTYPES, find_device, shipped
from selfforcing_dfd.config import ConfigError, ModelConfig, find_file, load_config, require
from selfforcing_dfd.models.hub import (
    mark_student,
    read_config,
    recipe_of,
    require_student,
    role_of,
)
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.streaming.session import StreamModel, StreamSettings
from selfforcing_dfd.tiny.codec import SPACE, TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, parse_caption
from selfforcing_dfd.training.build import build_ladder, build_network, load_network, student_of
from selfforcing_dfd.training.build_data import codec_file
from selfforcing_dfd.weights.read import load_transformer, read_weights

TINY_STUDENT = "assets/tiny/student.safetensors"
WAN_SIZE = (480, 832)
STREAM_CONFIGS = shipped("configs/stream")
# 480 x 832
LATENT_SIZES = {"tiny": (SIDE // SPACE, SIDE // SPACE), "wan1.3b": (60, 104), "wan14b": (60, 104)}
MODELS = {
    "tiny": ModelConfig(),
    "wan1.3b": ModelConfig(num_heads=12, head_dim=128, num_layers=30, ffn_dim=8960, text_dim=4096),
    "wan14b": ModelConfig(num_heads=40, head_dim=128, num_layers=40, ffn_dim=13824, text_dim=4096),
}
"""Sizes of Wan2.1-T2V (arXiv 2503.20314, table 2) and of the tiny world."""
PARTS = {
    "vae": ("config.json",),
    "text_encoder": ("config.json",),
    "tokenizer": ("tokenizer.json",),
}
"""What a Wan folder must hold besides a student, and the files of each part besides its weights."""
STUDENT_REPOSITORY, STUDENT_FILE = "gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt"


@dataclass(frozen=True, slots=True)
class TinyPrompts:
    """The tiny world's text encoder with an error for prompts that it would not understand."""

    encoder: TinyText

    def encode(self, captions: list[str]) -> Tensor:
        """[B, L, D_text]. Raises ValueError for a prompt that names nothing of the tiny world."""
        for prompt in captions:
            if not parse_caption(prompt):
                raise ValueError(
                    f"prompt {prompt!r} names nothing of the tiny world; try 'a disc moves', square or cross"
                )
        return self.encoder.encode(captions)


def load_stream_model(
    run: Path | None = None, checkpoint: str = "", device: str = "auto"
) -> StreamModel:
    """The student of a run, or of a weights file of the tiny size, or the shipped one, with the
    tiny world's codec and text.

    Raises ConfigError where files are missing or hold another model.
    """
    if run is not None and checkpoint:
        raise ConfigError("both a run and weights are given; drop --run or --weights")
    config, weights = (
        student_of(run) if run else (load_config("dfd_ar.yaml"), Path(checkpoint or TINY_STUDENT))
    )
    require(
        find_file(str(weights)).is_file(),
        f"{weights} does not exist; train first, or leave it out for the tiny student",
    )
    place = find_device(device)
    student = load_network(config.model, str(weights), place).requires_grad_(False)
    codec = TinyCodec.load(codec_file(config)).to(place)
    text = TinyPrompts(TinyText(config.model.text_dim))
    return StreamModel(
        student,
        codec,
        text,
        build_ladder(config),
        config.rollout.chunk_frames,
        LATENT_SIZES["tiny"],
    )


def load_wan_model(
    folder: Path,
    checkpoint: str = "",
    device: str = "auto",
    dtype: str = "auto",
    vae_device: str = "",
    size: tuple[int, int] = WAN_SIZE,
) -> StreamModel:
    """A student of real Wan2.1 with the VAE and text encoder of `folder`: a diffusers folder of
    Wan, or an export of ours.

    checkpoint: the student, in any format of `models/weights.py`; empty takes the folder's
    transformer if that is one. dtype: auto is bfloat16 on a GPU and float32 elsewhere. size: height
    and width of the video. Embeddings of prompts are kept on disk, so the text encoder is loaded
    for new prompts only. Raises ConfigError with the cure for what is missing.
    """
    require(dtype in ("auto", *DTYPES), f"dtype is {dtype!r}; use auto, {', '.join(DTYPES)}")
    rows_columns = latent_size(size, WanCodec.strides, (1, 2, 2))
    check_parts(folder, checkpoint)
    place, kind = find_device(device), DTYPES.get(dtype)
    kind = kind or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    vae_place = find_device(vae_device) if vae_device else place
    student = load_student(
        find_file(checkpoint) if checkpoint else folder / "transformer", place, kind
    )
    check_fit(student, folder)
    codec = WanCodec.from_pretrained(
        folder, vae_place, kind, channels_last=vae_place.type == "cuda"
    )
    text = WanText.cached(folder, text_cache(), place, kind)
    recipe = recipe_of(student.config)
    return StreamModel(
        student, codec, text, recipe.ladder, recipe.chunk_frames, rows_columns, vae_place
    )


def load_student(
    source: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    entry: str = "",
) -> WanTransformer:
    """A causal student, frozen, marked as one and with its recipe in its config.

    A file that says nothing of its role is taken for what it is named as; a folder has to say it.
    Raises HubError for a teacher's weights, WeightsError for what cannot be read.
    """
    weights = read_weights(source, entry)
    if weights.role != "unknown" or Path(source).is_dir():
        require_student(weights.notes, weights.source)
    student = load_transformer(weights, device, dtype)
    mark_student(student, recipe_of(weights.notes))
    return student.requires_grad_(False)


def check_fit(student: WanTransformer, folder: Path) -> None:
    """ConfigError for a student of other latents or text than the folder's VAE and text encoder
    make.
    """
    for part, key, own in (
        ("vae", "z_dim", "in_channels"),
        ("text_encoder", "d_model", "text_dim"),
    ):
        width, wanted = (
            json.loads((folder / part / "config.json").read_text()).get(key),
            student.config[own],
        )
        require(
            width in (None, wanted),
            f"{folder}/{part} has {key} {width}, the student wants {wanted}; they are not of one model: name a student of "
            "Wan2.1 text-to-video, or the folder that belongs to it",
        )


def latent_size(
    size: tuple[int, int], strides: tuple[int, int, int], patch: tuple[int, int, int]
) -> tuple[int, int]:
    """Rows and columns of the latents of a video of some height and width. Raises ConfigError for
    sizes that do not fit.
    """
    for name, pixels, unit in zip(
        ("height", "width"), size, (strides[1] * patch[1], strides[2] * patch[2]), strict=True
    ):
        lower = pixels // unit * unit
        require(
            pixels > 0 and pixels % unit == 0,
            f"{name} is {pixels}; the model needs multiples of {unit}: use {lower or unit} or {lower + unit}",
        )
    return size[0] // strides[1], size[1] // strides[2]


def check_parts(folder: Path, checkpoint: str = "") -> None:
    """ConfigError that lists what a folder lacks for streaming, and for each part the command that
    fetches it.
    """
    lacking = [
        (f"{part}: {', '.join(files)}", fetch_part(folder, part))
        for part in PARTS
        if (files := absent(folder, part))
    ]
    if checkpoint and not find_file(checkpoint).exists():
        lacking.append((f"student: {checkpoint} does not exist", fetch_student(folder)))
    elif not checkpoint and role_of(read_config(folder / "transformer")) != "student":
        here = read_config(folder / "transformer")
        what = (
            "Wan's own transformer is bidirectional, not a causal student"
            if here
            else "there is no transformer"
        )
        lacking.append((f"student: {what}", fetch_student(folder)))
    elif not checkpoint and (files := absent(folder, "transformer")):
        lacking.append((f"transformer: {', '.join(files)}", "fetch or export it again"))
    lines = [f"  {what}\n    {cure}" for what, cure in lacking]
    require(not lacking, "\n".join([f"{folder} cannot be streamed from yet; it lacks", *lines]))


def absent(folder: Path, part: str) -> list[str]:
    """Names of the files that a part of a folder lacks, its weights included."""
    place = folder / part
    names = [*PARTS.get(part, ("config.json",))]
    if part != "tokenizer":
        index = next(iter(sorted(place.glob("*.safetensors.index.json"))), None)
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index else []
        names += shards or ([] if any(place.glob("*.safetensors")) else ["*.safetensors"])
    return [name for name in names if name.startswith("*") or not (place / name).is_file()]


def fetch_part(folder: Path, part: str) -> str:
    size = "14B" if "14b" in folder.name.lower() else "1.3B"  # these parts are the same in both
    return f"hf download Wan-AI/Wan2.1-T2V-{size}-Diffusers --include '{part}/*' --local-dir {shlex.quote(str(folder))}"


def fetch_student(folder: Path) -> str:
    place = shlex.quote(str(folder))
    return (
        f"hf download {STUDENT_REPOSITORY} {STUDENT_FILE} --local-dir {place}\n"
        f"    and name it: --weights {shlex.quote(str(folder / STUDENT_FILE))}"
    )


def text_cache() -> Path:
    """Where embeddings of prompts are kept: selfforcing_dfd/text in XDG_CACHE_HOME, by default
    ~/.cache.
    """
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "selfforcing_dfd"
        / "text"
    )


def random_stream_model(
    size: str, device: str = "auto", dtype: torch.dtype | None = None, seed: int = 0
) -> StreamModel:
    """A model of one of the known sizes with random weights: real speed, no picture. `size`: tiny,
    wan1.3b or wan14b.

    dtype: bfloat16 on a GPU and float32 elsewhere unless given. Raises ConfigError for an unknown
    size.
    """
    require(size in MODELS, f"size is {size!r}; use one of {', '.join(MODELS)}")
    place = find_device(device)
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    torch.manual_seed(seed)
    with torch.device(place):
        student = randomise(build_network(MODELS[size], place))
        nn.Module.to(student.requires_grad_(False), dtype)
        codec: Any = TinyCodec.load(find_file("assets/tiny/codec.safetensors")).to(place)
        if size != "tiny":
            vae: Any = AutoencoderKLWan()
            codec = WanCodec(vae.to(dtype), channels_last=place.type == "cuda")
    text = TinyText(MODELS[size].text_dim, 12 if size == "tiny" else 512)
    ladder = build_ladder(load_config("dfd_ar.yaml"))
    return StreamModel(student, codec, text, ladder, 3, LATENT_SIZES[size])


@torch.no_grad()
def randomise(network: WanTransformer) -> WanTransformer:
    """Random weights under which values stay finite however long a stream runs."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    network.proj_out.weight.mul_(0.1)
    return network


def load_settings(name: str = "default", **changes: Any) -> StreamSettings:
    """The settings of `configs/stream/NAME.yaml`, or of a file, with changes that are not None.

    Raises ConfigError for an unknown name, setting or value.
    """
    path = Path(name) if name.endswith(".yaml") else STREAM_CONFIGS / f"{name}.yaml"
    known = ", ".join(sorted(file.stem for file in STREAM_CONFIGS.glob("*.yaml")))
    require(path.is_file(), f"no stream settings {name!r}; use one of {known}, or a YAML file")
    loaded = OmegaConf.to_container(OmegaConf.load(path))
    fields = {field.name for field in dataclasses.fields(StreamSettings)}
    settings = {
        **(loaded if isinstance(loaded, dict) else {}),
        **{k: v for k, v in changes.items() if v is not None},
    }
    unknown = sorted(str(key) for key in settings if key not in fields)
    require(
        not unknown,
        f"{path} has unknown settings {', '.join(unknown)}; known are {', '.join(sorted(fields))}",
    )
    return StreamSettings(**{str(key): value for key, value in settings.items()})
