"""Every attention kernel of this device keeps the rule of twice the error. Run with `-m gpu`."""

from __future__ import annotations

import pytest
import torch
from rehearsal import COMPILER, DEVICE, ON_GPU
from test_numerics import SHAPES, check_attention
from torch._dynamo.utils import counters

from selfforcing_dfd import rng
from selfforcing_dfd.models.attention import attend, fitting_kernels, installed_kernels, load_kernel
from selfforcing_dfd.models.attention_operator import KernelAttention, Slots
from selfforcing_dfd.models.block import WanBlock
from selfforcing_dfd.models.prepared import Modulation
from selfforcing_dfd.models.rope import positions_rotary

pytestmark = pytest.mark.gpu
HEAD_DIM = 128  # Wan's
FRAME = 1560 if ON_GPU else 15
WAN = [(3 * FRAME, keys, 12, HEAD_DIM) for keys in (3 * FRAME, 9 * FRAME, 512)]
"""A chunk of 480 x 832 alone, with a past of two chunks, and over text."""


def runnable() -> list[str]:
    """SDPA, and what is installed and written for this device; nothing without one."""
    if not ON_GPU:
        return ["sdpa"]
    if not torch.cuda.is_available():
        return []
    capability = torch.cuda.get_device_capability()
    return fitting_kernels(capability, torch.bfloat16, HEAD_DIM, installed_kernels())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES + WAN[:1], ids=str)
@pytest.mark.parametrize("name", runnable())
def test_kernels_keep_the_rule_of_twice_the_error(name, shape, dtype):
    """Catches a kernel of another version with another layout, scale or accumulation."""
    check_attention(load_kernel(name, DEVICE), shape, dtype, str(DEVICE))


@pytest.mark.parametrize("shape", WAN[1:], ids=str)
@pytest.mark.parametrize("name", runnable())
def test_kernels_agree_with_float32_at_wans_sizes(name, shape):
    """Catches a fault that starts beyond some length, where float64 scores would take many GB.

    Rounding the output and the probabilities once each costs 1e-3 and 2e-3.
    """
    num_queries, num_keys, heads, head_dim = shape
    q, k, v = (
        rng.normal((1, length, heads, head_dim), 0, part).to(DEVICE, torch.bfloat16)
        for part, length in (("q", num_queries), ("k", num_keys), ("v", num_keys))
    )
    exact = attend(q.float(), k.float(), v.float())
    error = (load_kernel(name, DEVICE)(q, k, v).float() - exact).norm() / exact.norm()
    assert error < 5e-3


@pytest.mark.parametrize("name", runnable())
def test_keys_may_be_a_view_of_the_ring(name):
    """Catches a kernel that reads a strided view of the ring's slots as if it were packed."""
    ring = rng.normal((2, 300, 3, 2, HEAD_DIM), 0, "ring").to(DEVICE, torch.bfloat16)
    q = ring[:, :48, 0]
    k = ring[:, :, 1]
    v = ring[:, :, 2]
    exact = attend(*(x.float().contiguous() for x in (q, k, v)))
    error = (load_kernel(name, DEVICE)(q, k, v).float() - exact).norm() / exact.norm()
    assert error < 5e-3


@pytest.mark.parametrize("name", ["fa3-fp8"] if "fa3" in runnable() else [])
def test_eight_bits_cost_what_was_emulated(name):
    """Catches scales that a version reads otherwise; emulated on a CPU the error is .054."""
    q, k, v = (
        rng.normal((1, length, 12, HEAD_DIM), 0, part).to(DEVICE, torch.bfloat16)
        for part, length in (("q", 4680), ("k", 14040), ("v", 14040))
    )
    exact = attend(q.float(), k.float(), v.float())
    error = (load_kernel(name, DEVICE)(q, k, v).float() - exact).norm() / exact.norm()
    assert 0.03 < error < 0.08


@pytest.mark.parametrize("name", runnable())
def test_a_compiled_block_makes_one_program_and_the_same_chunk(name):
    """Catches a kernel that is traced, and an operator whose result compiled code misreads."""
    torch._dynamo.reset()
    counters.clear()
    with DEVICE:
        block = WanBlock(256, 512, 2, 1e-6).bfloat16().requires_grad_(False)
    block.attend = KernelAttention(name, load_kernel(name, DEVICE))
    x = rng.normal((1, 96, 256), 0, "x")
    level = rng.normal((6, 1, 1, 256), 0, "level")
    level = Modulation(*(part.to(DEVICE, torch.bfloat16) for part in level))
    rotary = positions_rotary(0, 3, 4, 8, HEAD_DIM, DEVICE, torch.float32)
    text = rng.normal((2, 1, 20, 2, HEAD_DIM), 0, "text").to(DEVICE, torch.bfloat16).unbind()
    own = torch.arange(96, 192, device=DEVICE)
    compiled = torch.compile(block.over_slots, dynamic=False, fullgraph=True, **COMPILER)
    results = []
    for run in (block.over_slots, compiled):
        past = rng.normal((2, 1, 384, 2, HEAD_DIM), 0, "past").to(DEVICE, torch.bfloat16)
        slots = Slots(past[0], past[1], own, torch.tensor((0, 192)))
        out, _, _ = run(x.to(DEVICE, torch.bfloat16), text, level, rotary, slots)
        results.append((out.float(), past.float()))
    assert counters["stats"]["unique_graphs"] == 1
    for plain, compiled in zip(*results, strict=True):
        assert (compiled - plain).norm() / plain.norm() < 1e-2
