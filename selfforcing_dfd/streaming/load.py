"""From weights to a model that streams: the tiny world's. Real Wan's are in `load_wan`.

Sizes and recipe come from the student's file; nothing of the trainer is imported, and neither is
diffusers, so that a stream of the tiny world starts at once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from selfforcing_dfd.common import find_device, find_file, shipped
from selfforcing_dfd.models.hub import require_student
from selfforcing_dfd.models.identity import SELF_FORCING, Recipe, mark, recipe_of
from selfforcing_dfd.models.network import WanNetwork
from selfforcing_dfd.models.picture import takes_picture
from selfforcing_dfd.streaming.model import running_as
from selfforcing_dfd.streaming.parts import LoadError
from selfforcing_dfd.streaming.saving import NOTHING_SAVED, Saving
from selfforcing_dfd.streaming.session import StreamModel, StreamSettings
from selfforcing_dfd.tiny.codec import SPACE, TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, Level, parse_caption, unknown_words
from selfforcing_dfd.weights.read import (
    Description,
    describe,
    load_network,
    load_plain,
    read_weights,
)
from selfforcing_dfd.weights.recipes import settle_recipe
from selfforcing_dfd.weights.runs import student_of
from selfforcing_dfd.weights.sources import StoredWeights

if TYPE_CHECKING:
    from selfforcing_dfd.models.wan import WanTransformer

logger = logging.getLogger(__name__)

CODEC_FILE = "codec.safetensors"
TINY_ASSETS = shipped("assets/tiny")
TINY_STUDENT = TINY_ASSETS / "stable.safetensors"
TINY_DMD_STUDENT = TINY_ASSETS / "student.safetensors"
STREAM_CONFIGS = shipped("configs/stream")


@dataclass(frozen=True, slots=True)
class TinyPrompts:
    """The tiny world's text encoder with an error for prompts that it would not understand.

    level: of the captions that its student was trained on.
    """

    encoder: TinyText
    level: Level = "mixed"

    def encode(self, captions: list[str]) -> Tensor:
        """[B, L, D_text]. Raises LoadError for a prompt that names nothing of the tiny world."""
        for prompt in captions:
            if not parse_caption(prompt):
                raise LoadError(
                    f"prompt {prompt!r} names nothing of the tiny world; try 'a disc moves', "
                    "square or cross"
                )
        return self.encoder.encode(captions)

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words that the student has never met, in order."""
        return unknown_words(prompt, self.level)


def load_stream_model(
    run: Path | None = None,
    checkpoint: str = "",
    device: str = "auto",
    recipe: Mapping[str, Any] | None = None,
    saving: Saving = NOTHING_SAVED,
) -> StreamModel:
    """A student of the tiny world: of a run, of a weights file, or the shipped one.

    recipe: settings that replace those of the student's file. saving: of memory. The codec is the
    one that lies beside the weights, else the shipped one. Raises UserError where files are missing
    or hold another model.
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
    settled = settle_student(weights, recipe)
    student = load_plain(weights, run_on, torch.float32).requires_grad_(False)
    saving.place(student, run_on)
    mark(student, "causal_student", settled, weights.identity.data)
    return StreamModel(
        student=student,
        codec=codec.to(run_on),
        text=TinyPrompts(TinyText(student.config["text_dim"]), caption_level(path)),
        latent_size=(SIDE // SPACE, SIDE // SPACE),
        **running_as(settled),
    )


def tiny_codec_file(weights: Path) -> Path:
    """The codec beside a weights file, which a run's export puts there, else the shipped one."""
    beside = weights.parent / CODEC_FILE
    return beside if beside.is_file() else TINY_ASSETS / CODEC_FILE


def caption_level(weights: Path) -> Level:
    """What is known of a student's captions: the shipped DMD student's named the shape alone."""
    return "short" if weights.resolve() == TINY_DMD_STUDENT.resolve() else "mixed"


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
    settled = settle_student(weights, recipe)
    student = load_network(weights, device=device, dtype=dtype)
    mark(student, "causal_student", settled, weights.identity.data)
    return student.requires_grad_(False)


def settle_student(weights: StoredWeights, recipe: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe by which some weights stream; arguments and errors as for `load_student`."""
    if weights.role is not None or weights.is_folder:
        require_student(weights.identity.notes(), weights.source)
    return settle_recipe(weights.recipe, recipe or {}, "causal_student", weights.source)


def student_recipe(student: WanNetwork) -> Recipe:
    """The recipe in a student's config; Self-Forcing's where the config has none."""
    return recipe_of(student.config) or SELF_FORCING


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
