"""What is worked out once for many calls changes no call."""

from __future__ import annotations

import pytest
import torch
from tiny_models import LADDER, conditioning, latents, tiny_network

from selfforcing_dfd.context import KVCache
from selfforcing_dfd.models.rope import positions_rotary, rotary_angles, rotary_tables

ROUNDING = 1e-12  # float64: one row or many through the same product


@pytest.mark.parametrize("sigma", [*LADDER, 0.0])
def test_prepared_text_and_levels_change_nothing(sigma):
    """Catches a prepared sigma or text of another block, and a scale without its one."""
    network = tiny_network()
    text = conditioning()
    prepared = network.prepare(text, (*LADDER, 0.0))
    cache = KVCache()
    cache.append(network(latents("past", 2), 0.0, text, cache.read(2)).kv)
    x_t = latents("x_t", 2)
    plain, quick = (network(x_t, sigma, given, cache.read(2)).flow for given in (text, prepared))
    assert (plain - quick).abs().max() < ROUNDING
    per_frame = network(
        x_t, torch.full((2, 2), sigma, dtype=torch.float64), prepared, cache.read(2)
    ).flow
    assert (plain - per_frame).abs().max() < ROUNDING


def test_levels_differ():
    """Catches the test above passing on a network that does not listen to sigma."""
    network = tiny_network()
    text = conditioning()
    x_t = latents("x_t", 2)
    low, high = (network(x_t, sigma, text).flow for sigma in LADDER[:2])
    assert (low - high).abs().max() > 1e-3


def test_another_position_has_another_rotation():
    """Catches kept tables returned for another place, size or precision."""
    cpu = torch.device("cpu")
    for start, frames, dtype in [
        (0, 2, torch.float32),
        (7, 2, torch.float32),
        (7, 3, torch.float64),
        (0, 2, torch.float32),
    ]:
        kept = positions_rotary(start, frames, 2, 3, 16, cpu, dtype)
        fresh = rotary_tables(rotary_angles(start, frames, 2, 3, 16)[:, None], dtype)
        assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(kept, fresh, strict=True))


def test_kept_rotations_serve_training_after_inference():
    """Catches tables made under inference mode, which autograd refuses in a backward pass."""
    network = tiny_network()
    text = conditioning()
    x_t = latents("x_t", 2)
    positions_rotary.cache_clear()
    with torch.inference_mode():
        network(x_t, 0.5, text)
    network(x_t, 0.5, text).flow.sum().backward()
    assert network.blocks[0].attn1.to_q.weight.grad is not None
