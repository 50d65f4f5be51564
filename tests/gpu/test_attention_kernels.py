"""Every attention kernel of this device keeps the rule of twice the error. Run with `-m gpu`."""

from __future__ import annotations

import pytest
import torch
from test_numerics import SHAPES, check_attention

from selfforcing_dfd import rng
from selfforcing_dfd.models.attention import (
    KERNELS,
    attend,
    installed_kernels,
    load_kernel,
    obstacle,
)

pytestmark = pytest.mark.gpu
HEAD_DIM = 128  # Wan's
WAN = [(4680, 4680, 12, HEAD_DIM), (4680, 14040, 12, HEAD_DIM), (4680, 512, 12, HEAD_DIM)]
"""A chunk of 480 x 832 alone, with a past of two chunks, and over text."""


def runnable() -> list[str]:
    """SDPA, and what is installed and written for this device; nothing without one."""
    if not torch.cuda.is_available():
        return []
    capability = torch.cuda.get_device_capability()
    installed = installed_kernels()
    return [
        "sdpa",
        *(
            name
            for name in KERNELS
            if not obstacle(name, capability, torch.bfloat16, HEAD_DIM, installed)
        ),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES + WAN[:1], ids=str)
@pytest.mark.parametrize("name", runnable())
def test_kernels_keep_the_rule_of_twice_the_error(name, shape, dtype):
    """Catches a kernel of another version with another layout, scale or accumulation."""
    check_attention(load_kernel(name, torch.device("cuda")), shape, dtype, "cuda")


@pytest.mark.parametrize("shape", WAN[1:], ids=str)
@pytest.mark.parametrize("name", runnable())
def test_kernels_agree_with_float32_at_wans_sizes(name, shape):
    """Catches a fault that starts beyond some length, where float64 scores would take many GB.

    Rounding the output and the probabilities once each costs 1e-3 and 2e-3.
    """
    num_queries, num_keys, heads, head_dim = shape
    q, k, v = (
        rng.normal((1, length, heads, head_dim), 0, part).to("cuda", torch.bfloat16)
        for part, length in (("q", num_queries), ("k", num_keys), ("v", num_keys))
    )
    exact = attend(q.float(), k.float(), v.float())
    error = (load_kernel(name, torch.device("cuda"))(q, k, v).float() - exact).norm() / exact.norm()
    assert error < 5e-3


@pytest.mark.parametrize("name", runnable())
def test_keys_may_be_a_view_of_the_ring(name):
    """Catches a kernel that reads a strided view of the ring's slots as if it were packed."""
    ring = rng.normal((2, 300, 3, 2, HEAD_DIM), 0, "ring").to("cuda", torch.bfloat16)
    q = ring[:, :48, 0]
    k = ring[:, :, 1]
    v = ring[:, :, 2]
    exact = attend(*(x.float().contiguous() for x in (q, k, v)))
    error = (load_kernel(name, torch.device("cuda"))(q, k, v).float() - exact).norm() / exact.norm()
    assert error < 5e-3
