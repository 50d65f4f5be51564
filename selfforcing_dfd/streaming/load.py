"""From weights to a model that streams: the tiny world's, or a student of real Wan with its folder.

Sizes and recipe come from the student's file; nothing of the trainer is imported.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from selfforcing_dfd.codecs.pictures import PictureEncoder, check_picture_encoder
from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.codecs.wan_vae import VIDEO_SIZE, WanCodec
from selfforcing_dfd.common import DTYPES, find_device, find_file, shipped
from selfforcing_dfd.models.hub import require_student
from selfforcing_dfd.models.identity import SELF_FORCING, Recipe, TrainingData, mark, recipe_of
from selfforcing_dfd.models.picture import takes_picture
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.streaming.parts import LoadError, check_fit, check_parts
from selfforcing_dfd.streaming.session import StreamModel, StreamSettings
from selfforcing_dfd.tiny.codec import SPACE, TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, parse_caption
from selfforcing_dfd.weights.read import Description, describe, load_network, read_weights
from selfforcing_dfd.weights.recipes import settle_recipe
from selfforcing_dfd.weights.runs import student_of
from selfforcing_dfd.weights.sources import StoredWeights

logger = logging.getLogger(__name__)

CODEC_FILE = "codec.safetensors"
TINY_ASSETS = shipped("assets/tiny")
TINY_STUDENT = TINY_ASSETS / "stable.safetensors"
TINY_DMD_STUDENT = TINY_ASSETS / "student.safetensors"
STREAM_CONFIGS = shipped("configs/stream")


@dataclass(frozen=True, slots=True)
class TinyPrompts:
    """The tiny world's text encoder with an error for prompts that it would not understand."""

    encoder: TinyText

    def encode(self, captions: list[str]) -> Tensor:
        """[B, L, D_text]. Raises LoadError for a prompt that names nothing of the tiny world."""
        for prompt in captions:
            if not parse_caption(prompt):
                raise LoadError(
                    f"prompt {prompt!r} names nothing of the tiny world; try 'a disc moves', "
                    "square or cross"
                )
        return self.encoder.encode(captions)


