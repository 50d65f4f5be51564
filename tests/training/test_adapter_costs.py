"""Costs of adapters: against counts of the running code, and what fits where."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tiny_models import TEXT_LENGTH, tiny_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selfforcing_dfd.config import NetworkConfig, RolloutConfig
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.models.adapted import AdaptedNetwork, adapt
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.training.adapter_costs import adapter_values
from selfforcing_dfd.training.build import build_network, training_stage_of
from selfforcing_dfd.training.estimate import Estimate, clip_of
from selfforcing_dfd.training.plan import plan

RANK = 4
SMALL = NetworkConfig(
    num_heads=2, head_dim=16, num_layers=2, ffn_dim=48, channels=4, text_dim=12, freq_dim=32
)


@pytest.mark.parametrize("turn", ["student", "fake"])
def test_operations_are_those_that_run(turn: str) -> None:
    """Catches gradients of frozen weights that are counted, and adapters that are not.

    A ladder of one step, so that the drawn exit is its mean. Within 5 %: no gradient is taken with
    respect to the text, or to what enters the first of the two blocks, and the estimate counts it.
    """
    lora = [f"model.lora_rank={RANK}", "weights.student=", "weights.fake="]
    config = load_config("dfd_ar.yaml", ["run.stage=dmd", *lora])
    config = replace(
        config, arms={}, rollout=RolloutConfig(frames=6, chunk_frames=2, ladder=(1000.0,))
    )
    base = build_network(SMALL).requires_grad_(False)
    networks = {role: adapt(base, role, RANK, seed=0) for role in ("student", "fake")}
    values = sum(parameter.numel() for parameter in networks["fake"].parameters())
    assert adapter_values(SMALL, RANK) == values
    networks["teacher"] = AdaptedNetwork(base)
    other = "fake" if turn == "student" else "student"
    networks[other].requires_grad_(False)
    batch = tiny_batch(2)
    batch = Batch(batch.latents.float(), batch.text.float(), batch.captions, batch.keys, None)
    # torch counts it as products only
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage = training_stage_of(config).build(config, networks, None)
        stage.loss(turn, batch, Draw(0, 0, 2, 0, (0, 1)), 0).loss.backward()
    sizes = dict.fromkeys(("student", "fake", "teacher"), SMALL)
    clip = clip_of(config, (batch.latents.shape[3], batch.latents.shape[4]), TEXT_LENGTH)
    parts = Estimate(config, clip, sizes).turn_flops(turn)
    assert counter.get_total_flops() // 2 == pytest.approx(sum(parts.values()), rel=0.05)


@pytest.mark.parametrize(
    ("recipe", "gpus", "fits"),
    [
        ("wan1.3b/dmd_ar.yaml", 8, True),  # 14B teacher, 1.3B student
        ("wan14b/dmd_lora.yaml", 8, True),
        ("wan14b/dfd_lora.yaml", 8, True),
        ("wan14b/init_lora.yaml", 8, True),
        ("wan14b/dmd_ar.yaml", 8, False),  # all of it is trained
    ],
)
def test_what_fits_eight_gpus_of_80_gigabytes(recipe: str, gpus: int, fits: bool) -> None:
    """Catches a recipe that grew out of the GPUs that docs/running.md names for it."""
    text = plan(load_config(recipe, [f"run.gpus={gpus}"]))
    for in_all in re.findall(r"([\d.]+) GB  in all", text):
        assert (float(in_all) < 80) == fits, text


def test_an_adapter_of_an_image_to_video_network_has_layers_for_the_picture():
    """Catches costs of text-to-video for a network whose blocks have two more linear layers."""
    size = replace(SMALL, image_dim=20)
    adapted = adapt(build_network(size).requires_grad_(False), "student", RANK, seed=0)
    values = sum(parameter.numel() for parameter in adapted.parameters())
    assert adapter_values(size, RANK) == values
