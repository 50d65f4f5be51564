"""Streaming on a CUDA device: the CPU's video, and a host that waits for its frames only."""

from __future__ import annotations

import pytest
import torch
from rehearsal import DEVICE, allocated, errors_where_the_host_waits
from tiny_models import LADDER, tiny_network

from selfforcing_dfd import rng
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

pytestmark = pytest.mark.gpu
RAMP = 6


def stream_model(device: str, dtype: torch.dtype = torch.float32) -> StreamModel:
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0).to(
        torch.device(device)
    )
    student = (
        tiny_network(dtype=dtype, in_channels=16, out_channels=16).requires_grad_(False).to(device)
    )
    return StreamModel(student, codec, TinyText(12), LADDER, 3, (4, 6))


def test_a_chunk_waits_for_its_frames_only():
    """Catches a hidden `.item()`, a copy from pageable memory, and a blocking stage clock (T9)."""
    session = StreamSession(stream_model(str(DEVICE)), "a disc moves")
    for _ in range(RAMP):
        session.next_chunk()
    with errors_where_the_host_waits():
        for _ in range(4):
            session.next_chunk()


@pytest.mark.parametrize("positions", ["sink_relative", "absolute"])
def test_the_gpu_makes_the_cpus_video(positions):
    """Catches frames that are returned before their copy is done.

    float64, so that kernels differ by rounding only.
    """
    settings = StreamSettings(positions=positions)
    sessions = [
        StreamSession(stream_model(device, torch.float64), "a disc moves", settings)
        for device in ("cpu", str(DEVICE))
    ]
    for _ in range(RAMP + 3):
        one, other = (session.next_chunk().frames.int() for session in sessions)
        assert (one - other).abs().max() <= 1  # a value on the edge between two of 256


def test_memory_does_not_grow():
    """Catches pinned buffers or events that pile up.

    Allocated bytes are the same after each chunk of the steady state.
    """
    session = StreamSession(stream_model(str(DEVICE)), "a disc moves")
    for _ in range(RAMP):
        session.next_chunk()
    sizes = set()
    for _ in range(20):
        session.next_chunk()
        sizes.add(allocated())
    assert len(sizes) == 1
