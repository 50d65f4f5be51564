"""Small decoders on a CUDA device: as on a CPU, plain and compiled."""

from __future__ import annotations

import pytest
import torch
from rehearsal import COMPILER, DEVICE
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.small_codec import DecoderNetwork, SmallCodec
from selfforcing_dfd.codecs.small_decoder import DecoderSize, SmallDecoder
from selfforcing_dfd.codecs.taew import TaewDecoder
from selfforcing_dfd.tiny.codec import TinyCodec

pytestmark = pytest.mark.gpu
LEAST_DB = 40
"""Of bfloat16 against float32. A CPU has 49 and 53; other kernels sum in another order."""


def network(kind: str) -> DecoderNetwork:
    made: DecoderNetwork = SmallDecoder(DecoderSize()) if kind == "small" else TaewDecoder()
    for number, parameter in enumerate(made.parameters()):
        drawn = rng.normal(tuple(parameter.shape), 0, "decoder", number)
        parameter.data = drawn * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return made


def psnr(video: Tensor, wanted: Tensor) -> float:
    return float(-10 * (video.cpu() - wanted).square().mean().log10())


@pytest.mark.parametrize("kind", ["small", "taew2_1"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_decodes_as_a_cpu_does(kind: str, compiled: bool, codec: TinyCodec) -> None:
    """Catches a layout, a precision or a program that a GPU runs otherwise."""
    latents = rng.normal((1, 4, 16, 8, 12), 0, "latents").float()
    wanted = SmallCodec(network(kind), codec).start_decoding().decode(latents)
    on_gpu = SmallCodec(network(kind).to(DEVICE, torch.bfloat16), codec)
    if compiled:
        torch._dynamo.reset()
        on_gpu.compile_decoding(**COMPILER)
    video = on_gpu.start_decoding().decode(latents.to(DEVICE))
    assert psnr(video, wanted) > LEAST_DB
    stream = on_gpu.start_decoding()
    parts = [stream.decode(part) for part in latents.to(DEVICE).split((1, 3), dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), video)
