"""Captured CUDA graphs make the eager stream's frames. Run with `-m gpu`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from rehearsal import ON_GPU
from test_streaming_gpu import RAMP, stream_model

from selfforcing_dfd.streaming.session import StreamSession, StreamSettings
from selfforcing_dfd.streaming.static_calls import StaticStudent, with_graphs
from selfforcing_dfd.streaming.warm_up import warm_up

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if ON_GPU else [])
@pytest.mark.parametrize("positions", ["sink_relative", "absolute"])
@pytest.mark.parametrize("commits", [True, False])
def test_replayed_chunks_are_the_eager_ones(dtype, positions, commits):
    """Catches memory that moves between capture and replay: ramp, full window, prompts, resets.

    The same kernels on the same values: the frames are equal, bit for bit.
    """
    model = replace(stream_model("cuda", dtype), commits=commits)
    settings = StreamSettings(positions=positions)
    sessions = [
        StreamSession(each, "a disc moves", settings) for each in (model, with_graphs(model))
    ]

    def go_on(num_chunks: int) -> None:
        for _ in range(num_chunks):
            assert torch.equal(*(session.next_chunk().frames for session in sessions))

    go_on(RAMP + 4)
    for mode in ("recache", "flush", "keep"):
        for session in sessions:
            session.set_prompt("a cross moves", mode)
        go_on(3)
    for session in sessions:
        session.reset("a square moves", seed=2)
    go_on(RAMP)


@pytest.mark.parametrize("device", ["cuda"] if ON_GPU else [])
def test_nothing_is_captured_after_the_warm_up(device):
    """Catches a graph that is captured in mid-stream, and a host that waits for the device."""
    session = StreamSession(with_graphs(stream_model(device)), "a disc moves")
    warm_up(session)
    static = session._student
    assert isinstance(static, StaticStudent)
    captured = static.num_programs
    for _ in range(RAMP):
        session.next_chunk()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            session.next_chunk()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert static.num_programs == captured


@pytest.mark.parametrize("device", ["cuda"] if ON_GPU else [])
def test_other_threads_go_on_while_graphs_are_captured(device):
    """Catches a capture that another thread's stream breaks, or that breaks it.

    That one allocates, copies frames to the host, drops them, and asks whether copies are done.
    """
    model = stream_model(device)
    alone = StreamSession(model, "a disc")
    wanted = [alone.next_chunk().frames for _ in range(40)]
    with ThreadPoolExecutor(1) as other:
        session = StreamSession(model, "a disc")
        beside = other.submit(lambda: [session.next_chunk().frames for _ in range(40)])
        captured = StreamSession(with_graphs(model), "a disc")
        made = [captured.next_chunk().frames for _ in range(RAMP + 4)]
        assert all(map(torch.equal, beside.result(), wanted))
    assert all(map(torch.equal, made, wanted))
