"""A stream's memory by what is saved of it, for Wan's published sizes: counted, not measured."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from selfforcing_dfd.benchmark.operators import latent_size, meta_codec
from selfforcing_dfd.benchmark.text_encoder import SIZES
from selfforcing_dfd.codecs.wan_vae import VIDEO_SIZE
from selfforcing_dfd.common import DTYPES, UserError
from selfforcing_dfd.models.identity import SELF_FORCING
from selfforcing_dfd.models.sizes import PUBLISHED_SIZES
from selfforcing_dfd.streaming.load import load_settings
from selfforcing_dfd.streaming.memory import (
    GIGA,
    MemoryNeeds,
    Streamed,
    memory_needs,
    text_encoder_bytes,
)
from selfforcing_dfd.streaming.saving import Saving
from selfforcing_dfd.streaming.session import StreamSettings

MODELS = ("wan1.3b", "wan14b")
SAVINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "`--text-memory free`": {"text": "free"},
    "`--text-memory cpu`": {"text": "cpu"},
    "and `--lean-vae`": {"text": "cpu", "lean_vae": True},
    "and `--fp8`": {"text": "cpu", "lean_vae": True, "fp8": True},
    "`--offload`, without `--fp8`": {"text": "cpu", "lean_vae": True, "group_size": 1},
    "`--offload` and `--fp8`": {"text": "cpu", "lean_vae": True, "group_size": 1, "fp8": True},
}
"""What is saved, in the words of the command line; each keeps what the line above it saves."""


def count_memory(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A table in Markdown, and all bytes. Raises UserError for a model that is not Wan's."""
    named = options.random_weights
    if named is not None and named not in MODELS:
        raise UserError(f"--random-weights is {named}; memory is counted of {', '.join(MODELS)}")
    size = options.size or VIDEO_SIZE
    dtype = DTYPES[options.dtype or "bfloat16"]
    settings = load_settings(
        options.settings or "default",
        window_frames=options.window,
        sink_frames=options.sink,
        positions=options.positions,
    )
    text_bytes = text_encoder_bytes({**SIZES["umt5"], "feed_forward_proj": "gated-gelu"}, dtype)
    found: dict[str, dict[str, MemoryNeeds]] = {}
    for model in [named] if named else MODELS:
        found[model] = {}
        for name, saved in SAVINGS.items():
            needs = needs_of(model, Saving(**saved), settings, size, dtype, text_bytes)
            found[model][name] = needs
    frames = settings.sink_frames + settings.window_frames
    about = f"counted, not measured: one stream, {size[0]}x{size[1]}, K = {frames}, {dtype}"
    result = {
        model: {name: {**asdict(needs), "total": needs.total} for name, needs in rows.items()}
        for model, rows in found.items()
    }
    return "\n".join([about, "", *table(found)]), result


def needs_of(
    model: str,
    saving: Saving,
    settings: StreamSettings,
    size: tuple[int, int],
    dtype: torch.dtype,
    text_bytes: int,
) -> MemoryNeeds:
    """Of one of Wan's published models under Self-Forcing's recipe."""
    codec = meta_codec(dtype)
    codec.lean = saving.lean_vae
    streamed = Streamed(
        sizes=PUBLISHED_SIZES[model],
        codec=codec,
        text_bytes=text_bytes,
        latent_size=latent_size(size),
        chunk_frames=SELF_FORCING.chunk_frames,
        num_levels=len(SELF_FORCING.ladder) + 1,
        dtype=dtype,
    )
    return memory_needs(streamed, settings, saving)


def table(found: dict[str, dict[str, MemoryNeeds]]) -> list[str]:
    """GB by what they are for; the board is the smallest GPU that holds them."""
    heads = ("model", "saved", "student", "keys, values", "text", "VAE", "moment", "in all")
    lines = [f"| {' | '.join((*heads, 'board', 'host'))} |", "|" + "---|" * (len(heads) + 2)]
    for model, rows in found.items():
        for name, needs in rows.items():
            values = [*columns(needs), max(needs.moments.values()), needs.total]
            words = [f"{value / GIGA:.2f}" for value in values]
            board = "-" if needs.board is None else f"{needs.board}"
            host = f"{sum(needs.host.values()) / GIGA:.1f}"
            lines.append(f"| {' | '.join([model, name, *words, board, host])} |")
    return lines


def columns(needs: MemoryNeeds) -> list[int]:
    """Bytes of the student, of keys and values, of the text encoder, and of the VAE."""
    starts = ("student", ("keys", "prompt"), "text", "VAE")
    return [
        sum(bytes_ for name, bytes_ in needs.lasting.items() if name.startswith(start))
        for start in starts
    ]
