"""Wan2.1 1.3B at 480x832 on one GPU, with random weights."""

from __future__ import annotations

import pytest
import torch
from rehearsal import DEVICE, ON_GPU, peak_of
from torch import nn

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.models.network import PlainWan
from selfforcing_dfd.models.offload import BlockGroups
from selfforcing_dfd.streaming.random_model import network_sizes, random_stream_model, randomise
from selfforcing_dfd.streaming.session import StreamSession, StreamSettings

pytestmark = pytest.mark.gpu
SIZE = "wan1.3b" if ON_GPU else "wan-tiny"
LATENTS = (60, 104) if ON_GPU else (4, 6)
RAMP = 4
MOST_BYTES = 24e9
"""A board of 24 GB; counted by hand, a stream with K = 12 needs 15."""


def test_a_stream_is_finite_and_fits():
    """Catches an overflow at true width, frames of another size, and memory that was overlooked."""
    shapes = []

    def stream() -> None:
        model = random_stream_model(SIZE, str(DEVICE), torch.bfloat16)
        session = StreamSession(model, "a disc moves", StreamSettings())
        for _ in range(RAMP + 2):
            frames = session.next_chunk().frames
            shapes.append(tuple(frames.shape))
            assert frames.float().std() > 0
        assert all(seen.latents.isfinite().all() for seen in session.snapshot().history)
        assert shapes == [(9 if i == 0 else 12, *model.video_size, 3) for i in range(RAMP + 2)]

    assert peak_of(stream) < MOST_BYTES


def test_true_width_in_16_bits_is_near_float32():
    """Catches a kernel that breaks beyond some length, and sums of 16 bits over 8,960 values.

    Two layers. On a CPU, at small latents, the roundings of bfloat16 cost .007; three times that is
    allowed.
    """
    sizes = {**network_sizes(SIZE), "num_layers": 2}
    torch.manual_seed(0)
    network = randomise(PlainWan(**sizes)).requires_grad_(False).to(DEVICE)
    x = rng.normal((1, 3, 16, *LATENTS), 0, "x").to(DEVICE)
    text = Conditioning(rng.normal((1, 64, sizes["text_dim"]), 0, "text").to(DEVICE))
    with torch.no_grad():
        wanted = network(x.float(), 0.6, text).flow.float()
        nn.Module.to(network, torch.bfloat16)
        network.set_attention("auto")
        found = network(x.float(), 0.6, text).flow.float()
    assert (found - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize("compiled", [False, True])
def test_both_layouts_of_the_vae_agree_at_true_size(compiled: bool):
    """Catches a kernel that fails or changes its result at 480x832. Against each other: 40 dB.

    Two roundings of bfloat16 to a picture in [0, 1] are 48 dB apart.
    """
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    latents = rng.normal((1, 2, 16, *LATENTS), 0, "latents").float().to(DEVICE)
    with torch.device(DEVICE):
        vae = AutoencoderKLWan().to(torch.bfloat16) if ON_GPU else AutoencoderKLWan(base_dim=16)
    videos = []
    for channels_last in (False, True):
        torch._dynamo.reset()
        codec = WanCodec(vae, channels_last)
        if compiled and ON_GPU:
            codec.compile_decoding()
        videos.append(codec.decode(latents))
    assert videos[0].shape == (1, 5, 8 * LATENTS[0], 8 * LATENTS[1], 3)
    assert -10 * (videos[0] - videos[1]).square().mean().log10() > 40


def test_blocks_that_visit_the_device_compute_the_same():
    """Catches a block that begins before its weights have come, or whose room is written too soon.

    The sizes are such that a copy takes about as long as a block. The bits are the same.
    """
    torch.manual_seed(0)
    wide = 1536 if ON_GPU else 32
    layers = [nn.Linear(wide, wide, dtype=torch.bfloat16) for _ in range(8)]
    blocks = nn.ModuleList(layers).requires_grad_(False)
    x = rng.normal((4680, wide), 0, "x").to(DEVICE, torch.bfloat16)

    def run(need: object = None) -> torch.Tensor:
        y = x
        for number, block in enumerate(blocks):
            if isinstance(need, BlockGroups):
                need.need(number)
            y = block(y)
        return y

    blocks.to(DEVICE)
    wanted = run()
    groups = BlockGroups(list(blocks.cpu()), DEVICE)
    for _ in range(5):
        assert torch.equal(run(groups), wanted)
