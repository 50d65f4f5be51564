"""Codecs and text encoders for packing, by the names that the command line uses.

What needs diffusers or transformers is imported where it is asked for: that takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from selfforcing_dfd.codecs.protocol import TextEncoder
from selfforcing_dfd.common import find_device
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.tiny.codec import CHANNELS, SPACE, TIME, TinyCodec
from selfforcing_dfd.tiny.text import TinyText

if TYPE_CHECKING:
    from selfforcing_dfd.codecs.pictures import PictureEncoder
    from selfforcing_dfd.codecs.wan_vae import WanCodec

MAX_CLIPS_TO_FIT = 64  # 33,000 blocks of 4x8x8 pixels at the default size: plenty for a basis of 16
PATCH = 2 * SPACE  # pixels that a token stands for, in height and in width


def load_wan_codec(model: Path | None, device: str, dtype: str) -> WanCodec:
    """Raises PackError without a folder, CodecError if there is no VAE in it."""
    from selfforcing_dfd.codecs.wan_vae import WanCodec

    folder = _named(model, "--codec wan", "vae")
    return WanCodec.from_pretrained(folder, device, getattr(torch, dtype))


def load_picture_encoder(model: Path, device: str, dtype: str, shards: Path) -> PictureEncoder:
    """The image encoder and VAE of a Wan2.1-I2V folder, for clips that this VAE has encoded.

    Raises PackError for clips of another codec, CodecError and PictureEncoderError for missing
    parts.
    """
    from selfforcing_dfd.codecs.pictures import PictureEncoder, check_picture_encoder

    check_picture_encoder(model)
    run_on = str(find_device(device))
    codec = load_wan_codec(model, run_on, dtype)
    found = ShardReader(shards).index.fingerprints["codec"]
    if found != codec.fingerprint:
        raise PackError(
            f"{shards} holds latents of {found}, but {model}/vae in {dtype} is "
            f"{codec.fingerprint}; name the folder and the --dtype that the clips were packed with"
        )
    return PictureEncoder.from_pretrained(model, codec, run_on)


def load_tiny_codec(path: Path) -> TinyCodec:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no codec basis; name one with --basis FILE or fit one to the clips with --fit"
        )
    return TinyCodec.load(path)


def tiny_codec_of(
    first: np.ndarray, rest: np.ndarray, scale: float, device: str = "cpu"
) -> TinyCodec:
    """The codec of these bases, which can be sent to another process."""
    return TinyCodec(torch.from_numpy(first), torch.from_numpy(rest), scale).to(device)


def fit_tiny_codec(read_video: Callable[[int], Tensor], num_clips: int) -> TinyCodec:
    """Fit to at most MAX_CLIPS_TO_FIT clips, evenly chosen.

    read_video: number -> uint8 [T, H, W, 3]; a clip for which it raises ClipError is left out.
    Raises PackError if none of the chosen can be read.
    """
    videos = []
    problems = []
    for number in range(num_clips)[:: math.ceil(num_clips / MAX_CLIPS_TO_FIT)]:
        try:
            videos.append(read_video(number))
        except ClipError as error:
            problems.append(f"\n  {error}")
    if not videos:
        raise PackError(f"no clip to fit the codec to; the first tried:{''.join(problems[:5])}")
    return TinyCodec.fit(torch.stack(videos).float() / 255)


def load_text(name: str, model: Path | None, device: str, cache: Path | None) -> TextEncoder:
    """tiny: the word table. umt5: Wan's, in bfloat16.

    With `cache`, UMT5's weights are read only for a prompt that is not in it.
    """
    if name == "tiny":
        return TinyText()
    from selfforcing_dfd.codecs.text import WanText

    folder = _named(model, "--text umt5", "text_encoder and tokenizer")
    if cache:
        return WanText.cached(folder, cache, device)
    return WanText.from_pretrained(folder, device)


def default_negative_prompt(name: str) -> str | None:
    """Wan's own for umt5; none for the tiny world, whose empty caption is all zeros."""
    if name == "tiny":
        return None
    from selfforcing_dfd.codecs.prompts import NEGATIVE_PROMPT

    return NEGATIVE_PROMPT


def latent_shape(num_video_frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """F, C, H, W of a video's latents; the tiny codec has the shape of Wan's VAE.

    size: height and width in pixels. Raises PackError for a video that the model cannot make.
    """
    height, width = size
    fits_time = num_video_frames >= 1 and (num_video_frames - 1) % TIME == 0
    fits_space = min(size) >= PATCH and height % PATCH == 0 and width % PATCH == 0
    if not fits_time or not fits_space:
        raise PackError(
            f"a video of {num_video_frames} frames of {height}x{width}; want 1 + {TIME} n frames, "
            f"and height and width that are multiples of {PATCH}, such as 81 frames of 480x832"
        )
    return 1 + (num_video_frames - 1) // TIME, CHANNELS, height // SPACE, width // SPACE


def _named(model: Path | None, option: str, parts: str) -> Path:
    if model is None:
        raise PackError(
            f"{option} needs --model DIR, a diffusers folder of Wan2.1 with its subfolder {parts}"
        )
    return model
