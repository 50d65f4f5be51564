"""Streams by a small decoder: of the tiny world trained, of Wan with random weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import LADDER, tiny_network
from tiny_wan import tiny_vae

from selfforcing_dfd import StreamSession, load_stream_model
from selfforcing_dfd.benchmark.flops import on_meta
from selfforcing_dfd.cli.main import main, parse
from selfforcing_dfd.codecs.fidelity import CheckedCodec
from selfforcing_dfd.codecs.small_codec import SmallCodec
from selfforcing_dfd.codecs.small_decoder import DecoderSize, SmallDecoder
from selfforcing_dfd.codecs.taew import TaewDecoder
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.common import UserError
from selfforcing_dfd.cost import decode_flops
from selfforcing_dfd.live.play import describe_model, prepare
from selfforcing_dfd.live.web.shared import Student
from selfforcing_dfd.streaming.decoders import (
    TINY_DECODER,
    shared,
    with_decoder,
    with_random_decoder,
)
from selfforcing_dfd.streaming.model import StreamModel
from selfforcing_dfd.streaming.session import StreamSettings
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.weights.decoders import decoder_metadata

SETTINGS = StreamSettings(sink_frames=3, window_frames=6)


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return load_stream_model(device="cpu")


def wan_model() -> StreamModel:
    """A network of a few weights with a VAE of Wan's layers, an eighth as wide."""
    student = tiny_network(dtype=torch.float32, in_channels=16, out_channels=16).requires_grad_(
        False
    )
    return StreamModel(
        student=student,
        codec=WanCodec(tiny_vae()),
        text=TinyText(student.config["text_dim"]),
        ladder=LADDER,
        chunk_frames=3,
        latent_size=(4, 6),
    )


def test_the_shipped_decoder_is_near_the_codec(model: StreamModel) -> None:
    """Catches a shipped file of another codec, and frames that are out of step with the codec's.

    docs/speed.md states what it reaches on clips that it has not seen.
    """
    small = with_decoder(model, "small", None)
    assert isinstance(small.codec, SmallCodec)
    checked = CheckedCodec(small.codec)
    session = StreamSession(replace(model, codec=checked), "a disc moves", SETTINGS)
    ours = [session.next_chunk().frames for _ in range(2)]
    plain = StreamSession(model, "a disc moves", SETTINGS)
    full = [plain.next_chunk().frames for _ in range(2)]
    assert [len(frames) for frames in ours] == [9, 12]
    found = checked.comparison.result()
    assert found.video_frames == 21
    assert found.psnr_db > 34
    assert found.flicker < found.change
    error = (torch.cat(ours).float() - torch.cat(full).float()) / 255
    # the frames are rounded to bytes
    assert -10 * float(error.square().mean().log10()) == pytest.approx(found.psnr_db, abs=0.2)


def test_a_snapshot_holds_its_past(model: StreamModel) -> None:
    """Catches a past that a snapshot shares with the stream that goes on."""
    session = StreamSession(with_decoder(model, "small", None), "a disc moves", SETTINGS)
    session.next_chunk()
    held = session.snapshot()
    first = session.next_chunk().frames
    session.restore(held)
    assert torch.equal(session.next_chunk().frames, first)


