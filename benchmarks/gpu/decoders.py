"""Stage `decoder`: a latent frame by Wan's VAE in each layout, plain and compiled; by others."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.record import Machine, Record
from benchmarks.gpu.timing import forget_peak, milliseconds, peak_gb, rate, wait
from selfforcing_dfd.codecs.protocol import StreamingCodec
from selfforcing_dfd.codecs.small_codec import SmallCodec
from selfforcing_dfd.codecs.small_decoder import DecoderSize, SmallDecoder
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.cost import decode_flops
from selfforcing_dfd.streaming.random_model import TINY_VAE

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FRAMES_OF_DIFFUSERS = 4


def measure(record: Record) -> None:
    machine = record.machine
    for layout in ("channels_last", "contiguous"):
        for way in ("plain", "compiled"):
            name = f"bfloat16, {layout}, {way}"
            record.row(name, partial(ours, machine, "bfloat16", layout, way))
    name = "float16, channels_last, plain"
    record.row(name, partial(ours, machine, "float16", "channels_last", "plain"))
    for way in ("plain", "compiled"):
        record.row(f"bfloat16, small decoder, {way}", partial(small, machine, way))
    record.row("bfloat16, diffusers", lambda: diffusers_own(machine))


def latent_size(machine: Machine) -> tuple[int, int]:
    return (4, 6) if machine.small else (60, 104)


def vae_of(machine: Machine, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKLWan

    with torch.device(machine.device):
        vae: Any = AutoencoderKLWan(**(TINY_VAE if machine.small else {}))
    return vae.to(dtype)


def latent_frames(machine: Machine, number: int) -> Tensor:
    return torch.randn(1, number, 16, *latent_size(machine), device=machine.device)


@torch.inference_mode()
def ours(machine: Machine, dtype: str, layout: str, way: str) -> dict[str, Any]:
    """Milliseconds and rate of a latent frame in the middle of a stream, and the peak memory."""
    forget_peak(machine.device)
    torch._dynamo.reset()
    vae = vae_of(machine, DTYPES[dtype])
    codec = WanCodec(vae, channels_last=layout == "channels_last")
    if way == "compiled":
        codec.compile_decoding(**machine.compiler())
    with torch.device("meta"):
        from diffusers import AutoencoderKLWan

        shapes = WanCodec(AutoencoderKLWan.from_config(vae.config))
    found = decoded(machine, codec)
    return {**rate(decode_flops(shapes, latent_size(machine)), found["ms"]), **found}


@torch.inference_mode()
def small(machine: Machine, way: str) -> dict[str, Any]:
    """The small decoder of Wan's size, with random weights."""
    forget_peak(machine.device)
    torch._dynamo.reset()
    network = SmallDecoder(DecoderSize())
    network.init_weights(torch.Generator().manual_seed(0))
    nn.Module.to(network, machine.device, torch.bfloat16)
    codec = SmallCodec(network, WanCodec(vae_of(machine, torch.bfloat16)))
    if way == "compiled":
        codec.compile_decoding(**machine.compiler())
    return decoded(machine, codec)


def decoded(machine: Machine, codec: StreamingCodec) -> dict[str, Any]:
    """Milliseconds of a latent frame, seconds of a video's first two, and the peak memory."""
    decoder = codec.start_decoding()
    z = latent_frames(machine, 1)
    begun = time.perf_counter()
    for _ in range(2):  # a video's first latent frame has a program of its own
        decoder.decode(z)
    wait(machine.device)
    started_s = time.perf_counter() - begun
    peak = peak_gb(machine.device)  # before the clock takes memory of its own
    ms = milliseconds(lambda: decoder.decode(z), machine.device, repeats=12, warm=3)
    return {"ms": ms, "first two, s": started_s, "peak GB": peak}


@torch.inference_mode()
def diffusers_own(machine: Machine) -> dict[str, Any]:
    """A latent frame of diffusers' own decode of a short clip: its later frames' share."""
    forget_peak(machine.device)
    vae = vae_of(machine, torch.bfloat16)

    def decode(number: int) -> Callable[[], object]:
        z = latent_frames(machine, number).transpose(1, 2).to(torch.bfloat16)
        return lambda: vae.decode(z)

    numbers = (1, 1 + FRAMES_OF_DIFFUSERS)
    for number in numbers:
        decode(number)()
    wait(machine.device)
    peak = peak_gb(machine.device)
    ms = [milliseconds(decode(number), machine.device, repeats=3, warm=1) for number in numbers]
    return {"ms": (ms[1] - ms[0]) / FRAMES_OF_DIFFUSERS, "peak GB": peak}
