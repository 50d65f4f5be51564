"""Operations counted on the meta device, against real runs and against figures by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_models import LADDER, SHAPE, TEXT_LENGTH, conditioning, latents, tiny_network

from selfforcing_dfd.benchmark.flops import on_meta
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.context import KVCache, PackedContext
from selfforcing_dfd.cost import decode_flops, flops_of, network_flops, peak_tflops
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.tiny.codec import TinyCodec

LATENT_SIZE = SHAPE[1:]
WAN_1_3B = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
    "text_dim": 4096,
}


@pytest.fixture
def cache():
    """Two committed chunks of two latent frames, of one video."""
    network = tiny_network()
    cache = KVCache()
    for i in range(2):
        past = latents(f"past {i}", 2, 1)
        cache.append(network(past, 0.0, conditioning(1), cache.read(2)).kv)
    return cache


def test_meta_counts_what_a_real_call_runs(cache):
    """Catches attention over the current chunk alone, and a layer counted for its neighbour."""
    network = tiny_network(num_layers=2)
    x_t = latents("x_t", 2, 1)
    past = cache.read(2)
    per_frame = torch.full((1, 2), LADDER[1])  # as in training
    real = flops_of(lambda: network(x_t, per_frame, conditioning(1), past))
    assert network_flops(network, 1, (2,), LATENT_SIZE, TEXT_LENGTH, (4,)) == real
    prepared = network.prepare(conditioning(1), LADDER)
    real = flops_of(lambda: network(x_t, LADDER[1], prepared, past))
    counted = network_flops(network, 1, (2,), LATENT_SIZE, TEXT_LENGTH, (4,), prepared=True)
    assert counted == real


@pytest.mark.parametrize("checkpointing", [False, True])
def test_meta_counts_a_backward_pass(cache, checkpointing):
    """Catches the first of several layers counted for all, and checkpointing's second forward pass.

    Four layers, so that the count is extrapolated from two.
    """
    network = tiny_network(num_layers=4)
    if checkpointing:
        network.enable_gradient_checkpointing()
    x_t = latents("x_t", 4, 1)
    empty = KVCache().read(2)
    context = PackedContext((empty, empty), (2, 2))
    sigma = torch.full((1, 4), LADDER[1])
    real = flops_of(lambda: network(x_t, sigma, conditioning(1), context).flow.sum().backward())
    options = {"gradient": True, "checkpointing": checkpointing}
    assert network_flops(network, 1, (2, 2), LATENT_SIZE, TEXT_LENGTH, (0, 0), **options) == real


def test_real_sizes_agree_with_figures_worked_out_by_hand():
    """Catches a count that is right at one size only: Wan2.1-1.3B at 480x832, chunks of 3, K = 12.

    In TFLOP: linear layers 30 * 4680 * 2 * (6 * 1536^2 + 2 * 1536 * 8960) = 11.70, self-attention
    1.346 for each visible latent frame, the text's 0.44; the VAE 13.55 for each latent frame.
    """
    with torch.device("meta"):
        network = WanTransformer(**WAN_1_3B)
        codec = WanCodec(AutoencoderKLWan())
    prepared = network_flops(network, 1, (3,), (60, 104), 512, (9,), prepared=True)
    # the figures have four digits
    assert prepared / 1e12 == pytest.approx(11.70 + 12 * 1.346 + 0.44, abs=0.02)
    assert decode_flops(codec, (60, 104)) / 1e12 == pytest.approx(13.55, abs=0.01)


def test_a_bidirectional_clip_by_hand():
    """Catches a factor of two: 21 latent frames of 1,560 tokens through 30 blocks of width 1536.

    In TFLOP: 2 x 32760 x (6 x 1536^2 + 2 x 1536 x 8960) x 30 = 81.93; 4 x 32760^2 x 1536 x 30 =
    197.82; text 3.09 + .15; ends .01.
    """
    with torch.device("meta"):
        network = WanTransformer(**WAN_1_3B)
    counted = network_flops(network, 1, (21,), (60, 104), 512, (0,))
    assert counted / 1e12 == pytest.approx(81.93 + 197.82 + 3.09 + 0.15 + 0.01, abs=0.02)


def test_a_decoded_latent_frame_is_counted_as_it_runs():
    """Catches the first latent frame, which is cheaper, counted for all of them."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    whole = [flops_of(lambda n=n: vae.decode(torch.randn(1, 4, n, 6, 8))) for n in (1, 2, 3)]
    counted = decode_flops(on_meta(WanCodec(vae)), (6, 8))
    assert counted == whole[1] - whole[0] == whole[2] - whole[1]
    tiny = TinyCodec(torch.randn(192, 16), torch.randn(768, 16), 1.0)
    whole = [flops_of(lambda n=n: tiny.decode(torch.randn(1, n, 16, 3, 5))) for n in (1, 2)]
    assert decode_flops(on_meta(tiny), (3, 5)) == whole[1] - whole[0]


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
    """Catches an L40S taken for an L4, an A100 for an A10, and a peak for an unknown device."""
    assert peak_tflops(name) == peak
