"""Estimated costs, against counts of the running code, sums by hand, and published numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_models import TEXT_LENGTH, tiny_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selfforcing_dfd.config import Config, NetworkConfig, RolloutConfig
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.training.build import build_network, training_stage_of
from selfforcing_dfd.training.estimate import (
    GPUS,
    Clip,
    Estimate,
    clip_flops,
    clip_of,
    gpu_hours,
    num_parameters,
)
from selfforcing_dfd.training.utilisation import Utilisation

# Wan2.1, arXiv 2503.20314, table 2
WAN = NetworkConfig(num_heads=12, head_dim=128, num_layers=30, ffn_dim=8960, text_dim=4096)
WAN_14B = NetworkConfig(num_heads=40, head_dim=128, num_layers=40, ffn_dim=13824, text_dim=4096)
LATENT_SIZE, TEXT_TOKENS = (60, 104), 512
SMALL = NetworkConfig(
    num_heads=2, head_dim=16, num_layers=2, ffn_dim=48, channels=4, text_dim=12, freq_dim=32
)


def recipe(**changes: Any) -> Config:
    """DFD of a 1.3B student by a 1.3B teacher, one clip a pass: what research and recipes count."""
    return replace(load_config("wan1.3b/dfd_ar.yaml"), arms={}, **changes)


def wan_clip(config: Config) -> Clip:
    return clip_of(config, LATENT_SIZE, TEXT_TOKENS)


def estimate(
    config: Config, size: NetworkConfig = WAN, teacher: NetworkConfig | None = None
) -> Estimate:
    """Of a matching stage at 480x832."""
    sizes = {"student": size, "fake": size, "teacher": teacher or size}
    return Estimate(config, wan_clip(config), sizes)


def test_parameters_are_those_of_the_published_models():
    """Catches a size in a recipe that is not Wan's.

    1,418,996,800 and 14,288,491,584 are counted from its checkpoints.
    """
    assert num_parameters(WAN) == 1_418_996_800
    assert num_parameters(WAN_14B) == 14_288_491_584


def test_a_whole_clip_by_hand():
    """Catches a factor of two.

    21 frames of 30 x 52 tokens through 30 blocks of width 1536, in TFLOP to three digits: 2 x 32760
    x (6 x 1536^2 + 2 x 1536 x 8960) x 30 = 81.93; 4 x 32760^2 x 1536 x 30 = 197.82; text .04 +
    3.09; ends .01.
    """
    clip = wan_clip(recipe()).over("clip")
    assert clip.tokens == 32_760
    by_hand = 81.93 + 197.82 + 3.09 + 0.15 + 0.01
    assert clip_flops(WAN, clip, False, False) / 1e12 == pytest.approx(by_hand, abs=0.02)


def test_chunks_see_their_past_and_themselves():
    """Catches attention over the whole clip, or a window that counts the sink or the chunk twice.

    Seven chunks of 3 see 0, 3, ... 18 latent frames; with a window of 9, or of 6 beside a sink of
    3, at most 6.
    """
    config = recipe()
    clip = wan_clip(config)
    assert (clip.past, clip.over("clip").past) == ((0, 3, 6, 9, 12, 15, 18), (0,))
    window = replace(config, rollout=replace(config.rollout, window=9))
    assert wan_clip(window).past == (0, 3, 6, 6, 6, 6, 6)
    sink = replace(config, rollout=replace(config.rollout, window=6, sink=3))
    assert wan_clip(sink).past == wan_clip(window).past


def counted(config: Config, turn: str, rows: int = 2) -> tuple[int, Clip]:
    """Matrix products and attention of an update, counted by torch for one sample."""
    networks = {role: build_network(SMALL) for role in ("student", "teacher", "fake")}
    for network in networks.values():
        network.requires_grad_(False)
    networks[turn].requires_grad_(True)
    batch = tiny_batch(rows)
    batch = Batch(batch.latents.float(), batch.text.float(), batch.captions, batch.keys, None)
    # torch counts it as products only
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage = training_stage_of(config).build(config, networks, None)
        draw = Draw(0, 0, rows, 0, tuple(range(rows)))
        stage.loss(turn, batch, draw, 0).loss.backward()
    clip = clip_of(config, (batch.latents.shape[3], batch.latents.shape[4]), TEXT_LENGTH)
    return counter.get_total_flops() // rows, clip


@pytest.mark.parametrize(
    ("stage", "turn"),
    [("dmd", "student"), ("dmd", "fake"), ("init", "student"), ("teacher", "student")],
)
def test_operations_are_those_that_run(stage: str, turn: str):
    """Catches a pass that is forgotten or counted twice.

    Such as the last commit, both halves of guidance, or the backward's factor. A ladder of one
    step, so that the drawn exit is its mean. Within 1.5 %: a backward pass takes no gradient with
    respect to the text and the latents, the estimate takes two forward passes for it. (Measured: .1
    % to .9 %.)
    """
    config = load_config("dfd_ar.yaml", [f"run.stage={stage}"])
    config = replace(
        config, arms={}, rollout=RolloutConfig(frames=6, chunk_frames=2, ladder=(1000.0,))
    )
    number, clip = counted(config, turn)
    sizes = dict.fromkeys(("student", "fake", "teacher"), SMALL)
    parts = Estimate(config, clip, sizes).turn_flops(turn)
    assert number == pytest.approx(sum(parts.values()), rel=0.015)


def test_operations_are_the_published_estimates():
    """Catches an estimate that differs from research/training.md 5.1.

    It counts TFLOP a sample at 1.3B and 21 frames: 283 a whole clip (1,678 at 14B), 198 a causal
    pass, 694 a rollout with its last commit (40), 2,137 a student update, 1,826 a fake-score
    update. There the student is differentiated through the rollout's own pass. Replay adds 198, and
    the last commit is left out here, 40 in either update. Equal to half a percent.
    """
    config = recipe()
    clip = wan_clip(config)
    of_student = estimate(config).turn_flops("student")
    of_fake = estimate(config).turn_flops("fake")
    wanted = {
        "whole": 283,
        "14B": 1678,
        "causal": 198,
        "rollout": 694 - 40,
        "student": 2137 + 198 - 40,
        "fake": 1826 - 40,
    }
    found = {
        "whole": clip_flops(WAN, clip.over("clip"), False, False),
        "14B": clip_flops(WAN_14B, clip.over("clip"), False, False),
        "causal": clip_flops(WAN, clip, False, False),
        "rollout": of_student["rollout"] + of_student["commits"],
        "student": sum(of_student.values()),
        "fake": sum(of_fake.values()),
    }
    assert {name: flops / 1e12 for name, flops in found.items()} == pytest.approx(wanted, rel=0.005)


def test_mfu_counts_no_operation_twice():
    """Catches an MFU that activation checkpointing raises, as it raises what the GPU does.

    Of a student update at 1.3B, in TFLOP: 2,295 with the replay made again, 198 fewer without. In
    20 s for 1 sample at 989 TFLOP/s that is an MFU of 10.6 %.
    """
    once, again = (sum(estimate(recipe()).turn_flops("student", x).values()) for x in (False, True))
    assert (again - once) / 1e12 == pytest.approx(198, abs=1)
    assert Utilisation({"student": once}, 989e12).mfu("student", 1, 20) == pytest.approx(
        0.106, abs=5e-4
    )


def test_gpu_hours_are_the_published_ones():
    """Catches hours of one arm, one sample or one network.

    Research: DFD, 160 iterations at batch 64, 27 GPU-hours of H100. Self-Forcing's README: under 2
    hours on 64 H100, from which the utilisation is taken.
    """
    dfd, dmd = recipe(), load_config("wan1.3b/dmd_ar.yaml")
    assert gpu_hours(estimate(dfd).run_flops(), GPUS[0]) == pytest.approx(27, rel=0.02)
    flops = estimate(dmd, teacher=WAN_14B).run_flops()
    assert gpu_hours(flops, GPUS[0]) == pytest.approx(128, rel=0.05)
