"""A matching stage of three tiny networks, its draws, and helpers on batches and gradients."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from tiny_models import CHUNK, FRAMES, LADDER, DataForcing, tiny_network
from torch import Tensor, nn

from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import plan_chunks
from selfforcing_dfd.stages.dp_dmd import DPDMDStage
from selfforcing_dfd.stages.matching import MatchingStage

CHUNKS = plan_chunks(FRAMES, CHUNK)
SIGMAS = (1.0, 0.97, 0.93)
NO_ROW = torch.zeros(2, dtype=torch.bool)  # no row is tied


def draw(count: int = 2, first: int = 0, update: int = 0, seed: int = 0) -> Draw:
    size = max(16, first - update + count)
    return Draw(seed, update, size, first, tuple(range(first, first + count)))


def matching_stage(forcing: DataForcing | None = None, **changes: Any) -> MatchingStage:
    """Three different networks, none frozen, so that misplaced gradient shows."""
    settings: dict[str, Any] = {
        "trained": {"student": tiny_network(0), "fake": tiny_network(2)},
        "teacher": tiny_network(1),
        "chunks": CHUNKS,
        "ladder": LADDER,
        "guidance": 4.0,
        "shift": 5.0,
        "sigma_min": 0.02,
        "sigma_max": 0.98,
        "min_normaliser": 1e-3,
        "fake_per_student": 5,
        **(forcing or DataForcing()).settings(),
    }
    return MatchingStage(**(settings | changes))


def dp_stage(**changes: Any) -> DPDMDStage:
    """DP-DMD of these networks. SIGMAS: its anchor's ODE, two steps."""
    plain = matching_stage()
    settings = {field.name: getattr(plain, field.name) for field in fields(plain)}
    own = {"anchor_sigmas": SIGMAS, "anchor_weight": 0.5, "guidance": 3.0}
    return DPDMDStage(**(settings | own | changes))


def rows_of(batch: Batch, start: int, count: int) -> Batch:
    part = slice(start, start + count)
    noise = batch.noise[part] if batch.noise is not None else None
    return Batch(
        batch.latents[part], batch.text[part], batch.captions[part], batch.keys[part], noise
    )


def gradients(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def touched(network: nn.Module) -> list[str]:
    return [name for name, p in network.named_parameters() if p.grad is not None]
