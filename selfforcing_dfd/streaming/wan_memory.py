"""The memory that a stream of a Wan folder will need, from its configs and the weights' headers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfforcing_dfd.codecs.pictures import ENCODER, PictureEncoder, check_picture_encoder
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.models.identity import Recipe
from selfforcing_dfd.models.picture import takes_picture
from selfforcing_dfd.streaming.load import find_weights, latent_size, settle_student
from selfforcing_dfd.streaming.load_wan import asked_size
from selfforcing_dfd.streaming.memory import GIGA, META, MemoryNeeds, Streamed, text_encoder_bytes
from selfforcing_dfd.streaming.parts import check_fit, check_parts
from selfforcing_dfd.weights.read import describe, read_weights


def streamed_wan(
    folder: Path,
    checkpoint: str,
    dtype: torch.dtype,
    size: tuple[int | None, int | None],
    recipe: Mapping[str, Any],
    lean_vae: bool = False,
) -> tuple[Streamed, Recipe]:
    """What `load_wan_model` would load, and the student's recipe. Arguments and errors as there."""
    named = find_weights(checkpoint) if checkpoint else None
    check_parts(folder, named)
    weights = read_weights(named or folder / "transformer")
    facts = describe(weights)
    check_fit(facts.sizes, facts.data, folder)
    if takes_picture(facts.sizes):
        check_picture_encoder(folder, facts.sizes["image_dim"])
    settled = settle_student(weights, recipe)
    codec = meta_codec(folder, dtype, lean_vae)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    streamed = Streamed(
        sizes=facts.sizes,
        codec=codec,
        text_bytes=text_encoder_bytes(config, dtype),
        latent_size=latent_size(
            asked_size(size, facts.data), codec.strides, facts.sizes["patch_size"]
        ),
        chunk_frames=settled.chunk_frames,
        num_levels=len(settled.ladder) + 1,
        dtype=dtype,
        pictures=meta_pictures(folder, codec) if takes_picture(facts.sizes) else None,
        num_frames=settled.frames,
    )
    return streamed, settled


def meta_codec(folder: Path, dtype: torch.dtype, lean: bool) -> WanCodec:
    """A folder's VAE without memory, laid out as on a GPU."""
    from diffusers import AutoencoderKLWan

    with META:
        vae: Any = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder / "vae"))
        nn.Module.to(vae, dtype)
        return WanCodec(vae, channels_last=True, lean=lean)


def meta_pictures(folder: Path, codec: WanCodec) -> PictureEncoder:
    """What a folder of Wan2.1-I2V sees pictures by, without memory; in float32, as it computes."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with META:
        config = CLIPVisionConfig.from_pretrained(folder / ENCODER)
        return PictureEncoder(codec, None, CLIPVisionModel(config).float())


def memory_lines(needs: MemoryNeeds) -> Iterator[str]:
    """What a stream needs, line by line, and the smallest GPU that holds it."""
    moment = needs.peak_moment
    for name, amount in {**needs.lasting, moment: needs.moments[moment]}.items():
        yield f"{amount / GIGA:>9,.2f} GB  {name}"
    yield f"{needs.total / GIGA:>9,.2f} GB  in all, counted from shapes and not measured"
    for name, amount in needs.host.items():
        yield f"{amount / GIGA:>9,.2f} GB  {name}, in the host's memory"
    if needs.board is None:
        yield "fits no GPU known here; save some: --offload, --text-memory cpu, --lean-vae, --fp8"
    else:
        yield f"fits a GPU of {needs.board} GB"
