"""A GAN beside distribution matching: who learns what from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, latents, tiny_batch, tiny_network
from tiny_stages import draw, gradients, matching_stage, touched
from torch import Tensor
from torch.nn.functional import softplus

from selfforcing_dfd import rng
from selfforcing_dfd.config import Config, ConfigError
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.flow import add_noise
from selfforcing_dfd.models.discriminator import Discriminator, block_outputs
from selfforcing_dfd.rng import generator
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.stages.base import teacher_start
from selfforcing_dfd.stages.dfd import DFDStage
from selfforcing_dfd.stages.gan import Gan, build_discriminator
from selfforcing_dfd.stages.matching import MatchingStage
from selfforcing_dfd.training.build import load_frozen

SIGMA = torch.tensor([0.7, 0.2], dtype=torch.float64)


def gan(**changes: Any) -> Gan:
    teacher = tiny_network(1).requires_grad_(False)
    made = Discriminator(32, TINY["num_layers"], (0.5, 1.0), 8).double()
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(0, f"D {number}")))
    settings: dict[str, Any] = {"weight": 0.5} | changes
    return Gan(teacher, made, **settings)


def scores_of(own: Gan, x_t: Tensor, text: Conditioning) -> Tensor:
    features, _ = block_outputs(own.teacher, own.discriminator.layers, x_t, SIGMA, text)
    return own.discriminator(features)


def stage_with(own: Gan | None) -> MatchingStage:
    plain = matching_stage()
    trained = plain.trained | ({"discriminator": own.discriminator} if own else {})
    return matching_stage(trained=trained, teacher=plain.teacher.requires_grad_(False), gan=own)


def test_depths_are_shares_of_the_teachers_blocks():
    """Catches features of other blocks than FastGen's 15, 22 and 29 of 30."""
    assert Discriminator(8, 30, (0.5, 0.75, 1.0), 4).layers == (15, 22, 29)


def test_features_are_what_the_blocks_return():
    """Catches features of another block, and hooks that stay and collect for ever."""
    network, clips = tiny_network(1), latents("clips")
    text = Conditioning(tiny_batch().text)
    seen: list[Tensor] = []
    network.blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    (first, second, again), flow = block_outputs(network, (0, 1, 0), clips, SIGMA, text)
    assert torch.equal(second, seen[0])
    assert first is again
    assert not torch.equal(first, second)
    assert torch.equal(network(clips, SIGMA, text).flow, flow)
    assert sum(len(block._forward_hooks) for block in network.blocks) == 1


def test_the_students_gradient_is_that_of_the_whole_chain():
    """Catches a lost factor of the noise level, and gradient in the discriminator."""
    own, x0, noise = gan(), latents("sample").requires_grad_(), latents("noise")
    text = Conditioning(tiny_batch().text)
    plain = softplus(-scores_of(own, add_noise(x0, noise, SIGMA), text)).mean(1)
    (expected,) = torch.autograd.grad(plain.sum(), x0)
    loss = own.student_loss(x0, noise, SIGMA, text)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), plain.detach())
    torch.testing.assert_close(x0.grad, expected)
    assert expected.norm() > 1e-6
    assert touched(own.discriminator) == touched(own.teacher) == []


def test_a_real_clip_wants_a_high_score_and_a_made_one_a_low_score():
    """Catches signs that are turned round, at either side of the game."""
    own, text = gan(), Conditioning(tiny_batch().text)
    made, real, noise = latents("made"), latents("real"), latents("noise")

    def loss() -> Tensor:
        return own.discriminator_loss(made, real, noise, SIGMA, text, draw()).mean()

    optimizer = torch.optim.Adam(own.discriminator.parameters(), lr=0.02)
    before = float(loss().detach())
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.5 * before
    scores = [scores_of(own, add_noise(x, noise, SIGMA), text).mean() for x in (real, made)]
    assert scores[0] > scores[1]
    sample = made.clone().requires_grad_()
    own.student_loss(sample, noise, SIGMA, text).sum().backward()
    assert sample.grad is not None
    nearer = made - 20 * sample.grad
    scores = [scores_of(own, add_noise(x, noise, SIGMA), text).mean() for x in (nearer, made)]
    assert scores[0] > scores[1]


