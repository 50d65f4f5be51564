"""The baseline makes the same video, so that only its cost differs."""

from __future__ import annotations

import pytest
import torch
from naive import COSTS, NaiveCache, NaiveSession, compare_with_naive, rotary_table
from tiny_models import LADDER, tiny_network

from selfforcing_dfd import rng
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

PROMPT = "a disc moves"
CHUNKS = 8  # K = 12 is full after four; the last ones have forgotten chunks between sink and window
ROUNDING = 1e-9  # float64, some thousand operations deep and fed back chunk by chunk


@pytest.fixture(scope="module")
def model() -> StreamModel:
    """Two layers in float64 on 4 x 6 latents."""
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0)
    network = tiny_network(in_channels=16, out_channels=16).requires_grad_(False)
    return StreamModel(network, codec, TinyText(12), LADDER, 3, (4, 6))


def newest_latents(session: StreamSession) -> torch.Tensor:
    pending = session.snapshot().pending
    assert pending is not None
    return pending[0]


@pytest.mark.parametrize(
    ("positions", "sink", "window"),
    [
        ("window_relative", 3, 9),
        ("window_relative", 0, 9),
        ("sink_relative", 3, 9),
        ("absolute", 0, 6),
    ],
)
def test_the_naive_cache_generates_the_same_video(model, positions, sink, window):
    """Catches a baseline with other chunks in its window, other positions or other noise."""
    settings = StreamSettings(seed=3, sink_frames=sink, window_frames=window, positions=positions)
    ours = StreamSession(model, PROMPT, settings)
    naive = NaiveSession(model, PROMPT, settings)
    for _ in range(CHUNKS):
        a = ours.next_chunk()
        b = naive.next_chunk()
        torch.testing.assert_close(naive.latents, newest_latents(ours), rtol=0, atol=ROUNDING)
        assert torch.equal(a.frames, b.frames)


def test_the_past_matters_to_the_test_above(model):
    """Catches an equality that holds only because the random network ignores its context.

    A shorter window must give another video.
    """
    long, short = (
        NaiveSession(model, PROMPT, StreamSettings(sink_frames=3, window_frames=window))
        for window in (9, 6)
    )
    for _ in range(CHUNKS):
        long.next_chunk()
        short.next_chunk()
    assert (long.latents - short.latents).abs().max() > 1e-3  # a million times the tolerance above


def test_the_cache_stays_as_long_as_the_window(model):
    """Catches a baseline that grows, and so gets slower the longer it runs.

    Sink and history are 9 of K = 12 frames.
    """
    naive = NaiveSession(model, PROMPT, StreamSettings())
    lengths = []
    for _ in range(CHUNKS):
        naive.next_chunk()
        lengths.append([k.shape[1] // 6 for k, _ in naive._cache.read().layers])
    assert lengths == [[], [3, 3], [6, 6], *[[9, 9]] * (CHUNKS - 3)]


def test_an_absolute_sink_is_refused(model):
    """Catches a comparison of two different videos."""
    with pytest.raises(ValueError, match="use sink_relative"):
        NaiveSession(model, PROMPT, StreamSettings(positions="absolute"))


def test_both_are_timed_in_one_run(model):
    """Catches an inverted ratio, costs outside all profiler ranges, and costs counted twice."""
    result = compare_with_naive(model, PROMPT, StreamSettings(), num_chunks=3)
    assert result["ratio"] == pytest.approx(result["ours_p50_ms"] / result["naive_p50_ms"])
    assert result["least_possible_ratio"] == pytest.approx(
        result["matrix_products_ms"] / result["naive_p50_ms"]
    )
    assert set(result["naive_costs_ms"]) == set(COSTS)
    assert 0 < result["least_possible_ratio"] < 1


def test_the_table_turns_by_the_frequencies_of_the_network():
    """Catches a table with another base or other widths of the axes.

    The second pair in time turns by exp(i * 3 * 10000^(-2/8)).
    """
    time, rows, columns = rotary_table(16, torch.device("cpu"))
    assert [part.shape[1] for part in (time, rows, columns)] == [4, 2, 2]
    angle = torch.tensor(3 * 10000 ** (-2 / 8), dtype=torch.float64)
    torch.testing.assert_close(
        time[3, 1], torch.complex(angle.cos(), angle.sin()), rtol=0, atol=1e-15
    )


def test_nothing_is_remembered_at_first():
    """Catches state that two caches share."""
    table = rotary_table(16, torch.device("cpu"))
    assert NaiveCache(table, (2, 3), 3, 9).read().layers == ()
