"""What `inference/benchmark.py` does: from its options to a table and a result."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.benchmark.flops import device_peak
from selfforcing_dfd.benchmark.measure import Plan, measure
from selfforcing_dfd.benchmark.table import (
    comparison,
    differences,
    environment,
    ratios,
    read_result,
    table,
)
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.common import find_device
from selfforcing_dfd.models.fp8 import use_fp8
from selfforcing_dfd.streaming.load import load_settings, load_stream_model, random_stream_model
from selfforcing_dfd.streaming.session import StreamModel

PROMPTS = ("a disc moves", "a square moves")
DTYPES = {
    None: None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def build_model(options: argparse.Namespace) -> StreamModel:
    """The model that the options ask for, at their resolution, in their dtype, with their kernels,
    where they want it.
    """
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype is {options.dtype}; use float32, bfloat16 or float16")
    dtype = DTYPES[options.dtype]
    if options.random_weights:
        if options.run or options.weights:
            raise ValueError(
                "--random-weights goes without --run and --weights; drop it, or drop them"
            )
        model = random_stream_model(options.random_weights, options.device, dtype)
    else:
        model = load_stream_model(options.run, options.weights, options.device)
        torch.nn.Module.to(model.student, dtype or model.dtype)
    height, width = options.size or model.video_size
    stride = model.codec.strides[1] * model.student.patch[1]
    if height % stride or width % stride or height < stride or width < stride:
        raise ValueError(
            f"--size {height}x{width}: height and width must be positive multiples of {stride}"
        )
    if options.vae_device:
        model = decode_on(model, find_device(options.vae_device))
    model.student.set_attention(options.attention)
    if options.fp8:
        use_fp8(model.student)
    if options.compile:
        model.student.compile_blocks()
    return replace(
        model, latent_size=(height // model.codec.strides[1], width // model.codec.strides[1])
    )


def decode_on(model: StreamModel, device: torch.device) -> StreamModel:
    """The same model with its codec on another device."""
    codec: Any = model.codec
    if isinstance(codec, WanCodec):
        return replace(
            model, codec=WanCodec(codec.vae.to(device), device.type == "cuda"), decode_device=device
        )
    return replace(model, codec=codec.to(device), decode_device=device)


def benchmark(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The table and the result. Raises ValueError for options that cannot be."""
    if options.threads:
        torch.set_num_threads(options.threads)
    past = {
        "window_frames": options.window,
        "sink_frames": options.sink,
        "positions": options.positions,
    }
    settings, model = (
        load_settings(options.settings or "default", seed=options.seed, **past),
        build_model(options),
    )
    choices = {
        "size": options.random_weights or "tiny",
        "weights": "random" if options.random_weights else "trained",
        "fp8": options.fp8,
    }
    facts = environment(model, settings, compile=options.compile, **choices)
    num_chunks, num_trials = (6, 2) if options.quick else (300, 20)
    plan = Plan(
        num_chunks=num_chunks if options.chunks is None else options.chunks,
        num_warmup=options.warmup,
        num_prompt_trials=num_trials if options.prompt_trials is None else options.prompt_trials,
        playback_fps=options.fps,
        peak_tflops=options.peak_tflops or device_peak(model),
        dit_only=options.dit_only,
    )
    result = {"environment": facts, **measure(model, settings, PROMPTS, plan)}
    return table(result), result


def compare(first: Path, second: Path) -> tuple[str, dict[str, Any]]:
    """Two saved results side by side, with their ratios."""
    results = read_result(first), read_result(second)
    text = comparison(*results, (str(first), str(second)))
    return text, {"ratios": ratios(*results), "warnings": differences(*results)}
