"""The formulas against a count of every matrix product that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_models import LADDER, SHAPE, TEXT_LENGTH, conditioning, latents, tiny_network
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selfforcing_dfd.benchmark.flops import (
    ChunkFlops,
    decode_flops,
    forward_flops,
    level_flops,
    peak_tflops,
    text_flops,
    utilisation,
    wan_decode_flops,
)
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.tiny.codec import TinyCodec

WAN_1_3B = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
    "text_dim": 4096,
}


def counted(run: Any) -> int:
    """FLOPs that torch sees; attention as plain products, which its counter knows on every device."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("past_chunks", [0, 2])
def test_a_forward_pass_is_counted_to_the_last_product(past_chunks):
    """Catches a projection left out, attention over the current chunk alone, and twos lost in
    multiply-adds.
    """
    network, cache, frames = tiny_network(), KVCache(), 2
    prepared = network.prepare(conditioning(1), LADDER)
    for i in range(past_chunks):
        cache.append(network(latents(f"past {i}", frames, 1), 0.0, prepared, cache.read(frames)).kv)
    x_t, past = latents("x_t", frames, 1), cache.read(frames)
    want = counted(lambda: network(x_t, LADDER[1], prepared, past))
    assert (
        forward_flops(network, frames, frames * (1 + past_chunks), SHAPE[1:], TEXT_LENGTH) == want
    )


def test_what_is_prepared_is_counted_once_for_a_prompt():
    """Catches keys without values, and an embedder left out; of the text, and of each noise level."""
    network, text = tiny_network(), conditioning(1).text
    alone = counted(lambda: network.prepare(Conditioning(text)))
    assert text_flops(network, TEXT_LENGTH) == alone
    levels = counted(lambda: network.prepare(Conditioning(text), LADDER)) - alone
    assert levels == len(LADDER) * level_flops(network)


@pytest.fixture(scope="module")
def small_vae() -> AutoencoderKLWan:
    """The Wan VAE's structure with few channels."""
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def test_a_latent_frame_is_decoded_with_as_many_products_as_counted(small_vae):
    """Catches a level at the resolution of its neighbour, time doubled too early or late, and the
    first frame's exception.

    The first latent frame alone, and what each further one adds.
    """
    counts = [counted(lambda n=n: small_vae.decode(torch.randn(1, 4, n, 6, 8))) for n in (1, 2, 3)]
    assert wan_decode_flops(small_vae, (6, 8), first=True) == counts[0]
    assert wan_decode_flops(small_vae, (6, 8)) == counts[1] - counts[0] == counts[2] - counts[1]
    assert decode_flops(WanCodec(small_vae), (6, 8)) == wan_decode_flops(small_vae, (6, 8))


def test_the_tiny_codec_is_counted_too():
    """Catches four video frames for the first latent frame."""
    codec = TinyCodec(torch.randn(192, 16), torch.randn(768, 16), 1.0)
    counts = [counted(lambda n=n: codec.decode(torch.randn(1, n, 16, 3, 5))) for n in (1, 2)]
    assert [decode_flops(codec, (3, 5), first=True), decode_flops(codec, (3, 5))] == [
        counts[0],
        counts[1] - counts[0],
    ]


def test_real_sizes_agree_with_figures_worked_out_by_hand():
    """Catches a formula that is right at one size only: Wan2.1-1.3B at 480x832, chunks of 3, K =
    12, in TFLOP.

    Linear layers 30 * 4680 * 2 * (6 * 1536^2 + 2 * 1536 * 8960), self-attention 1.346 for each
    visible latent frame and the text's 0.44; the VAE 13.55 for each latent frame. Shapes only: no
    memory is taken.
    """
    with torch.device("meta"):
        network, vae = tiny_network(dtype=torch.bfloat16, **WAN_1_3B), AutoencoderKLWan()
    forward = forward_flops(network, 3, 12, (60, 104), 512) / 1e12
    # the figures have four digits
    assert forward == pytest.approx(11.70 + 12 * 1.346 + 0.44, abs=0.02)
    # attention was not in the figure
    assert wan_decode_flops(vae, (60, 104)) / 1e12 == pytest.approx(13.55, abs=0.1)


def test_a_chunk_is_its_parts():
    """Catches a commit pass that is counted twice, or not at all."""
    flops = ChunkFlops(denoise=40, commit=10, decode=7)
    assert (flops.dit, flops.total, flops.as_dict()["total"]) == (50, 57, 57)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD EPYC", None),
        ("NVIDIA A1000", None),
    ],
)
def test_peaks_go_by_the_whole_name(name, peak):
    """Catches an L40S taken for an L4, an A100 for an A10, and a made-up peak for an unknown
    device.
    """
    assert peak_tflops(name) == peak


def test_utilisation_needs_a_stated_peak():
    """Catches a factor of a thousand, and a percentage of nothing: 1 TFLOP in 10 ms is 100 TFLOP/s."""
    assert utilisation(10**12, 10.0, 400.0) == {"tflops_per_s": 100.0, "mfu": 0.25}
    assert utilisation(10**12, 10.0, None) == {"tflops_per_s": 100.0, "mfu": None}
