"""A compiled stream on a CUDA device: the plain stream's video, and programs for the ramp alone."""

from __future__ import annotations

import pytest
import torch
from rehearsal import COMPILER, DEVICE
from torch import Tensor
from torch._dynamo.utils import counters

from selfforcing_dfd.streaming.random_model import random_stream_model
from selfforcing_dfd.streaming.session import StreamSession, StreamSettings

pytestmark = pytest.mark.gpu
RAMP = 4
"""Chunks until the window of nine and the sink of three are full."""
SETTINGS = StreamSettings()
TOLERANCE_DB = 0.5
"""In 16 bits two orders of sums part; over one chunk that moves the PSNR by less."""


def session_of(dtype: torch.dtype, compiled: bool, device: torch.device = DEVICE) -> StreamSession:
    """Wan's classes at a small size; weights and noise are the same for all."""
    model = random_stream_model("wan-tiny", "cpu", dtype)
    model.student.to(device)
    codec = model.codec
    codec.vae.to(device)  # type: ignore[attr-defined]
    on_device = type(codec)(codec.vae, channels_last=device.type == "cuda")  # type: ignore
    model = type(model)(
        model.student, on_device, model.text, model.ladder, model.chunk_frames, model.latent_size
    )
    if compiled:
        model.compile(**COMPILER)
    return StreamSession(model, "a disc moves", SETTINGS)


def chunks(session: StreamSession, number: int) -> list[Tensor]:
    return [session.next_chunk().frames.int() for _ in range(number)]


def psnr(frames: Tensor, wanted: Tensor) -> float:
    return float(-10 * ((frames - wanted) / 255).square().mean().log10())


def test_compiled_code_makes_the_same_video():
    """Catches a program that misreads a slot, a position or a room, from any chunk on.

    float64, so that kernels differ by rounding only: a value on the edge between two of 256.
    """
    torch._dynamo.reset()
    plain = chunks(session_of(torch.float64, compiled=False), RAMP + 2)
    compiled = chunks(session_of(torch.float64, compiled=True), RAMP + 2)
    for one, other in zip(plain, compiled, strict=True):
        assert (one - other).abs().max() <= 1


def test_in_16_bits_it_is_as_near_to_float32():
    """Catches a fused kernel that keeps fewer bits than the operators that it replaces."""
    torch._dynamo.reset()
    cpu = torch.device("cpu")
    (wanted,) = chunks(session_of(torch.float32, compiled=False, device=cpu), 1)
    (plain,) = chunks(session_of(torch.bfloat16, compiled=False), 1)
    (compiled,) = chunks(session_of(torch.bfloat16, compiled=True), 1)
    assert psnr(compiled, wanted) >= psnr(plain, wanted) - TOLERANCE_DB


def test_nothing_is_compiled_after_the_ramp():
    """Catches a chunk in mid-stream that waits for a compiler, and code that breaks a program."""
    torch._dynamo.reset()
    counters.clear()
    session = session_of(torch.bfloat16, compiled=True)
    chunks(session, RAMP + 1)
    ready = counters["stats"]["unique_graphs"]
    assert ready > 0
    chunks(session, 3)
    session.reset("a square moves")
    chunks(session, RAMP + 1)
    assert counters["stats"]["unique_graphs"] == ready
    assert not counters["graph_break"]
