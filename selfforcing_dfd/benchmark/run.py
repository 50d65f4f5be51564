"""The benchmark's command: from its options to a table and a result."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.benchmark.flops import device_peak
from selfforcing_dfd.benchmark.headline import headline
from selfforcing_dfd.benchmark.measure import Plan, measure
from selfforcing_dfd.benchmark.table import (
    environment,
    environment_lines,
    read_result,
    remarks,
    table,
)
from selfforcing_dfd.benchmark.verdict import comparison, differences, ratios, verdict
from selfforcing_dfd.codecs.small_codec import SmallCodec
from selfforcing_dfd.common import DTYPES, UserError, find_device
from selfforcing_dfd.models.fp8 import use_fp8
from selfforcing_dfd.streaming.decoders import (
    compare_decoders,
    wants_small,
    with_decoder,
    with_random_decoder,
)
from selfforcing_dfd.streaming.load import choose_kernel, load_settings, load_stream_model
from selfforcing_dfd.streaming.session import StreamModel, StreamSettings
from selfforcing_dfd.streaming.static_calls import with_graphs
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.weights.recipes import asked_by

PROMPTS = ("a disc moves", "a square moves")


def build_model(options: argparse.Namespace, settings: StreamSettings) -> StreamModel:
    """The model that the options ask for: resolution, dtype, kernels and devices.

    Raises UserError for options that cannot be.
    """
    if options.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype is {options.dtype}; use {', '.join(DTYPES)}")
    dtype = DTYPES[options.dtype] if options.dtype else None
    recipe = asked_by(options)
    if options.random_weights:
        if options.run or options.weights:
            raise UserError(
                "--random-weights goes without --run and --weights; drop it, or drop them"
            )
        from selfforcing_dfd.streaming.random_model import random_stream_model

        model = random_stream_model(options.random_weights, options.device, dtype, recipe=recipe)
    else:
        model = load_stream_model(options.run, options.weights, options.device, recipe)
        torch.nn.Module.to(model.student, dtype or model.dtype)
    model = replace(model, latent_size=latent_size(options, model))
    if options.text_encoder:
        from selfforcing_dfd.benchmark.text_encoder import random_text

        text_dim = model.student.config["text_dim"]
        text = random_text(options.text_encoder, text_dim, model.device, model.dtype)
        model = replace(model, text=text)
    if options.vae_device:
        model = decode_on(model, find_device(options.vae_device))
    model = decode_by(model, options)
    choose_kernel(model, settings, options.attention)
    if options.fp8:
        use_fp8(model.student)
    if options.offload:
        model.student.offload_blocks(model.device, options.offload)
    if options.compile:
        model.compile()
    return with_graphs(model) if options.cuda_graph else model


def latent_size(options: argparse.Namespace, model: StreamModel) -> tuple[int, int]:
    """Rows and columns of the latents for --size."""
    height, width = options.size or model.video_size
    stride = model.codec.strides[1]
    multiple = stride * model.student.patch[1]
    if height <= 0 or width <= 0 or height % multiple or width % multiple:
        raise UserError(
            f"--size {height}x{width}: height and width must be positive multiples of {multiple}"
        )
    return height // stride, width // stride


def decode_on(model: StreamModel, device: torch.device) -> StreamModel:
    """The same model with its codec on another device."""
    codec: Any = model.codec
    return replace(model, codec=moved(codec, device), decode_device=device)


def decode_by(model: StreamModel, options: argparse.Namespace) -> StreamModel:
    """The same model with the decoder of --decoder; Wan's of random weights, if none are named."""
    is_tiny = isinstance(model.codec, TinyCodec)
    weights = options.decoder_weights
    is_small = wants_small(options.decoder, weights, is_tiny)
    if is_small and weights is None and options.random_weights and not is_tiny:
        return with_random_decoder(model)
    return with_decoder(model, options.decoder, weights)


def describe_decoder(
    model: StreamModel, settings: StreamSettings, is_random: bool
) -> dict[str, Any] | None:
    """The small decoder's name, and how far it is from the full one.

    None for the codec's own decoder. Nothing is compared where weights are random.
    """
    if not isinstance(model.codec, SmallCodec):
        return None
    found = None if is_random else compare_decoders(model, settings, PROMPTS[0])
    return {"name": model.codec.name, "fidelity": None if found is None else found.as_dict()}