def load_stream_model(
    run: Path | None = None,
    checkpoint: str = "",
    device: str = "auto",
    recipe: Mapping[str, Any] | None = None,
) -> StreamModel:
    """A student of the tiny world: of a run, of a weights file, or the shipped one.

    recipe: settings that replace those of the student's file. The codec is the one that lies beside
    the weights, else the shipped one. Raises UserError where files are missing or hold another
    model.
    """
    if run is not None and checkpoint:
        raise LoadError("both a run and weights are given; drop --run or --weights")
    path = student_of(run) if run else find_weights(checkpoint)
    if not path.is_file():
        raise LoadError(f"{path} does not exist; train first, or leave it out for the tiny student")
    codec = TinyCodec.load(tiny_codec_file(path))
    weights = read_weights(path)
    check_tiny(describe(weights), codec)
    run_on = find_device(device)
    student = load_student(weights, run_on, recipe=recipe)
    settled = student_recipe(student)
    return StreamModel(
        student=student,
        codec=codec.to(run_on),
        text=TinyPrompts(TinyText(student.config["text_dim"])),
        ladder=settled.sigmas,
        keeps_noise=settled.keeps_noise,
        given=settled.given,
        chunk_frames=settled.chunk_frames,
        latent_size=(SIDE // SPACE, SIDE // SPACE),
    )


def tiny_codec_file(weights: Path) -> Path:
    """The codec beside a weights file, which a run's export puts there, else the shipped one."""
    beside = weights.parent / CODEC_FILE
    return beside if beside.is_file() else TINY_ASSETS / CODEC_FILE


def find_weights(name: str) -> Path:
    """The weights of that name, here or shipped with the package; the tiny student for no name."""
    return find_file(name) if name else TINY_STUDENT


def check_tiny(student: Description, codec: TinyCodec) -> None:
    """Raise LoadError for a student that was not trained on the tiny world's latents and words."""
    cure = "real Wan needs --model WAN_FOLDER --weights FILE"
    data = student.data
    if takes_picture(student.sizes):
        raise LoadError(
            f"{student.source} is an image-to-video student of Wan2.1 with an image encoder, which "
            f"the tiny world does not have; {cure}"
        )
    if data is not None and data.codec.startswith("wan-vae"):
        raise LoadError(
            f"{student.source} was trained on Wan's latents, not on the tiny world's; {cure}"
        )
    if data is not None and data.codec.startswith("tiny-codec"):
        if data.codec != codec.fingerprint:
            raise LoadError(
                f"{student.source} was trained on latents of {data.codec}, but the codec here is "
                f"{codec.fingerprint}; copy {CODEC_FILE} of its training shards beside it"
            )
    elif student.sizes["text_dim"] != describe(TINY_STUDENT).sizes["text_dim"]:
        raise LoadError(
            f"{student.source} holds another model: it reads text of width "
            f"{student.sizes['text_dim']}, which is not the tiny world's; {cure}"
        )


def load_wan_model(
    folder: Path,
    checkpoint: str = "",
    device: str = "auto",
    dtype: str = "auto",
    vae_device: str = "",
    size: tuple[int | None, int | None] = (None, None),
    recipe: Mapping[str, Any] | None = None,
) -> StreamModel:
    """A student of real Wan2.1 with the VAE and text encoder of `folder`.

    folder: a diffusers folder of Wan, or an export of ours. checkpoint: the student, in any format
    of `weights/read.py`; empty takes the folder's transformer if that is one. dtype: auto is
    bfloat16 on a GPU and float32 elsewhere. size: height and width of the video; None is the size
    that the student was trained at, else Wan's. recipe: settings that replace those of the
    student's file. Embeddings of prompts are kept on disk, so the text encoder is loaded for new
    prompts only. Raises UserError with the cure for what is missing.
    """
    if dtype not in ("auto", *DTYPES):
        raise LoadError(f"dtype is {dtype!r}; use auto, {', '.join(DTYPES)}")
    named = find_weights(checkpoint) if checkpoint else None
    check_parts(folder, named)
    weights = read_weights(named or folder / "transformer")
    student_facts = describe(weights)
    check_fit(student_facts.sizes, student_facts.data, folder)
    if takes_picture(student_facts.sizes):
        check_picture_encoder(folder, student_facts.sizes["image_dim"])
    video_size = asked_size(size, student_facts.data)
    rows_columns = latent_size(video_size, WanCodec.strides, student_facts.sizes["patch_size"])
    run_on = find_device(device)
    decode_on = find_device(vae_device) if vae_device else run_on
    weights_dtype = DTYPES.get(dtype) or default_dtype(run_on)
    student = load_student(weights, run_on, weights_dtype, recipe=recipe)
    settled = student_recipe(student)
    on_gpu = decode_on.type == "cuda"
    codec = WanCodec.from_pretrained(folder, decode_on, weights_dtype, channels_last=on_gpu)
    see = None
    if student.takes_picture:
        encoder = PictureEncoder.from_pretrained(folder, codec, decode_on)
        see = partial(encoder.encode, frames=settled.frames)
    return StreamModel(
        student=student,
        codec=codec,
        text=WanText.cached(folder, text_cache(), run_on, weights_dtype),
        ladder=settled.sigmas,
        keeps_noise=settled.keeps_noise,
        given=settled.given,
        chunk_frames=settled.chunk_frames,
        latent_size=rows_columns,
        decode_device=decode_on,
        see=see,
    )


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_student(
    source: Path | str | StoredWeights,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    entry: str = "",
    recipe: Mapping[str, Any] | None = None,
) -> WanTransformer:
    """A causal student, frozen, with its role and its recipe in its config.

    recipe: settings that replace those of the source, with a warning. A file that does not state
    its role is taken for a student; a folder has to state it. Raises HubError for other weights,
    WeightsError for what cannot be read.
    """
    weights = source if isinstance(source, StoredWeights) else read_weights(source, entry)
    if weights.role is not None or weights.is_folder:
        require_student(weights.identity.notes(), weights.source)
    settled = settle_recipe(weights.recipe, recipe or {}, "causal_student", weights.source)
    if settled.first_ladder is not None:
        raise LoadError(
            f"{weights.source} denoises the first chunk with steps of its own, "
            f"{_steps(settled.first_ladder)}, and later chunks with {_steps(settled.ladder)}; "
            "streams run all chunks with the same steps: use a student whose recipe has no "
            "first_ladder"
        )
    student = load_network(weights, device=device, dtype=dtype)
    mark(student, "causal_student", settled, weights.identity.data)
    return student.requires_grad_(False)


def _steps(ladder: tuple[float, ...]) -> str:
    return ",".join(f"{timestep:g}" for timestep in ladder)


def student_recipe(student: WanTransformer) -> Recipe:
    """The recipe in a student's config; Self-Forcing's where the config has none."""
    return recipe_of(student.config) or SELF_FORCING


def asked_size(size: tuple[int | None, int | None], data: TrainingData | None) -> tuple[int, int]:
    """Height and width of Wan's video; None is the training data's if it is known, else Wan's."""
    height, width = VIDEO_SIZE if data is None else trained_size(data)
    return (height if size[0] is None else size[0]), (width if size[1] is None else size[1])


def trained_size(data: TrainingData) -> tuple[int, int]:
    """Height and width of the video that Wan's VAE made the training latents of."""
    rows, columns = data.latent_size
    return rows * WanCodec.strides[1], columns * WanCodec.strides[2]


def latent_size(
    size: tuple[int, int], strides: tuple[int, int, int], patch: tuple[int, int, int]
) -> tuple[int, int]:
    """Rows and columns of the latents of a video. Raises LoadError for sizes that do not fit."""
    for axis, name in ((1, "height"), (2, "width")):
        pixels = size[axis - 1]
        unit = strides[axis] * patch[axis]
        lower = pixels // unit * unit
        if pixels <= 0 or pixels % unit:
            raise LoadError(
                f"{name} is {pixels}; the model needs multiples of {unit}: use {lower or unit} or "
                f"{lower + unit}"
            )
    return size[0] // strides[1], size[1] // strides[2]


def text_cache() -> Path:
    """Where embeddings of prompts are kept: XDG_CACHE_HOME (default ~/.cache), then our name."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "selfforcing_dfd" / "text"


def choose_kernel(model: StreamModel, settings: StreamSettings, name: str) -> None:
    """Give the student its attention kernel; `auto` measures them on a chunk of the steady state.

    Raises AttentionError for a kernel that cannot run here.
    """
    tokens = model.kv_shape().tokens
    num_keys = (settings.sink_frames + settings.window_frames) * tokens
    model.student.set_attention(name, lengths=(model.chunk_frames * tokens, num_keys))


def load_settings(
    name: str = "", default: str = "default", recipe: Recipe | None = None, **changes: Any
) -> StreamSettings:
    """The settings of `configs/stream/NAME.yaml`, or of a file, with changes that are not None.

    Without a name the file is `default`, and a sink and window that the student's recipe states
    replace the file's. A named file and changes win over the recipe, with a warning. Raises
    LoadError for an unknown name, setting or value.
    """
    path = _settings_file(name or default)
    loaded = OmegaConf.to_container(OmegaConf.load(path))
    settings: dict[str, Any] = {}
    if isinstance(loaded, dict):
        settings = {str(key): value for key, value in loaded.items()}
    stated: dict[str, Any] = {}
    if recipe is not None and recipe.window:
        stated = {"sink_frames": recipe.sink, "window_frames": recipe.window}
    if not name:
        settings |= stated
    settings |= {key: value for key, value in changes.items() if value is not None}
    fields = {field.name for field in dataclasses.fields(StreamSettings)}
    unknown = sorted(key for key in settings if key not in fields)
    if unknown:
        raise LoadError(
            f"{path} has unknown settings {', '.join(unknown)}; known are "
            f"{', '.join(sorted(fields))}"
        )
    for key, value in stated.items():
        if settings.get(key, value) != value:
            logger.warning(
                "the student was trained with %s %s; used: %s", key, value, settings[key]
            )
    return StreamSettings(**settings)


def _settings_file(name: str) -> Path:
    path = Path(name) if name.endswith(".yaml") else STREAM_CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in STREAM_CONFIGS.glob("*.yaml")))
        raise LoadError(f"no stream settings {name!r}; use one of {known}, or a YAML file")
    return path