def test_r1_asks_for_scores_that_a_little_noise_leaves_alone():
    """Catches a penalty at another noise level than the score that it is compared with.

    FastGen compares a noised real clip with a clean one that is called noised.
    """
    text = Conditioning(tiny_batch().text)
    clips = latents("made"), latents("real"), latents("noise")
    none, still, much = (
        gan(**settings).discriminator_loss(*clips, SIGMA, text, draw())
        for settings in (
            {},
            {"r1_weight": 100.0, "r1_noise": 1e-6},
            {"r1_weight": 100.0, "r1_noise": 0.5},
        )
    )
    torch.testing.assert_close(still, none, rtol=1e-6, atol=1e-6)
    assert (much > none + 1e-3).all()


def test_the_fake_score_learns_as_without_a_gan_and_the_discriminator_beside_it():
    """Catches a fake score that is trained to fool or to please the discriminator."""
    plain, own = stage_with(None), stage_with(gan())
    assert own.learners_of("fake") == ("fake", "discriminator")
    assert plain.learners_of("fake") == ("fake",)
    assert own.learners_of("student") == ("student",)
    for stage in (plain, own):
        stage.loss("fake", tiny_batch(), draw(), 0).loss.backward()
    assert torch.equal(gradients(plain.trained["fake"]), gradients(own.trained["fake"]))
    discriminator = own.trained["discriminator"]
    assert touched(discriminator) == [name for name, _ in discriminator.named_parameters()]
    assert touched(own.trained["student"]) == []


def test_the_student_gets_both_gradients_by_their_weights():
    """Catches a GAN that replaces distribution matching, or counts without its weight."""
    found = {}
    for weight in (0.0, 0.5, 1.0):
        stage = stage_with(gan(weight=weight))
        part = stage.loss("student", tiny_batch(), draw(), 0)
        part.loss.backward()
        found[weight] = gradients(stage.trained["student"])
        assert touched(stage.trained["discriminator"]) == []
        torch.testing.assert_close(
            part.loss.detach(), (part.values["loss"] + weight * part.values["gan"]).mean()
        )
    torch.testing.assert_close(found[0.5], (found[0.0] + found[1.0]) / 2)
    assert (found[1.0] - found[0.0]).norm() > 1e-4 * found[0.0].norm()


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance": 1.0}, {"control_variate": True}, {"given": 1}],
    ids=["guided", "unguided", "control variate", "given"],
)
def test_the_teachers_own_answer_is_what_the_discriminator_reads(changes: dict[str, Any]):
    """Catches a gradient of another clip, and an answer that the listening changes.

    One pass of the teacher about the student's sample instead of two. Guidance's pass without
    caption comes apart, and a control variate's pass is about the real clip.
    """
    found = {}
    rows: dict[bool, list[int]] = {False: [], True: []}
    for shares in (False, True):
        own = gan(shares=shares)
        stage = replace(stage_with(own), teacher=own.teacher, **changes)
        own.teacher.register_forward_hook(
            lambda _m, inputs, _out, seen=rows[shares]: seen.append(len(inputs[0]))
        )
        part = stage.loss("student", tiny_batch(), draw(), 0)
        part.loss.backward()
        found[shares] = gradients(stage.trained["student"])
        assert touched(stage.trained["discriminator"]) == []
    torch.testing.assert_close(found[True], found[False])
    assert sum(rows[False]) - sum(rows[True]) == len(tiny_batch().text)


