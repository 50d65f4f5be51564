"""Costs by arithmetic: against counts of the code that runs, sums by hand, and the published
estimates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import TEXT_LENGTH, tiny_batch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selfforcing_dfd.config import BatchConfig, Config, ModelConfig, RolloutConfig, load_config
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.cost import network_flops, peak_tflops
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.streaming.random_model import network_sizes
from selfforcing_dfd.training.build import build_network, build_stage, shape_of
from selfforcing_dfd.training.estimate import (
    GPUS,
    Clip,
    clip_of,
    estimate_memory,
    fake_flops,
    fewest_gpus,
    forward_flops,
    gpu_hours,
    kv_bytes,
    num_parameters,
    run_flops,
    saved_bytes,
    student_flops,
)
from selfforcing_dfd.training.precision import compute_in


def published(size: str) -> ModelConfig:
    """The section `model` of a recipe for a published model."""
    with torch.device("meta"):
        config = WanTransformer(**network_sizes(size)).config
    return ModelConfig(
        num_heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        num_layers=config["num_layers"],
        ffn_dim=config["ffn_dim"],
        text_dim=config["text_dim"],
        gradient_checkpointing=True,
        compute="bfloat16",
    )


WAN = published("wan1.3b")
WAN_14B = published("wan14b")
LATENT_SIZE, TEXT_TOKENS = (60, 104), 512
SMALL = ModelConfig(
    num_heads=2, head_dim=16, num_layers=2, ffn_dim=48, channels=4, text_dim=12, freq_dim=32
)


def recipe(**changes: Any) -> Config:
    """DFD of a 1.3B student by a 1.3B teacher, one clip a pass: what research and recipes count."""
    return replace(load_config("wan1.3b/dfd_ar.yaml"), arms={}, **changes)


def wan_clip(config: Config) -> Clip:
    return clip_of(config, LATENT_SIZE, TEXT_TOKENS)


def test_parameters_are_those_of_the_published_models():
    """Catches a size in a recipe that is not Wan's: 1,418,996,800 and 14,288,491,584 are counted
    from its checkpoints.
    """
    assert num_parameters(WAN) == 1_418_996_800
    assert num_parameters(WAN_14B) == 14_288_491_584
    assert recipe().model == WAN
    assert load_config("wan14b/dmd_ar.yaml").model == WAN_14B


def test_a_whole_clip_by_hand():
    """Catches a factor of two: 21 frames of 30 x 52 tokens through 30 blocks of width 1536, in
    TFLOP to three digits.

    2 x 32760 x (6 x 1536^2 + 2 x 1536 x 8960) x 30 = 81.93; 4 x 32760^2 x 1536 x 30 = 197.82; text
    .04 + 3.09; ends .01.
    """
    clip = wan_clip(recipe()).whole
    assert clip.tokens == 32_760
    assert forward_flops(WAN, clip) / 1e12 == pytest.approx(
        81.93 + 197.82 + 3.09 + 0.15 + 0.01, abs=0.02
    )


def test_chunks_see_their_past_and_themselves():
    """Catches attention counted over the whole clip, or a window that counts the chunk twice.

    Seven chunks of 3: 3 x (3 + 6 + ... + 21) = 252 of 441 pairs of latent frames; a window of 9
    leaves 3 x (3 + 6 + 9 x 5).
    """
    config = recipe()
    clip = wan_clip(config)
    assert (clip.pairs, clip.whole.pairs) == (252 * 1560**2, 441 * 1560**2)
    window = replace(config, rollout=replace(config.rollout, window=9))
    assert wan_clip(window).pairs == 3 * (3 + 6 + 9 * 5) * 1560**2


def test_streaming_counts_the_same():
    """Catches two packages' arithmetic drifting apart: a chunk that sees 21 frames, text included,
    in both.
    """
    clip = Clip((3,), (18,), 30 * 52, TEXT_TOKENS)
    student = shape_of(WAN)
    own = network_flops(student, 1, (3,), LATENT_SIZE, TEXT_TOKENS, (18,))
    # a time embedding for each latent frame here, one for all of them there
    assert forward_flops(WAN, clip) == pytest.approx(own, rel=1e-4)
    assert {gpu.name: gpu.tflops for gpu in GPUS} == {
        gpu.name: peak_tflops(gpu.name) for gpu in GPUS
    }


def counted(config: Config, turn: str, rows: int = 2) -> tuple[int, Clip]:
    """Matrix products and attention of an update as torch counts them while it runs, for one
    sample.
    """
    networks = {role: build_network(SMALL) for role in ("student", "teacher", "fake")}
    for network in networks.values():
        network.requires_grad_(False)
    networks[turn].requires_grad_(True)
    batch = tiny_batch(rows)
    batch = Batch(batch.latents.float(), batch.text.float(), batch.captions, batch.keys, None)
    # torch counts it as products only
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build_stage(config, networks).loss(
            turn, batch, Draw(0, 0, 0, tuple(range(rows))), 0
        ).loss.backward()
    clip = clip_of(config, (batch.latents.shape[3], batch.latents.shape[4]), TEXT_LENGTH)
    return counter.get_total_flops() // rows, clip


@pytest.mark.parametrize(
    ("stage", "turn"),
    [("dmd", "student"), ("dmd", "fake"), ("init", "student"), ("teacher", "student")],
)
def test_operations_are_those_that_run(stage: str, turn: str):
    """Catches a pass that is forgotten or counted twice: the last commit, both halves of guidance,
    the backward's factor.

    A ladder of one step, so that the drawn exit is its mean. Within 1.5 %: a backward pass takes no
    gradient with respect to the text and the latents, the estimate takes two forward passes for it.
    (Measured: .1 % to .9 %.)
    """
    config = load_config("dfd_ar.yaml", [f"run.stage={stage}"])
    config = replace(
        config,
        model=SMALL,
        arms={},
        rollout=RolloutConfig(frames=6, chunk_frames=2, ladder=(1000.0,)),
    )
    number, clip = counted(config, turn)
    parts = student_flops(config, clip) if turn == "student" else fake_flops(config, clip)
    assert number == pytest.approx(sum(parts.values()), rel=0.015)


def test_operations_are_the_published_estimates():
    """Catches an estimate that has left research/training.md 5.1 behind. It counts TFLOP a sample
    at 1.3B and 21 frames:

    283 a whole clip (1,678 at 14B), 198 a causal pass, 694 a rollout with its last commit (40),
    2,137 a student update, 1,826 a fake-score update. There the student is differentiated through
    the rollout's own pass; replay adds 198, and the last commit is left out here, 40 in either
    update. Equal to half a percent.
    """
    config = recipe()
    clip = wan_clip(config)
    student, fake = student_flops(config, clip), fake_flops(config, clip)
    wanted = {
        "whole": 283,
        "14B": 1678,
        "causal": 198,
        "rollout": 694 - 40,
        "student": 2137 + 198 - 40,
        "fake": 1826 - 40,
    }
    found = {
        "whole": forward_flops(WAN, clip.whole),
        "14B": forward_flops(WAN_14B, clip.whole),
        "causal": forward_flops(WAN, clip),
        "rollout": student["rollout"],
        "student": sum(student.values()),
        "fake": sum(fake.values()),
    }
    assert {name: flops / 1e12 for name, flops in found.items()} == pytest.approx(wanted, rel=0.005)


def test_gpu_hours_are_the_published_ones():
    """Catches hours of one arm, one sample or one network. Research: DFD, 160 iterations at batch
    64, 27 GPU-hours of H100;

    Self-Forcing's README: under 2 hours on 64 H100, from which the utilisation is taken.
    """
    dfd, dmd = recipe(), load_config("wan1.3b/dmd_ar.yaml")
    assert gpu_hours(run_flops(dfd, wan_clip(dfd)), GPUS[0]) == pytest.approx(27, rel=0.02)
    assert gpu_hours(run_flops(dmd, wan_clip(dmd)), GPUS[0]) == pytest.approx(128, rel=0.05)


@pytest.mark.parametrize(
    ("teacher", "gpus", "gigabytes"),
    [(None, 1, 64), (WAN_14B, 1, 90), (None, 8, 24), (WAN_14B, 8, 28)],
)
def test_memory_is_the_published_estimate(teacher: ModelConfig | None, gpus: int, gigabytes: int):
    """Catches a term that is lost or doubled: research/training.md 5.2, within a tenth ("about", it
    says).
    """
    config = recipe(teacher_model=teacher)
    memory = estimate_memory(config, wan_clip(config), gpus)
    assert memory.total / 1e9 == pytest.approx(gigabytes, rel=0.1), memory.lasting


def test_lasting_memory_by_hand():
    """Catches bytes a parameter: two networks and an average at 4, moments at 8 each, a teacher at
    2; a share on 4 GPUs.
    """
    config = recipe()
    size = num_parameters(WAN)
    memory = estimate_memory(config, wan_clip(config))
    assert sum(memory.lasting.values()) == (2 * 4 + 2 * 8 + 4 + 2) * size
    shards = estimate_memory(config, wan_clip(config), 4).lasting
    shared = {name: amount for name, amount in shards.items() if "gathered" not in name}
    assert sum(shared.values()) == pytest.approx((2 * 4 + 2 * 8 + 4 + 2) * size / 4, rel=1e-6)


def test_keys_and_values_of_a_clip():
    """Catches one of the two, or float32: 274 MiB a latent frame at 1.3B, 1,219 at 14B
    (research/selfforcing.md 1.1).
    """
    frame = Clip((1,), (0,), 1560, TEXT_TOKENS)
    assert kv_bytes(WAN, frame) / 2**20 == pytest.approx(274, abs=0.5)
    assert kv_bytes(WAN_14B, frame) / 2**20 == pytest.approx(1219, abs=0.5)


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_a_block_saves_what_is_estimated(compute: str):
    """Catches the constants of `saved_bytes` when a block changes: every tensor that autograd keeps
    is counted once.

    Between two sizes, so that what does not grow with the clip drops out. 6 %: a few values a token
    (norms' statistics).
    """
    size = replace(SMALL, num_heads=4, head_dim=32, ffn_dim=512, num_layers=1, compute=compute)
    found = [kept_by_block(size, side) for side in (8, 16)]
    wanted = [saved_bytes(size, Clip((3,), (0,), side**2 // 4, TEXT_LENGTH)) for side in (8, 16)]
    assert found[1] - found[0] == pytest.approx(wanted[1] - wanted[0], rel=0.06)


def kept_by_block(size: ModelConfig, side: int) -> int:
    """Bytes of all tensors that the network's one block saves for its backward pass, weights and
    inputs left out.
    """
    network = build_network(size)
    if size.compute == "bfloat16":
        compute_in(network, torch.bfloat16)
    kept: dict[int, tuple[int, Tensor]] = {}
    block = network.blocks[0]
    forward = block.forward

    def watched(x: Tensor, *inputs: Any) -> Any:
        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() != x.untyped_storage().data_ptr():
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return forward(x, *inputs)

    block.forward = watched  # type: ignore[method-assign]
    text = Conditioning(torch.ones(1, TEXT_LENGTH, size.text_dim))
    network(torch.ones(1, 3, size.channels, side, side), torch.full((1,), 0.5), text)
    return sum(nbytes for nbytes, _ in kept.values())


def test_fewest_gpus_fit_and_half_of_them_do_not():
    """Catches a comparison the wrong way round; a 14B student fits no single GPU, and a 1.3B one
    fits 80 GB.
    """
    config = recipe()
    assert [fewest_gpus(config, wan_clip(config), gpu) for gpu in GPUS] == [1, 1, 1]
    large = load_config("wan14b/dmd_ar.yaml")
    fewest = fewest_gpus(large, wan_clip(large), GPUS[1])
    assert fewest is not None and fewest > 1
    totals = [
        estimate_memory(large, wan_clip(large), gpus).total / 1e9 for gpus in (fewest, fewest // 2)
    ]
    assert totals[0] <= GPUS[1].gigabytes < totals[1]


def test_more_rows_cost_more_memory_but_not_more_weights():
    """Catches activations that forget the micro-batch."""
    config = recipe()
    two = replace(config, batch=BatchConfig(size=64, micro=2))
    before, after = (estimate_memory(each, wan_clip(config)) for each in (config, two))
    assert before.lasting == after.lasting
    past = "keys and values of the past"
    assert after.phases["scores"][past] == 2 * before.phases["scores"][past]
