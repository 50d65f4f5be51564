"""bfloat16 compute over float32 weights: what it changes, and by how much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FRAMES, LADDER, DataForcing, conditioning, latents, tiny_batch, tiny_network
from torch import Tensor, nn

from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.processes.world import World
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import plan_chunks
from selfforcing_dfd.stages.matching import MatchingStage
from selfforcing_dfd.training.sharding import Sharding, release
from selfforcing_dfd.weights.tensors import whole

BF16 = torch.bfloat16
ALONE = Sharding(World(), compute=BF16)


def computing(seed: int = 0, **sizes: Any) -> WanTransformer:
    network = tiny_network(seed, torch.float32, **sizes)
    ALONE.apply(network, is_trained=True)
    return network


def gradient(network: nn.Module) -> Tensor:
    release(network)
    return torch.cat([whole(p.grad).flatten() for p in network.parameters() if p.grad is not None])


def error(x: Tensor, of: Tensor) -> float:
    return float((x.float() - of.float()).norm() / of.float().norm())


def inputs() -> tuple[Tensor, Tensor, Any]:
    x = latents("x", dtype=torch.float32)
    return x, torch.tensor([0.3, 0.8]), conditioning(dtype=torch.float32)


def test_it_is_the_network_in_bfloat16_bit_for_bit():
    """Catches a parameter that stays float32 inside.

    Sharded training would then be another computation than this one.
    """
    cast = tiny_network(0, torch.float32)
    nn.Module.to(cast, BF16)
    assert torch.equal(computing()(*inputs()).flow, cast(*inputs()).flow)


def test_weights_gradients_and_names_stay_float32():
    """Catches an optimizer, average or checkpoint that sees casts.

    A learning rate of 2e-6 is below half the resolution of most bfloat16 weights.
    """
    network = computing()
    plain = tiny_network(0, torch.float32)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network(*inputs()).flow.float().square().mean().backward()
    release(network)
    assert [name for name, _ in network.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    for name, p in network.named_parameters():
        assert isinstance(p, nn.Parameter) and torch.equal(whole(p), whole(before[name]))
        assert p.grad is not None and p.grad.dtype == torch.float32, name


def test_checkpointed_blocks_run_again_in_bfloat16():
    """Catches a backward pass that re-runs a block with its float32 weights.

    Another function than the one that ran.
    """
    gradients = []
    for checkpointing in (False, True):
        network = computing()
        if checkpointing:
            network.enable_gradient_checkpointing()
        network(*inputs()).flow.float().square().mean().backward()
        gradients.append(gradient(network))
    assert torch.equal(*gradients)


def test_gradients_add_up_in_float32():
    """Catches micro-batches summed in bfloat16, where 64 of them lose the small ones.

    Both sums have the same summands; float32 sums of two agree to its rounding, bfloat16 ones to
    4e-3.
    """
    x, sigma, text = inputs()
    parts = []
    both = computing()
    for row in (0, 1):
        alone = computing()
        for network in (alone, both):
            one = type(text)(text.text[row : row + 1])
            network(
                x[row : row + 1], sigma[row : row + 1], one
            ).flow.float().square().mean().backward()
        parts.append(gradient(alone))
    assert torch.equal(gradient(both), parts[0] + parts[1])


def to_float(batch: Batch) -> Batch:
    return Batch(batch.latents.float(), batch.text.float(), batch.captions, batch.keys, None)


def wan_shaped(in_bfloat16: bool) -> MatchingStage:
    """Wan's proportions: heads, blocks, checkpointing, a teacher in its compute dtype."""
    sizes = {"num_attention_heads": 4, "num_layers": 4, "ffn_dim": 256}
    networks = [tiny_network(seed, torch.float32, **sizes) for seed in (0, 1, 2)]
    for network in networks:
        network.enable_gradient_checkpointing()
    student, teacher, fake = networks
    if in_bfloat16:
        ALONE.apply(student, is_trained=True)
        ALONE.apply(fake, is_trained=True)
        nn.Module.to(teacher, BF16)
    trained: dict[str, nn.Module] = {"student": student, "fake": fake}
    chunks = plan_chunks(FRAMES, 2)
    return MatchingStage(
        trained,
        teacher.requires_grad_(False),
        chunks,
        LADDER,
        4.0,
        5.0,
        0.02,
        0.98,
        1e-3,
        5,
        **DataForcing(p=1.0).settings(),
    )


@pytest.mark.parametrize(
    ("turn", "loss_bound", "gradient_bound"), [("student", 0.0075, 0.022), ("fake", 0.005, 0.022)]
)
def test_an_update_in_bfloat16_is_the_one_in_float32_within_its_rounding(
    turn: str, loss_bound: float, gradient_bound: float
) -> None:
    """Catches float32 islands that went missing, and latents or losses rounded to bfloat16.

    Measured over four draws: worst loss .24 % and .17 %, gradient .72 % and .73 % (bfloat16 rounds
    at .39 %); bounds three times that.
    """
    losses = []
    gradients = []
    for in_bfloat16 in (False, True):
        stage = wan_shaped(in_bfloat16)
        parts = []
        for first in range(0, 8, 2):
            part = stage.loss(
                turn, to_float(tiny_batch()), Draw(0, first, 2, first, (first, first + 1)), 0
            )
            part.loss.backward()
            parts.append(part.loss.detach())
        assert all(part.isfinite() and part.dtype == torch.float32 for part in parts)
        losses.append(torch.stack(parts))
        gradients.append(gradient(stage.trained[turn]))
    wrong = (
        float(((losses[1] - losses[0]) / losses[0]).abs().max()),
        error(gradients[1], gradients[0]),
    )
    assert gradients[1].isfinite().all()
    assert wrong[0] < loss_bound and wrong[1] < gradient_bound, wrong
    assert wrong[1] > 1e-4, "the bfloat16 pass is float32"
