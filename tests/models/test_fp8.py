"""8-bit linear layers compute what their 8-bit numbers say, and nothing else is converted."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from tiny_models import LADDER, conditioning, latents, tiny_network
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Float8Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.models import fp8
from selfforcing_dfd.models.fp8 import Fp8Error, check_device, rounded_weight, use_fp8
from selfforcing_dfd.models.fp8_emulated import EmulatedLinear, emulate_fp8, rounded_rows

HALF_STEP = 2**-4  # e4m3 has three bits behind the leading one
BFLOAT16 = 2**-8  # the rounding of a result


def layer(dtype: torch.dtype, in_features: int = 64, out_features: int = 32) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    with torch.no_grad():
        linear.weight.copy_(rng.normal((out_features, in_features), 0, "weight"))
        linear.weight[3] = 0
        linear.bias.copy_(rng.normal((out_features,), 0, "bias"))
    return linear.to(dtype).requires_grad_(False)


def inputs(dtype: torch.dtype) -> torch.Tensor:
    """Tokens of many sizes, one of them zero."""
    sizes = torch.tensor([1e-4, 1.0, 300.0, 1e4, 0.0, 7.0, 1e-2])
    return (rng.normal((2, 7, 64), 0, "x") * sizes[:, None]).to(dtype)


def test_numbers_are_kept_to_half_a_step():
    """Catches a scale that overflows to NaN, one scale for all rows, and a division by zero."""
    x = inputs(torch.float32)[0]
    values, scale = rounded_rows(x)
    error = (values * scale - x).abs()
    smallest = scale * 2**-10  # below 2^-6 steps no longer shrink: half of the last one
    assert bool((error <= torch.maximum(HALF_STEP * x.abs(), smallest) * 1.0001).all())
    assert (values * scale).abs().amax(1).allclose(x.abs().amax(1), rtol=1e-6)


def test_torchao_rounds_and_multiplies_as_the_emulation_says():
    """Catches scales on the wrong side, a transposed weight, a lost bias, and a row of zeros: NaN.

    The product is that of torch on a CPU. The 8-bit numbers are equal to the bit; sums may have
    another order, and in bfloat16 results that differ by it may round to two neighbours.
    """
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, BFLOAT16)):
        linear = layer(dtype)
        x = inputs(dtype)
        emulated = EmulatedLinear(linear)
        linear.weight = nn.Parameter(rounded_weight(linear.weight), requires_grad=False)
        assert torch.equal(linear.weight.qdata.float(), emulated.weight)
        assert torch.equal(linear.weight.scale, emulated.scale)
        made = linear(x)
        assert made.dtype == dtype
        assert made.isfinite().all()
        wanted = emulated(x)
        largest = wanted.float().abs().amax(-1, keepdim=True)  # of a token, whose sizes differ
        assert float(((made - wanted).float().abs() / largest).max()) <= tolerance
        exact = layer(dtype).double()(x.double())
        assert float((made.double() - exact).norm() / exact.norm()) < 0.05


class Products(TorchDispatchMode):
    """Keeps the arguments of every 8-bit product."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._scaled_mm:
            names = (argument.name for argument in func._schema.arguments)
            self.asked.append(dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_a_gpu_is_asked_for_what_it_takes():
    """Catches products without fast accumulation, and inputs that CUDA refuses and a CPU takes.

    It wants the second matrix by columns, one float32 scale a row and column, and a bias of the
    result's dtype.
    """
    linear = layer(torch.bfloat16)
    linear.weight = nn.Parameter(rounded_weight(linear.weight), requires_grad=False)
    with Products() as products:
        linear(inputs(torch.bfloat16))
    (asked,) = products.asked
    assert asked["use_fast_accum"] is True
    assert asked["out_dtype"] == asked["bias"].dtype == torch.bfloat16
    assert asked["self"].is_contiguous()
    assert asked["mat2"].t().is_contiguous()
    assert asked["self"].dtype == asked["mat2"].dtype == fp8.E4M3
    assert (asked["scale_a"].shape, asked["scale_b"].shape) == ((14, 1), (1, 32))
    for name in ("scale_a", "scale_b"):
        assert asked[name].dtype == torch.float32
        assert asked[name].is_contiguous()


def test_a_network_changes_as_the_emulation_says():
    """Catches a layer converted twice or in another's place, and attention that is rounded too.

    4 % is twice what was measured with random weights.
    """
    plain = tiny_network(dtype=torch.float32).requires_grad_(False)
    quick = copy.deepcopy(plain)
    emulated = copy.deepcopy(plain)
    assert use_fp8(quick) == 8 * 2
    emulate_fp8(emulated, linears=True, attention=False, text_tokens=0)
    text = conditioning(dtype=torch.float32)
    a, b, c = (
        network(latents("x", dtype=torch.float32), LADDER[1], text).flow
        for network in (plain, quick, emulated)
    )
    assert 1e-4 < float((a - b).norm() / a.norm()) < 0.04
    # a value between two e4m3 numbers may fall to either side after sums in another order
    assert float((c - b).norm() / a.norm()) < 2e-3


def test_compiled_blocks_stay_one_program():
    """Catches a weight of 8 bits that breaks the graph of a block, or that is compiled anew."""
    torch._dynamo.reset()
    counters.clear()
    network = tiny_network(dtype=torch.float32).requires_grad_(False)
    use_fp8(network)
    given = (latents("x", dtype=torch.float32), LADDER[1], conditioning(dtype=torch.float32))
    plain = network(*given).flow
    network.compile_blocks(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(network(*given).flow, plain, rtol=1e-5, atol=1e-5)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # before and after attention, of all blocks
    torch._dynamo.reset()


def test_a_torch_that_cannot_is_named(monkeypatch):
    """Catches an internal error of torch 2.11 on a CPU, after which a network is half converted."""

    def refuse(*inputs):
        raise RuntimeError("only supports per-tensor scaling for CPU backend")

    monkeypatch.setattr(fp8, "linear", refuse)
    network = tiny_network(dtype=torch.float32)
    with pytest.raises(Fp8Error, match=r"torch .* has no 8-bit products .* leave --fp8 out"):
        use_fp8(network)
    assert not any(isinstance(p, Float8Tensor) for p in network.parameters())


def test_text_embedders_and_head_stay():
    """Catches the parts that need precision, or that run once a prompt, being converted too."""
    network = tiny_network(dtype=torch.float32)
    use_fp8(network)
    kept = {name for name, p in network.named_parameters() if not isinstance(p, Float8Tensor)}
    assert {
        "proj_out.weight",
        "condition_embedder.time_proj.weight",
        "blocks.1.attn2.to_k.weight",
    } <= kept
    assert "blocks.1.attn1.to_k.weight" not in kept


def test_what_cannot_be_converted_is_refused_whole(monkeypatch):
    """Catches a network left half converted, adapters dropped without a word, and a bare import."""
    network = tiny_network(dtype=torch.float32, ffn_dim=24)
    with pytest.raises(Fp8Error, match="multiples of 16"):
        use_fp8(network)
    assert not any(isinstance(p, Float8Tensor) for p in network.parameters())
    network = tiny_network(dtype=torch.float32)
    use_fp8(network)
    with pytest.raises(Fp8Error, match="Linear of Float8Tensor, not a plain"):
        use_fp8(network)
    monkeypatch.delitem(sys.modules, "torchao")
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(Fp8Error, match=r"pip install \.\[fp8\]"):
        use_fp8(network)


def test_a_gpu_that_cannot_is_refused(monkeypatch):
    """Catches an error of CUDA in the midst of a stream, in place of a word before it."""

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(Fp8Error, match=r"this is 8\.6"):
        use_fp8(tiny_network(dtype=torch.bfloat16), gpu)  # is on the CPU, and will run there
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(Fp8Error, match=r"the model is torch\.float32"):
        use_fp8(tiny_network(dtype=torch.float32), gpu)
    check_device(gpu, torch.bfloat16)