def moved(codec: Any, device: torch.device) -> Any:
    """A codec on another device."""
    if not isinstance(codec, TinyCodec):
        from selfforcing_dfd.codecs.wan_vae import WanCodec

        if isinstance(codec, WanCodec):
            return WanCodec(codec.vae.to(device), channels_last=device.type == "cuda")
    return codec.to(device)


def benchmark(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What is printed, and the result. Raises UserError for options that cannot be."""
    check_baseline(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = load_settings(
        options.settings or "default",
        seed=options.seed,
        window_frames=options.window,
        sink_frames=options.sink,
        positions=options.positions,
    )
    model = build_model(options, settings)
    text_encoder = options.text_encoder or type(model.text).__name__
    weights = "random" if options.random_weights else "trained"
    facts = environment(
        model,
        settings,
        compile=options.compile,
        size=options.random_weights or "tiny",
        weights=weights,
        fp8=options.fp8,
        offload=options.offload or 0,
        cuda_graph=options.cuda_graph,
        text_encoder=text_encoder,
    )
    timings = dict(model.student.attention.timings_ms)
    figures = measure(model, settings, PROMPTS, plan_of(options, model))
    baseline = against_diffusers(options, model, settings) if options.baseline else None
    decoder = describe_decoder(model, settings, bool(options.random_weights))
    result = {
        "environment": facts,
        "attention_timings_ms": timings,
        "small_decoder": decoder,
        **figures,
        "baseline": baseline,
    }
    return summary(result, options.full), result


def check_baseline(options: argparse.Namespace) -> None:
    """Raise UserError for models that diffusers has no loop for, before anything is measured."""
    if options.baseline and not (options.random_weights or "").startswith("wan"):
        raise UserError(
            "--baseline is diffusers' pipeline of Wan, which has no tiny world; "
            "add --random-weights wan1.3b, or drop it"
        )


def against_diffusers(
    options: argparse.Namespace, model: StreamModel, settings: StreamSettings
) -> dict[str, Any]:
    """A clip by this model's stream and by diffusers' loop, one after the other."""
    from selfforcing_dfd.benchmark.baseline import compare_with_diffusers
    from selfforcing_dfd.streaming.random_model import random_stream_model

    # built anew from the same seed: the other one may be compiled, or in 8 bits
    plain = random_stream_model(options.random_weights, options.device, model.dtype)
    plain = replace(plain, latent_size=model.latent_size, ladder=model.ladder)
    return compare_with_diffusers(model, plain, settings, options.compile)


def summary(result: dict[str, Any], full: bool) -> str:
    """Where it was measured, and five lines on what; full: then all figures."""
    lines = [*environment_lines(result), "", *headline(result)]
    lines += remarks(result)
    if full:
        lines += ["", table(result)]
    return "\n".join(lines)


def plan_of(options: argparse.Namespace, model: StreamModel) -> Plan:
    """How much is measured; --quick means little."""
    num_chunks = options.chunks
    if num_chunks is None:
        num_chunks = 6 if options.quick else 300
    num_trials = options.prompt_trials
    if num_trials is None:
        num_trials = 2 if options.quick else 20
    return Plan(
        num_chunks=num_chunks,
        num_warmup=options.warmup,
        num_prompt_trials=num_trials,
        playback_fps=options.fps,
        peak_tflops=options.peak_tflops or device_peak(model),
        dit_only=options.dit_only,
    )


def count_decoder(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Operators and bytes of a latent frame: diffusers' decoder, ours, and small ones."""
    from selfforcing_dfd.benchmark.operators import decoder_work, small_decoder_work
    from selfforcing_dfd.codecs.wan_vae import VIDEO_SIZE

    size = options.size or VIDEO_SIZE
    dtype = DTYPES[options.dtype or "bfloat16"]
    found = decoder_work(size, dtype) | small_decoder_work(size, dtype)
    lines = [f"a latent frame of Wan's VAE, {size[0]}x{size[1]}, {dtype}, uncompiled, on CUDA"]
    for name, work in found.items():
        gigabytes = work.num_bytes / 1e9
        lines.append(f"{name:10} {work.operators:5} operators {gigabytes:7.1f} GB moved")
    return "\n".join(lines), {name: asdict(work) for name, work in found.items()}


def compare(first: Path, second: Path) -> tuple[str, dict[str, Any]]:
    """Two saved results side by side, with their ratios and a verdict."""
    one = read_result(first)
    other = read_result(second)
    answer = {
        "verdict": verdict(one, other),
        "ratios": ratios(one, other),
        "differences": differences(one, other),
    }
    return comparison(one, other, (str(first), str(second))), answer
