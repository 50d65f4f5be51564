"""From weights to a model that streams: a student of real Wan2.1, with its folder's VAE."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.codecs.pictures import PictureEncoder, check_picture_encoder
from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.codecs.wan_vae import VIDEO_SIZE, WanCodec
from selfforcing_dfd.common import DTYPES, find_device
from selfforcing_dfd.models.identity import TrainingData
from selfforcing_dfd.models.picture import takes_picture
from selfforcing_dfd.streaming.load import (
    default_dtype,
    find_weights,
    latent_size,
    load_student,
    student_recipe,
)
from selfforcing_dfd.streaming.model import running_as
from selfforcing_dfd.streaming.parts import LoadError, check_fit, check_parts
from selfforcing_dfd.streaming.saving import NOTHING_SAVED, Saving
from selfforcing_dfd.streaming.session import StreamModel
from selfforcing_dfd.weights.read import describe, read_weights


def load_wan_model(
    folder: Path,
    checkpoint: str = "",
    device: str = "auto",
    dtype: str = "auto",
    vae_device: str = "",
    size: tuple[int | None, int | None] = (None, None),
    recipe: Mapping[str, Any] | None = None,
    saving: Saving = NOTHING_SAVED,
) -> StreamModel:
    """A student of real Wan2.1 with the VAE and text encoder of `folder`.

    folder: a diffusers folder of Wan, or an export of ours. checkpoint: the student, in any format
    of `weights/read.py`; empty takes the folder's transformer if that is one. dtype: auto is
    bfloat16 on a GPU and float32 elsewhere. size: height and width of the video; None is the size
    that the student was trained at, else Wan's. recipe: settings that replace those of the
    student's file. saving: of memory. Embeddings of prompts are kept on disk, so the text encoder
    is loaded for new prompts only. Raises UserError with the cure for what is missing.
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
    first_device = saving.first_device(run_on)
    student = load_student(weights, first_device, weights_dtype, recipe=recipe)
    saving.place(student, run_on)
    settled = student_recipe(student)
    on_gpu = decode_on.type == "cuda"
    codec = WanCodec.from_pretrained(
        folder, decode_on, weights_dtype, channels_last=on_gpu, lean=saving.lean_vae
    )
    see = None
    if student.takes_picture:
        encoder = PictureEncoder.from_pretrained(folder, codec, decode_on)
        see = partial(encoder.encode, frames=settled.frames)
    encode_on = torch.device("cpu") if saving.text == "cpu" else run_on
    keeps = saving.text != "free"
    return StreamModel(
        student=student,
        codec=codec,
        text=WanText.cached(folder, text_cache(), encode_on, weights_dtype, keeps=keeps),
        latent_size=rows_columns,
        decode_device=decode_on,
        see=see,
        **running_as(settled),
    )


def asked_size(size: tuple[int | None, int | None], data: TrainingData | None) -> tuple[int, int]:
    """Height and width of Wan's video; None is the training data's if it is known, else Wan's."""
    height, width = VIDEO_SIZE if data is None else trained_size(data)
    return (height if size[0] is None else size[0]), (width if size[1] is None else size[1])


def trained_size(data: TrainingData) -> tuple[int, int]:
    """Height and width of the video that Wan's VAE made the training latents of."""
    rows, columns = data.latent_size
    return rows * WanCodec.strides[1], columns * WanCodec.strides[2]


def text_cache() -> Path:
    """Where embeddings of prompts are kept: XDG_CACHE_HOME (default ~/.cache), then our name."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "selfforcing_dfd" / "text"