def test_no_pass_is_shared_where_the_teacher_is_asked_about_something_else(tmp_path: Path):
    """Catches a discriminator that reads real clips as the student's, and another noise level."""
    assert MatchingStage.shares_gan_pass(gan_config(tmp_path))
    assert not MatchingStage.shares_gan_pass(gan_config(tmp_path, "gan.weight=0"))
    assert not MatchingStage.shares_gan_pass(gan_config(tmp_path, "published.sigma_tables=true"))
    assert not DFDStage.shares_gan_pass(gan_config(tmp_path, "run.stage=dfd"))


def test_weights_of_a_discriminator_follow_from_the_seed(tmp_path: Path):
    """Catches ranks that begin with different discriminators, and scores that begin far from 0."""
    config = gan_config(tmp_path)
    one, two, other = (
        build_discriminator(config, 32, 2, generator(seed, "further weights")) for seed in (0, 0, 1)
    )
    features = [latents("tokens").flatten(2)[:, :, :32].float()] * 3
    assert torch.equal(one(features), two(features))
    assert not torch.equal(one(features), other(features))
    assert one(features).abs().mean() < 3


def gan_config(tmp_path: Path, *overrides: str) -> Config:
    (tmp_path / "config.yaml").write_text("run: {stage: dmd}\ngan: {weight: 0.03}\n")
    paths = ["data.shards=nowhere", "weights.teacher=assets/tiny/teacher.safetensors"]
    return load_config(str(tmp_path / "config.yaml"), [*paths, *overrides])


def test_the_gradient_through_the_teacher_keeps_its_blocks_inputs_alone(tmp_path: Path):
    """Catches a frozen teacher without activation checkpointing.

    At 1.3B its activations would be 132 GB of a clip of 21 latent frames, and `--dry-run` counts
    3 GB. The gradient is the same.
    """
    kept: list[int] = []
    found: list[Tensor | None] = []

    def keep(saved: Tensor) -> Tensor:
        kept[-1] += saved.numel()
        return saved

    for what in ("none", "full"):
        config = gan_config(tmp_path, f"model.activation_checkpointing={what}")
        teacher = load_frozen(config, teacher_start(config))
        own = Gan(teacher, build_discriminator(config, 128, 6, generator(0, "D")), 1.0)
        x0 = rng.normal((1, 3, 16, 8, 8), 0, "x0").requires_grad_()
        text = Conditioning(torch.zeros(1, 12, 32))
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            own.student_loss(x0, torch.ones_like(x0), SIGMA[:1], text).sum().backward()
        found.append(x0.grad)
    assert kept[1] < 0.25 * kept[0]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gan.depths=[]", "gan.depths is empty"),
        ("model.sequence_ranks=2", "discriminator reads whole clips"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, override: str, message: str):
    """Catches a discriminator without inputs, or with a part of the tokens."""
    with pytest.raises(ConfigError, match=message):
        gan_config(tmp_path, override)


def test_a_gan_needs_clips(tmp_path: Path):
    """Catches captions alone, for which every clip is zeros, taken as real."""
    assert MatchingStage.uses_clips(gan_config(tmp_path)) == "gan.weight is 0.03"
    assert MatchingStage.uses_clips(gan_config(tmp_path, "gan.weight=0")) == ""


def test_given_frames_reach_the_discriminator_clean():
    """Catches a noised picture, which is no sign of a made clip, and R1's noise on it."""
    own, batch = gan(r1_weight=1.0), tiny_batch()
    stage = replace(stage_with(own), given=1)
    seen: list[tuple[Tensor, Tensor]] = []
    own.teacher.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[:2]))
    for turn in ("student", "fake"):
        part = stage.loss(turn, batch, draw(), 0)
        part.loss.backward()
        assert part.loss.isfinite()
    for x_t, sigma in seen:
        assert torch.equal(x_t[:, :1], batch.latents[:, :1].repeat(len(x_t) // 2, 1, 1, 1, 1))
        assert sigma.shape == x_t.shape[:2]
        assert not sigma[:, 0].any()
        assert sigma[:, 1:].all()
    assert sorted(len(x_t) for x_t, _ in seen) == [2, 6]  # the student's; made, real and R1's
