"""From files or a size's name to a model that streams: a run's folder, a weights file, or random weights for benchmarks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from omegaconf import OmegaConf
from torch import Tensor, nn

from selfforcing_dfd.build import build_device, build_ladder, build_network, codec_file, load_network, student_of
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.config import REPOSITORY, ConfigError, ModelConfig, find_file, load_config, require
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.streaming.session import StreamModel, StreamSettings
from selfforcing_dfd.tiny.codec import SPACE, TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, parse_caption

TINY_STUDENT = "assets/tiny/student.safetensors"
STREAM_CONFIGS = REPOSITORY / "configs" / "stream"
LATENT_SIZES = {"tiny": (SIDE // SPACE, SIDE // SPACE), "wan1.3b": (60, 104), "wan14b": (60, 104)}  # 480 x 832
MODELS = {
    "tiny": ModelConfig(),
    "wan1.3b": ModelConfig(num_heads=12, head_dim=128, num_layers=30, ffn_dim=8960, text_dim=4096),
    "wan14b": ModelConfig(num_heads=40, head_dim=128, num_layers=40, ffn_dim=13824, text_dim=4096),
}
"""Sizes of Wan2.1-T2V (arXiv 2503.20314, table 2) and of the tiny world."""


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


def load_stream_model(run: Path | None = None, checkpoint: str = "", device: str = "auto") -> StreamModel:
    """The student of a run, or of a weights file of the tiny size, or the shipped one, with the tiny world's codec and text.

    Raises ConfigError where files are missing or hold another model.
    """
    if run is not None and checkpoint:
        raise ConfigError("both a run and a checkpoint are given; drop --run or --checkpoint")
    config, weights = student_of(run) if run else (load_config("dfd_ar.yaml"), Path(checkpoint or TINY_STUDENT))
    require(
        find_file(str(weights)).is_file(),
        f"{weights} does not exist; train first, or leave it out for the tiny student",
    )
    place = build_device(device)
    student = load_network(config.model, str(weights), place).requires_grad_(False)
    codec = TinyCodec.load(codec_file(config)).to(place)
    text = TinyPrompts(TinyText(config.model.text_dim))
    return StreamModel(student, codec, text, build_ladder(config), config.rollout.chunk_frames, LATENT_SIZES["tiny"])


def random_stream_model(
    size: str, device: str = "auto", dtype: torch.dtype | None = None, seed: int = 0
) -> StreamModel:
    """A model of one of the known sizes with random weights: real speed, no picture. `size`: tiny, wan1.3b or wan14b.

    dtype: bfloat16 on a GPU and float32 elsewhere unless given. Raises ConfigError for an unknown size.
    """
    require(size in MODELS, f"size is {size!r}; use one of {', '.join(MODELS)}")
    place = build_device(device)
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
    settings = {**(loaded if isinstance(loaded, dict) else {}), **{k: v for k, v in changes.items() if v is not None}}
    unknown = sorted(str(key) for key in settings if key not in fields)
    require(not unknown, f"{path} has unknown settings {', '.join(unknown)}; known are {', '.join(sorted(fields))}")
    return StreamSettings(**{str(key): value for key, value in settings.items()})
