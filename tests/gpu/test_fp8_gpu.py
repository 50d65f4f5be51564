"""8-bit linear layers on a CUDA device: what the emulation of their numbers says."""

from __future__ import annotations

import pytest
import torch
from rehearsal import DEVICE, ON_GPU, has_fp8
from torch import Tensor, nn

from selfforcing_dfd import rng
from selfforcing_dfd.models.fp8 import rounded_weight, use_fp8
from selfforcing_dfd.models.fp8_emulated import EmulatedLinear, emulate_fp8
from selfforcing_dfd.streaming.random_model import random_stream_model
from selfforcing_dfd.streaming.session import StreamModel, StreamSession

pytestmark = pytest.mark.gpu
SUMS = 1e-2
"""On a CPU, whose sums are float32, they differ by 1.5e-5. Sums that stay in the tensor cores have
14 bits, which cost up to 2 % of single values at 4,096 terms (arXiv 2412.19437, 3.3.2)."""
SIZES = [(4680, 1536, 1536), (4680, 1536, 8960), (4680, 8960, 1536)] if ON_GPU else [(8, 32, 48)]


DTYPES = [torch.bfloat16] if has_fp8() else []


def error(x: Tensor, of: Tensor) -> float:
    return float((x.double() - of.double()).norm() / of.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_layer_gives_what_its_8_bit_numbers_say(sizes: tuple[int, int, int], dtype: torch.dtype):
    """Catches scales on the wrong side, a transposed weight, a lost bias, and poor sums."""
    rows, wide, out = sizes
    linear = nn.Linear(wide, out).to(DEVICE, dtype).requires_grad_(False)
    linear.weight.copy_(rng.normal((out, wide), 0, "weight"))
    x = rng.normal((1, rows, wide), 0, "x").to(DEVICE, dtype)
    wanted = EmulatedLinear(linear)(x)
    linear.weight = nn.Parameter(rounded_weight(linear.weight), requires_grad=False)
    assert error(linear(x), wanted) < SUMS


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_is_as_near_as_the_emulated_one(dtype: torch.dtype):
    """Catches a layer that is converted and should not be, and a NaN somewhere in a stream.

    Against bfloat16, 8 bits change much more than sums do: half as much again is allowed.
    """
    plain = latents_of(model_of(dtype))
    emulated = model_of(dtype)
    emulate_fp8(emulated.student, linears=True, attention=False, text_tokens=512)
    eight_bits = model_of(dtype)
    use_fp8(eight_bits.student)
    assert error(latents_of(eight_bits), plain) < 1.5 * error(latents_of(emulated), plain)


def model_of(dtype: torch.dtype) -> StreamModel:
    return random_stream_model("wan-tiny", str(DEVICE), dtype)


def latents_of(model: StreamModel) -> Tensor:
    """x0 of a stream's first chunk."""
    session = StreamSession(model, "a disc moves")
    session.next_chunk()
    history = session.snapshot()
    x0 = history.pending[0] if history.pending else history.history[-1].latents
    assert x0.isfinite().all()
    return x0
