"""8-bit linear layers compute what their 8-bit numbers say, and nothing else is converted."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import LADDER, conditioning, latents, tiny_network
from torch import nn

from selfforcing_dfd import rng
from selfforcing_dfd.models.fp8 import Fp8Error, Fp8Linear, to_fp8, use_fp8

HALF_STEP = 2**-4  # e4m3 has three bits behind the leading one


def layer(in_features: int = 64, out_features: int = 32) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    with torch.no_grad():
        linear.weight.copy_(rng.normal((out_features, in_features), 0, "weight"))
        linear.bias.copy_(rng.normal((out_features,), 0, "bias"))
    return linear.requires_grad_(False)


def test_numbers_are_kept_to_half_a_step():
    """Catches a scale that overflows to NaN, one scale for all rows, and a division by zero."""
    x = rng.normal((5, 64), 0, "x") * torch.tensor([1e-4, 1.0, 300.0, 1e4, 0.0])[:, None]
    values, scale = to_fp8(x)
    error = (values.float() * scale - x).abs()
    smallest = scale * 2**-9  # below 2^-6 of the scale steps no longer shrink: half of the last one
    assert bool((error <= torch.maximum(HALF_STEP * x.abs(), smallest)).all())
    assert (values.float() * scale).amax(dim=1)[:4].allclose(x.amax(dim=1)[:4], rtol=HALF_STEP)


def test_a_layer_is_the_product_of_its_8_bit_numbers():
    """Catches scales on the wrong side, a transposed weight and a lost bias.

    Tolerance: the rounding of a bf16 result, 2^-8.
    """
    linear = layer()
    x = rng.normal((2, 7, 64), 0, "x") * 10
    rows, scale = to_fp8(x.flatten(0, 1))
    weight, weight_scale = to_fp8(linear.weight)
    wanted = (rows.double() * scale) @ (
        weight.double() * weight_scale
    ).t() + linear.bias.bfloat16().double()
    made = Fp8Linear(linear)(x)
    assert made.dtype == x.dtype
    torch.testing.assert_close(made.double(), wanted.unflatten(0, (2, 7)), rtol=2**-8, atol=2**-8)


def test_a_network_changes_a_little():
    """Catches a layer converted twice or in another's place.

    4 % is twice what was measured with random weights.
    """
    plain = tiny_network(dtype=torch.float32).requires_grad_(False)
    quick = copy.deepcopy(plain)
    assert use_fp8(quick) == 8 * 2
    text = conditioning(dtype=torch.float32)
    a, b = (
        network(latents("x", dtype=torch.float32), LADDER[1], text).flow
        for network in (plain, quick)
    )
    difference = float((a - b).norm() / a.norm())
    assert 1e-4 < difference < 0.04


def test_text_embedders_and_head_stay():
    """Catches the parts that need precision, or that run once a prompt, being converted too."""
    network = tiny_network(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    use_fp8(network)
    kept = [
        name
        for name, tensor in network.state_dict().items()
        if name in before
        and before[name].dtype == tensor.dtype
        and torch.equal(before[name], tensor)
    ]
    assert {
        "proj_out.weight",
        "condition_embedder.time_proj.weight",
        "blocks.1.attn2.to_k.weight",
    } <= set(kept)


def test_what_cannot_be_converted_is_refused_whole():
    """Catches a network left half converted, and adapters dropped without a word."""
    network = tiny_network(dtype=torch.float32, ffn_dim=24)
    with pytest.raises(Fp8Error, match="multiples of 16"):
        use_fp8(network)
    assert not any(isinstance(module, Fp8Linear) for module in network.modules())
    network = tiny_network(dtype=torch.float32)
    use_fp8(network)
    with pytest.raises(Fp8Error, match="Fp8Linear, not plain"):
        use_fp8(network)
