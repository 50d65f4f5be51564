"""Codecs, text encoders and data sets to import by name, as the command line asks for them.

What needs diffusers or transformers is imported where it is asked for: that takes seconds.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from selfforcing_dfd.data.imports import ImportSource
from selfforcing_dfd.data.pack import TextEncoder
from selfforcing_dfd.data.sources.fastgen import FastGenSource, Layout
from selfforcing_dfd.data.sources.files import Clip, PackError
from selfforcing_dfd.data.sources.lmdb import LmdbSource, find_environments
from selfforcing_dfd.data.sources.video import ClipError, Resize, read_video
from selfforcing_dfd.tiny.codec import CHANNELS, SPACE, TIME, TinyCodec
from selfforcing_dfd.tiny.text import TinyText

if TYPE_CHECKING:
    from selfforcing_dfd.codecs.wan_vae import WanCodec

PATCH = 2 * SPACE  # pixels that a token stands for, in height and in width
# 33,000 blocks of 4 x 8 x 8 pixels at the default size: plenty for a basis of 16
MAX_CLIPS_TO_FIT = 64


def load_wan_codec(model: Path | None, device: str, dtype: str) -> WanCodec:
    """PackError without a folder; CodecError if there is no VAE in it."""
    from selfforcing_dfd.codecs.wan_vae import WanCodec

    return WanCodec.from_pretrained(
        _named(model, "--codec wan", "vae"), device, getattr(torch, dtype)
    )


def load_text(name: str, model: Path | None, device: str, cache: Path | None) -> TextEncoder:
    """tiny: the word table. umt5: Wan's, in bfloat16, whose weights are read for the first prompt
    that is not in `cache`.
    """
    if name == "tiny":
        return TinyText()
    from selfforcing_dfd.codecs.text import WanText

    folder = _named(model, "--text umt5", "text_encoder and tokenizer")
    return (
        WanText.cached(folder, cache, device) if cache else WanText.from_pretrained(folder, device)
    )


def default_negative_prompt(name: str) -> str | None:
    """Wan's own for umt5, as far as codecs/text.py has it; none for the tiny world, whose empty
    caption is all zeros.
    """
    if name == "tiny":
        return None
    from selfforcing_dfd.codecs import text

    return str(vars(text).get("NEGATIVE_PROMPT", ""))


def load_tiny_codec(path: Path) -> TinyCodec:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no codec basis; name one with --basis FILE or fit one to the clips with --fit"
        )
    return TinyCodec.load(path)


def fit_tiny_codec(
    clips: list[Clip],
    num_video_frames: int,
    size: tuple[int, int],
    resize: Resize,
    fps: Fraction | None,
) -> TinyCodec:
    """Fit to at most MAX_CLIPS_TO_FIT clips, evenly chosen; the unusable ones are left to the
    packer to report.
    """
    videos, problems = [], []
    for clip in clips[:: math.ceil(len(clips) / MAX_CLIPS_TO_FIT)]:
        try:
            videos.append(read_video(clip.path, num_video_frames, size, resize, fps))
        except (ClipError, FileNotFoundError) as error:
            problems.append(f"\n  {error}")
    if not videos:
        raise PackError(f"no clip to fit the codec to; the first tried:{''.join(problems[:5])}")
    return TinyCodec.fit(torch.stack(videos).float() / 255)


def open_source(
    source: Path,
    kind: Literal["auto", "lmdb", "fastgen"],
    step: int,
    row_shape: tuple[int, ...] | None,
    layout: Layout,
    negative: Path | None,
) -> ImportSource:
    """The data set of another project in a folder or file. PackError: there is none, or it cannot
    be read.
    """
    if not source.exists():
        raise PackError(f"{source}: no such folder or file")
    is_tars = source.suffix == ".tar" if source.is_file() else any(source.glob("*.tar"))
    if kind == "auto" and not is_tars and not find_environments(source):
        raise PackError(
            f"{source}: want a folder with data.mdb (LMDB), with such folders, or with .tar files (FastGen)"
        )
    if kind == "fastgen" or (kind == "auto" and is_tars):
        return FastGenSource(source, layout, negative)
    return LmdbSource(source, step, row_shape)


def _named(model: Path | None, option: str, parts: str) -> Path:
    if model is None:
        raise PackError(
            f"{option} needs --model DIR, a diffusers folder of Wan2.1 with its subfolder {parts}"
        )
    return model


def latent_shape(num_video_frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """F, C, H, W of the latents of Wan's VAE, which the tiny codec shares. PackError for a video
    that it cannot hold.
    """
    height, width = size
    if (
        num_video_frames < 1
        or (num_video_frames - 1) % TIME
        or height % PATCH
        or width % PATCH
        or min(size) < PATCH
    ):
        raise PackError(
            f"a video of {num_video_frames} frames of {height}x{width}; want 1 + {TIME} n frames, and height and width "
            f"that are multiples of {PATCH}, such as 81 frames of 480x832"
        )
    return 1 + (num_video_frames - 1) // TIME, CHANNELS, height // SPACE, width // SPACE
