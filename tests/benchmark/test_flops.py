"""Operations of a chunk, and the rate that they are done at."""

from __future__ import annotations

import torch
from tiny_models import LADDER, SHAPE, TEXT_LENGTH, tiny_network

from selfforcing_dfd.benchmark.flops import ChunkFlops, chunk_flops, utilisation
from selfforcing_dfd.cost import network_flops
from selfforcing_dfd.streaming.session import StreamModel, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText


def test_a_chunk_is_its_parts():
    """Catches a commit pass that is counted twice, or not at all."""
    flops = ChunkFlops(denoise=40, commit=10, decode=7)
    assert (flops.dit, flops.total, flops.as_dict()["total"]) == (50, 57, 57)
    assert flops.as_dict() == {"denoise": 40, "commit": 10, "decode": 7, "total": 57}


def test_a_steady_chunk_sees_sink_and_window():
    """Catches a sink that is not seen, and a window that counts the chunk twice."""
    network = tiny_network(in_channels=16, out_channels=16)
    codec = TinyCodec(torch.randn(192, 16), torch.randn(768, 16), 1.0)
    model = StreamModel(network, codec, TinyText(), LADDER, 2, SHAPE[1:])
    flops = chunk_flops(model, StreamSettings(sink_frames=4, window_frames=6), TEXT_LENGTH)
    one = network_flops(network, 1, (2,), SHAPE[1:], TEXT_LENGTH, (8,), prepared=True)
    assert (flops.commit, flops.denoise) == (one, 4 * one)
    assert flops.decode == 2 * 2 * SHAPE[1] * SHAPE[2] * 16 * 768


def test_utilisation_needs_a_stated_peak():
    """Catches a factor of a thousand (1 TFLOP in 10 ms is 100 TFLOP/s), and a share of nothing."""
    assert utilisation(10**12, 10.0, 400.0) == {"tflops_per_s": 100.0, "mfu": 0.25}
    assert utilisation(10**12, 10.0, None) == {"tflops_per_s": 100.0, "mfu": None}
