"""Wan's VAE in 16 bits and compiled: no worse than diffusers', and two graphs for any stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_models import LADDER, tiny_network
from torch import Tensor, nn
from torch._dynamo.utils import counters

from selfforcing_dfd import rng
from selfforcing_dfd.codecs import wan_decode
from selfforcing_dfd.codecs.wan_decode import Programs
from selfforcing_dfd.codecs.wan_vae import WanCodec, tuned_convolutions
from selfforcing_dfd.streaming.model import StreamModel
from selfforcing_dfd.tiny.text import TinyText

SMALL = {"base_dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 0}
GROWTH = {"temperal_downsample": [False, True]}
STREAM = (3, 3, 1, 2, 3)
"""Latent frames of each chunk."""


def small_codec(
    dtype: torch.dtype, channels_last: bool = False, lean: bool = False, **config: Any
) -> WanCodec:
    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan(**{**SMALL, **GROWTH, **config})
    return WanCodec(nn.Module.to(vae, dtype), channels_last, lean=lean)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return rng.normal((1, sum(STREAM), 16, 4, 6), 0, "latents").float()


def streamed(codec: WanCodec, latents: Tensor) -> Tensor:
    decoder = codec.start_decoding()
    return torch.cat([decoder.decode(part) for part in latents.split(STREAM, dim=1)], dim=1)


def by_diffusers(codec: WanCodec, latents: Tensor) -> Tensor:
    z = (latents.transpose(1, 2) * codec.deviation + codec.mean).to(codec.dtype)
    with torch.no_grad():
        video: Tensor = codec.vae.decode(z).sample.float()
    return (video.permute(0, 2, 3, 4, 1) + 1) / 2


def psnr(video: Tensor, wanted: Tensor) -> float:
    return float(-10 * (video - wanted).square().mean().log10())


@pytest.mark.parametrize(("channels_last", "directly"), [(False, False), (True, True)])
def test_bfloat16_is_no_worse_than_diffusers(latents, channels_last, directly, monkeypatch):
    """Catches a norm that rounds too early, and padding, rows or frames out of place.

    PSNR against float32; fewer roundings must not make it smaller. The second case takes the way
    of a GPU, where SiLU writes into the rooms.
    """
    monkeypatch.setattr(wan_decode, "stores_directly", lambda device: directly)
    wanted = streamed(small_codec(torch.float32, num_res_blocks=1), latents)
    codec = small_codec(torch.bfloat16, channels_last, num_res_blocks=1)
    assert psnr(streamed(codec, latents), wanted) >= psnr(by_diffusers(codec, latents), wanted)


def test_a_norm_of_nothing_is_nothing():
    """Catches a division by zero where all channels of a place are zero."""
    codec = small_codec(torch.bfloat16)
    codec.vae.decoder.conv_in.weight.data.zero_()
    codec.vae.decoder.conv_in.bias.data.zero_()
    assert codec.decode(torch.zeros(1, 2, 16, 4, 6)).isfinite().all()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.soak)]
)
def test_a_stream_compiles_twice_and_never_again(latents, dtype):
    """Catches a program that depends on the chunk, the stream or the clone.

    Two graphs, one for a video's first latent frame and one for all others, whole, as all shapes
    are known. AOT autograd runs the operators of the graph as they are, so the bits stay.
    """
    torch._dynamo.reset()
    counters.clear()
    codec = small_codec(dtype, channels_last=True)
    wanted = streamed(codec, latents)
    codec.compile_decoding(backend="aot_eager")
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(streamed(codec, latents), wanted)
        decoder = codec.start_decoding()
        first = decoder.decode(latents[:, :5])
        rest = decoder.clone().decode(latents[:, 5:])
        assert torch.equal(torch.cat([first, rest], dim=1), wanted)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_rooms_are_the_same_video_in_less_memory(latents, dtype):
    """Catches a past that another convolution overwrites, and one that a clone shares."""
    codec = small_codec(dtype, num_res_blocks=1)
    lean = small_codec(dtype, lean=True, num_res_blocks=1)
    wanted = streamed(codec, latents)
    assert torch.equal(streamed(lean, latents), wanted)
    decoders = [each.start_decoding() for each in (codec, lean)]
    parts = [decoder.decode(latents[:, :5]) for decoder in decoders]
    rest = decoders[1].clone()
    ahead = decoders[1].decode(latents[:, 5:])
    assert torch.equal(torch.cat([parts[1], ahead], dim=1), wanted)
    assert torch.equal(rest.decode(latents[:, 5:]), ahead)
    full, less = (decoder.num_bytes for decoder in decoders)
    assert less < 0.8 * full  # with more convolutions of a size it is half


@pytest.mark.soak
def test_shared_rooms_compile_twice_too(latents):
    """Catches a graph that takes a shared room for two, and a recompilation for it."""
    torch._dynamo.reset()
    counters.clear()
    codec = small_codec(torch.bfloat16, channels_last=True, lean=True)
    wanted = streamed(codec, latents)
    codec.compile_decoding(backend="aot_eager")
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(streamed(codec, latents), wanted)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_a_model_compiles_its_codec():
    """Catches `--compile` that leaves the decoder out, of which the tiny world has none."""
    codec = small_codec(torch.float32)
    student = tiny_network(dtype=torch.float32, in_channels=16, out_channels=16)
    StreamModel(student, codec, TinyText(12), LADDER, 3, (4, 6)).compile(backend="eager")
    assert codec.start_decoding().stream.programs != Programs()


@pytest.mark.soak
def test_inductors_video_is_as_good(latents):
    """Catches a graph that is right until inductor fuses it: rooms written too early or late."""
    wanted = streamed(small_codec(torch.float32), latents)
    codec = small_codec(torch.bfloat16, channels_last=True)
    eager = psnr(streamed(codec, latents), wanted)
    torch._dynamo.reset()
    codec.compile_decoding()
    assert psnr(streamed(codec, latents), wanted) > eager - 0.5


def test_a_clone_holds_the_past_alone(latents):
    """Catches snapshots as large as the decoder: two frames of each room, of up to six."""
    codec = small_codec(torch.bfloat16)
    decoder = codec.start_decoding()
    decoder.decode(latents[:, :2])
    copy = decoder.clone()
    assert copy.num_bytes < 0.6 * decoder.num_bytes
    assert copy.clone().num_bytes == copy.num_bytes
    copy.decode(latents[:, 2:3])
    assert copy.num_bytes == decoder.num_bytes


def test_channels_last_is_kept_through_all_convolutions(latents, monkeypatch):
    """Catches a layer that falls back to the other layout, which costs a copy in and one out.

    The frames that are doubled in time are the place where it gets lost. Results do not show it.
    """
    found = []

    def spied(convolution: Callable[..., Tensor], layout: torch.memory_format) -> Any:
        def run(x: Tensor, *rest: Any, **options: Any) -> Tensor:
            found.append(x.is_contiguous(memory_format=layout))
            return convolution(x, *rest, **options)

        return run

    codec = small_codec(torch.bfloat16, channels_last=True)
    decoder = codec.start_decoding()
    decoder.decode(latents[:, :1])
    layouts = {"conv2d": torch.channels_last, "conv3d": torch.channels_last_3d}
    for name, layout in layouts.items():
        monkeypatch.setattr(wan_decode, name, spied(getattr(wan_decode, name), layout))
    decoder.decode(latents[:, 1:2])
    assert len(found) > 15
    assert all(found)


def test_cudnn_tries_its_kernels_on_a_gpu_alone(latents):
    """Catches a switch that stays on for others, or overrules those who want the same bits."""
    cudnn = torch.backends.cudnn
    codec = small_codec(torch.float32)
    seen = []

    def program(decoder: Any, x: Tensor, rooms: list[Tensor]) -> Tensor:
        seen.append(cudnn.benchmark)
        return torch.zeros(1, 3, 1, 32, 48)

    codec.programs = Programs(program, program)
    for device in ("cuda", "cpu"):
        codec.device = torch.device(device)
        codec.decode(latents[:, :1])
        assert cudnn.benchmark is False
    assert seen == [True, False]
    cudnn.deterministic = True
    try:
        with tuned_convolutions(torch.device("cuda")):
            assert cudnn.benchmark is False
    finally:
        cudnn.deterministic = False