def test_what_is_asked_for_is_what_decodes(model: StreamModel, tmp_path: Path) -> None:
    """Catches a decoder that is taken in silence, weights without effect, and a wrong world."""
    assert with_decoder(model, None, None) is model
    assert with_decoder(model, "tiny", None) is model
    named = with_decoder(model, None, TINY_DECODER)
    assert "small decoder" in describe_model("mine", named)
    assert "decoder.safetensors" in describe_model("mine", named)
    assert "small decoder" not in describe_model("mine", model)
    for name, weights, message in (
        ("wan", None, "--decoder is wan, but these are latents of tiny; use --decoder tiny"),
        ("tiny", TINY_DECODER, "would have no effect with --decoder tiny"),
        ("small", tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            with_decoder(model, name, weights)
    path = tmp_path / "taew2_1.safetensors"
    save_file(dict(TaewDecoder().state_dict()), path)
    with pytest.raises(UserError, match=r"decodes latents of the VAE of Wan2\.1, but these are of"):
        with_decoder(model, "small", path)
    with pytest.raises(UserError, match="--decoder small wants --decoder-weights FILE"):
        with_decoder(wan_model(), "small", None)


@pytest.mark.parametrize("kind", ["small", "taew2_1", "random"])
def test_wan_latents_stream(kind: str, tmp_path: Path) -> None:
    """Catches sizes, dtypes and a first frame that fit the tiny world alone."""
    size = DecoderSize(widths=(8, 8, 8), depths=(1, 1, 1))
    path = tmp_path / "decoder.safetensors"
    if kind == "small":
        network = SmallDecoder(size)
        save_file(dict(network.state_dict()), path, decoder_metadata(size, "wan-vae-0123"))
    else:
        save_file(dict(TaewDecoder().state_dict()), path)
    plain = wan_model()
    model = with_random_decoder(plain) if kind == "random" else with_decoder(plain, "small", path)
    session = StreamSession(model, "a disc moves", SETTINGS)
    frames = [session.next_chunk().frames for _ in range(2)]
    assert [each.shape for each in frames] == [(9, 32, 48, 3), (12, 32, 48, 3)]
    small = decode_flops(on_meta(model.codec), (4, 6))
    assert small > 0
    if kind == "small":
        assert small < decode_flops(on_meta(plain.codec), (4, 6))
    assert next(model.codec.network.parameters()).device.type == "cpu"


def test_students_share_weights_and_not_what_was_found(model: StreamModel) -> None:
    """Catches two copies of a decoder, and the first student's figures beside the second one."""
    first, second = (with_decoder(model, "small", None).codec for _ in range(2))
    assert isinstance(first, SmallCodec)
    assert isinstance(second, SmallCodec)
    second.fidelity = "of the second"
    first.compile_decoding(backend="eager")
    both = shared(second, first)
    assert isinstance(both, SmallCodec)
    assert both.network is first.network
    assert both.program is first.program is not None  # compiled once for both
    assert (both.fidelity, first.fidelity) == ("of the second", "")
    assert shared(model.codec, model.codec) is model.codec


def test_the_stream_and_the_page_say_how_far_it_is() -> None:
    """Catches a stream, or a page, that shows another picture without a word about it."""
    small, settings = prepare(parse(["stream", "--decoder", "small", "--device", "cpu"]))
    for said in (describe_model("mine", small), Student(small, settings).facts()["about"]):
        assert "small decoder decoder.safetensors against the full decode" in said
        assert re.search(r"PSNR 3\d\.\d dB, flicker 0\.\d\d of 255", said)


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, object]]:
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1])


def test_the_benchmark_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a pace that is stated without what it costs in quality."""
    quick = ["benchmark", "--quick", "--chunks", "1", "--warmup", "4", "--prompt-trials", "0"]
    assert main([*quick, "--device", "cpu", "--decoder", "small"]) == 0
    text, result = last_line(capsys)
    assert "PSNR" in text
    assert "flicker" in text
    decoder = result["small_decoder"]
    assert isinstance(decoder, dict)
    assert decoder["fidelity"]["psnr_db"] > 30
    assert result["environment"]["codec"] == "SmallCodec"


def test_the_counter_shows_small_decoders(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a small decoder that moves as many bytes as the large one; docs/speed.md."""
    assert main(["benchmark", "--count-decoder"]) == 0
    _, result = last_line(capsys)
    large, small, taew = (result[name] for name in ("ours", "small", "taew2_1"))
    assert small["num_bytes"] < 3.4e9 < large["num_bytes"] / 6
    assert small["operators"] <= 88
    assert taew["num_bytes"] < 2.6e9
    assert taew["operators"] <= 109
