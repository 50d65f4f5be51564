"""The memory of a stream that is counted from shapes is the memory that a stream takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_wan import HEIGHT, WIDTH
from torch import nn

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.codecs import wan_decode
from selfforcing_dfd.codecs.small_codec import SmallCodec
from selfforcing_dfd.codecs.small_decoder import DecoderSize, SmallDecoder
from selfforcing_dfd.codecs.taew import TaewDecoder
from selfforcing_dfd.models.identity import SELF_FORCING
from selfforcing_dfd.models.network import PlainWan
from selfforcing_dfd.streaming import load_wan, memory
from selfforcing_dfd.streaming.live_bytes import LiveBytes, OneKernel, peak_bytes
from selfforcing_dfd.streaming.memory import MemoryNeeds, Streamed, memory_needs
from selfforcing_dfd.streaming.random_model import network_sizes, random_stream_model
from selfforcing_dfd.streaming.saving import Saving
from selfforcing_dfd.streaming.session import StreamSession, StreamSettings
from selfforcing_dfd.streaming.wan_memory import memory_lines

DOCUMENT = Path(__file__).parents[2] / "docs" / "streaming.md"
SETTINGS = StreamSettings(window_frames=6)
LATENT = (8, 12)


@pytest.fixture(scope="module")
def streamed() -> Streamed:
    """The stand-in for Wan, whose parts are Wan's classes, at a size for a CPU."""
    codec = random_stream_model("wan-tiny", "cpu", torch.bfloat16).codec
    codec.vae.to("meta")
    return Streamed(
        sizes=network_sizes("wan-tiny"),
        codec=type(codec)(codec.vae),
        text_bytes=0,
        latent_size=LATENT,
        chunk_frames=SELF_FORCING.chunk_frames,
        num_levels=len(SELF_FORCING.ladder) + 1,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("lean", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_stream_takes_what_was_counted(streamed, lean, monkeypatch):
    """Catches a part that is left out or counted twice, and a moment that is not the largest.

    A stream runs on the CPU with every tensor that it makes counted, until its window is full.
    Not in the count are the pictures of a chunk in bytes, noise, and the latents of what is seen:
    at Wan's size some 20 MB.
    """
    monkeypatch.setattr(wan_decode, "stores_directly", lambda device: True)  # as on a GPU
    counter = LiveBytes()
    with counter, OneKernel():
        model = random_stream_model("wan-tiny", "cpu", torch.bfloat16)
        model = replace(model, latent_size=LATENT)
        model.codec.lean = lean
        session = StreamSession(model, "a red fox", SETTINGS)
        counter.peak = counter.now  # what loading takes is over
        for _ in range(5):
            session.next_chunk()
    codec = type(streamed.codec)(streamed.codec.vae, lean=lean)
    counted = memory_needs(replace(streamed, codec=codec), SETTINGS, Saving(lean_vae=lean))
    pictures = 12 * 3 * 8 * LATENT[0] * 8 * LATENT[1]
    noise = 4 * len(SELF_FORCING.ladder) * 3 * 16 * LATENT[0] * LATENT[1]
    assert 0 <= counter.peak - counted.total < 1.5 * (pictures + noise)


def test_what_is_saved_is_what_is_not_there(streamed):
    """Catches a saving that is counted and not made, and a network that counting has changed."""
    deeper = replace(streamed, text_bytes=10**9, sizes={**streamed.sizes, "num_layers": 4})
    needs = {
        name: memory_needs(deeper, SETTINGS, saving)
        for name, saving in {
            "nothing": Saving(),
            "cpu": Saving(text="cpu"),
            "free": Saving(text="free"),
            "groups": Saving(group_size=1),
            "fp8": Saving(fp8=True),
        }.items()
    }
    nothing = needs["nothing"]
    assert needs["cpu"].total == nothing.total - 10**9
    assert needs["cpu"].host == {"text encoder": 10**9}
    assert needs["free"].moments["a new prompt is encoded"] > 10**9
    assert needs["free"].peak_moment == "a new prompt is encoded"
    student = PlainWan(**deeper.sizes).bfloat16().requires_grad_(False)
    assert nothing.lasting["student"] == sum(p.nbytes for p in student.parameters())
    in_blocks = sum(p.nbytes for p in student.blocks.parameters())
    rooms = student.offload_blocks(torch.device("cpu")).device_bytes
    assert (
        needs["groups"].lasting["student, 2 of 4 blocks"]
        == nothing.lasting["student"] - in_blocks + rooms
    )
    assert needs["groups"].host["blocks, pinned"] >= in_blocks
    assert needs["fp8"].lasting["student"] < 0.8 * nothing.lasting["student"]


def test_graphs_keep_what_a_pass_takes(streamed):
    """Catches a statement without the memory that captured graphs never give back."""
    plain = memory_needs(streamed, SETTINGS, Saving())
    graphs = memory_needs(streamed, SETTINGS, Saving(), graphs=True)
    assert graphs.total - plain.total == graphs.lasting["CUDA graphs"]
    copied = plain.lasting["prompt's keys and values"]
    assert graphs.lasting["CUDA graphs"] == plain.moments["a chunk is denoised"] + copied


def test_a_small_decoder_saves_what_the_full_one_keeps(streamed):
    """Catches the full decoder's state counted for ever, or left out while both are compared."""
    with torch.device("meta"):
        network = SmallDecoder(DecoderSize(widths=(16, 8, 8)))
    small = SmallCodec(nn.Module.to(network, torch.bfloat16), streamed.codec)
    full = memory_needs(streamed, SETTINGS, Saving())
    needs = memory_needs(replace(streamed, codec=small), SETTINGS, Saving())
    state = "VAE decoder's state"
    assert needs.lasting[state] < 0.2 * full.lasting[state]
    assert needs.lasting["VAE"] == full.lasting["VAE"]
    both = full.lasting[state] + full.moments["a latent frame is decoded"]
    assert needs.moments["the decoders are compared"] == both


def test_the_text_encoder_is_counted_once():
    """Catches its table of words, which the model and its stack share, counted twice: 2 GB."""
    config = {"vocab_size": 100, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1}
    counted = memory.text_encoder_bytes({**config, "num_heads": 2}, torch.bfloat16)
    assert 2 * 100 * 8 < counted < 2 * 2 * 100 * 8


def test_bytes_count_while_somebody_holds_them():
    """Catches tensors that never end, and views and results in place that count twice."""
    x = torch.empty(1000, device="meta")

    def call() -> torch.Tensor:
        doubled = x * 2
        summed = doubled.view(10, 100).add_(1) + 1
        return summed[0]

    assert peak_bytes(call) == 2 * 4000
    assert peak_bytes(lambda: nn.functional.rms_norm(x, (1000,))) == 4000


def test_a_board_is_the_smallest_that_holds_all():
    """Catches a board that is full before the CUDA context has come."""
    for total, board in ((24.0, 24), (24.1, 32), (7.5, 8), (7.9, 12), (200.0, None)):
        needs = MemoryNeeds({"student": int(total * 1e9) - 5}, {"a chunk is denoised": 5})
        assert needs.board == board
    assert list(memory_lines(needs))[-1].startswith("fits no GPU known here")


@pytest.mark.soak
def test_the_documents_table_is_the_commands(capsys):
    """Catches a table of memory that is out of date."""
    assert main(["benchmark", "--count-memory", "--random-weights", "wan1.3b"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| wan")]
    assert len(rows) == 7
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [row for row in rows if row not in text] == []


def test_a_dry_run_loads_nothing(export, monkeypatch, capsys, tmp_path):
    """Catches minutes of loading for a question, and options that the answer leaves out."""
    monkeypatch.setattr(load_wan, "load_student", pytest.fail)
    monkeypatch.setattr(memory, "BOARDS", (8,))
    asked = ["stream", "--model", str(export), "--size", f"{HEIGHT}x{WIDTH}", "--dry-run"]
    assert main([*asked, "--text-memory", "cpu", "--window", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "32x48, K = 9 latent frames, bfloat16, one stream"
    assert lines[-2].endswith("text encoder, in the host's memory")
    assert lines[-1] == "fits a GPU of 8 GB"
    assert main([*asked, "--vae-device", "cuda:1"]) == 0
    assert "VAE" not in capsys.readouterr().out
    assert main([*asked, "--cuda-graph", "--first-ladder", "1000,500"]) == 0
    answer = capsys.readouterr()
    assert "CUDA graphs" in answer.out
    assert main([*asked, "--first-ladder", "500"]) == 2
    save_file(dict(TaewDecoder().state_dict()), tmp_path / "taew2_1.safetensors")
    assert main([*asked, "--decoder-weights", str(tmp_path / "taew2_1.safetensors")]) == 0
    assert "VAE's small decoder" in capsys.readouterr().out
    assert main(["stream", "--dry-run"]) == 2
    assert "add --model DIR" in capsys.readouterr().err
