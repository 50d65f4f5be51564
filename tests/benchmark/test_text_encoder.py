"""A first frame with its text encoder, and without one where the prompt is known."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_network

from selfforcing_dfd import rng
from selfforcing_dfd.benchmark import measure
from selfforcing_dfd.benchmark.headline import headline
from selfforcing_dfd.benchmark.measure import Bench, Plan
from selfforcing_dfd.benchmark.text_encoder import NUM_TOKENS, SIZES, RandomText, random_text
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec


@pytest.fixture
def bench() -> tuple[Bench, RandomText]:
    """Three restarts of a tiny stream, with its encoder."""
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0)
    student = tiny_network(dtype=torch.float32, in_channels=16, out_channels=16, num_layers=1)
    text = random_text("umt5-small", 12, torch.device("cpu"), torch.float32)
    model = StreamModel(student.requires_grad_(False), codec, text, (1.0,), 3, (4, 6))
    return Bench(model, StreamSettings(), ("one", "another"), Plan(num_restarts=3)), text


def test_a_first_frame_waits_for_no_work_of_the_stream_before(bench, monkeypatch):
    """Catches a commit pass of the stream before in the time to the first frame of the next."""
    timed, _ = bench
    session, _ = timed.start()
    happened = []
    reset = StreamSession.reset
    monkeypatch.setattr(measure, "wait_for", lambda device: happened.append("idle"))
    monkeypatch.setattr(
        StreamSession, "reset", lambda *args: happened.append("reset") or reset(*args)
    )
    timed.restarts(session)
    assert happened == ["idle", "reset"] * 6


def test_the_encoder_is_in_one_figure_and_not_in_the_other(bench):
    """Catches a cached prompt that is encoded all the same, and an encoder that is left out."""
    bench, text = bench
    passes = []
    text.encoder.register_forward_hook(lambda *_: passes.append(1))
    session, _ = bench.start()
    assert len(passes) == 1
    starts = bench.restarts(session)
    assert len(passes) == 1 + 3 + 2  # each of the warm ones; then each prompt once, in advance
    assert {name: len(trials) for name, trials in starts.items()} == {"warm": 3, "cached": 3}
    session.set_prompt("one")
    assert len(passes) == 7  # later figures are with the encoder again


def test_the_stand_in_has_the_shape_of_wans_encoder():
    """Catches an encoder of another size than UMT5-XXL, another output, and a second table."""
    sizes = SIZES["umt5"]
    of_attention = 4 * sizes["d_model"] * sizes["num_heads"] * sizes["d_kv"]
    of_feed_forward = 3 * sizes["d_model"] * sizes["d_ff"]
    parameters = sizes["num_layers"] * (of_attention + of_feed_forward)
    parameters += sizes["vocab_size"] * sizes["d_model"]
    assert parameters == pytest.approx(5.68e9, rel=0.01)
    text = random_text("umt5-small", 12, torch.device("cpu"), torch.float32)
    one, other = text.encode(["a disc", "a cross"])
    assert one.shape == (512, 12)
    assert one[:NUM_TOKENS].isfinite().all() and not one[NUM_TOKENS:].any()
    assert not torch.equal(one, other)
    assert text.encoder.shared.weight is text.encoder.encoder.embed_tokens.weight
    assert torch.equal(one, text.encode(["a disc"])[0])


def test_a_benchmark_says_both(capsys):
    """Catches figures of a text encoder that nobody asked for, and a width that does not fit."""
    options = ["benchmark", "--quick", "--chunks", "1", "--device", "cpu", "--prompt-trials", "0"]
    assert main([*options, "--text-encoder", "umt5-small"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["environment"]["text_encoder"] == "umt5-small"
    assert "from the prompt" in headline(result)[2] and "with a cached one" in headline(result)[2]
    assert main([*options, "--text-encoder", "umt5"]) == 2
    assert "makes text of width 4096, and this student takes 32" in capsys.readouterr().err
