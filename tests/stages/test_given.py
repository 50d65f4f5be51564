"""Frames that are given: clean in every network's input, exact in the sample, without loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CHUNK, FRAMES, LADDER, DataForcing, latents, tiny_batch, tiny_network
from tiny_stages import CHUNKS, NO_ROW, dp_stage, draw, gradients, matching_stage
from torch import Tensor

from selfforcing_dfd.config import Config, ConfigError
from selfforcing_dfd.context import Conditioning, NetworkOutput
from selfforcing_dfd.flow import add_noise, x0_from_flow
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.objectives import distribution_matching
from selfforcing_dfd.rollout import replay
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.stages.base import TrainingStage
from selfforcing_dfd.stages.causal import CausalStage
from selfforcing_dfd.stages.matching import MatchingStage
from selfforcing_dfd.stages.regression import RegressionStage
from selfforcing_dfd.stages.teacher import TeacherStage

GIVEN = 1
ALL_ROWS = torch.ones(2, dtype=torch.bool)


def regression(**settings: Any) -> RegressionStage:
    student = tiny_network(0)
    causal = tiny_network(1).requires_grad_(False)
    return RegressionStage(
        {"student": student}, causal, CHUNKS, LADDER, 5.0, num_steps=2, given=GIVEN, **settings
    )


def of_clips(kind: Callable[..., TrainingStage], *settings: Any) -> TrainingStage:
    return kind({"student": tiny_network()}, *settings, given=GIVEN)


STAGES: dict[str, Callable[[], TrainingStage]] = {
    "dmd": lambda: matching_stage(given=GIVEN),
    "dfd": lambda: matching_stage(DataForcing(p=1.0, pairing="noised_real"), given=GIVEN),
    "kept": lambda: matching_stage(given=GIVEN, keeps_noise=True, control_variate=True),
    "teacher": lambda: of_clips(TeacherStage, 3.0, 0.1, CHUNK),
    "causal": lambda: of_clips(CausalStage, CHUNKS, 3.0, 0.1),
    "trajectory": regression,
    "next_step": lambda: regression(target="next_step", keeps_noise=True),
    "consistency": lambda: regression(target="consistency"),
    "own": lambda: regression(own=1.0),
    "dp_dmd": lambda: dp_stage(given=GIVEN),
    "dp_dmd, causal": lambda: dp_stage(given=GIVEN, keeps_noise=True, causal=tiny_network(3)),
}
"""A stage of each kind that takes given frames."""


def networks_of(stage: TrainingStage) -> list[WanTransformer]:
    others = (getattr(stage, name, None) for name in ("teacher", "causal"))
    return [*stage.trained.values(), *(other for other in others if other is not None)]


def at_the_beginning(inputs: tuple[Any, ...]) -> bool:
    """Whether a network is asked about the first frames of a clip."""
    context = inputs[3] if len(inputs) > 3 else None
    return context is None or context.next_frame == 0


def disturb(network: WanTransformer, by: Tensor) -> None:
    """From now on the network predicts something else at given frames."""

    def hook(_: object, inputs: tuple[Any, ...], output: NetworkOutput) -> NetworkOutput:
        if not at_the_beginning(inputs):
            return output
        flow = torch.cat([output.flow[:, :GIVEN] + by, output.flow[:, GIVEN:]], dim=1)
        return NetworkOutput(flow, output.kv)

    network.register_forward_hook(hook)


def watched(network: WanTransformer) -> list[tuple[Tensor, Tensor | float]]:
    """(x_t, sigma) of every later call about the first frames of a clip."""
    seen: list[tuple[Tensor, Tensor | float]] = []

    def hook(_: object, inputs: tuple[Any, ...], output: NetworkOutput) -> None:
        if at_the_beginning(inputs):
            seen.append((inputs[0].detach(), inputs[1]))

    network.register_forward_hook(hook)
    return seen


@pytest.mark.parametrize("step", range(len(LADDER)))
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"keeps_noise": True},
        {"real_input": True},
        {"forcing": DataForcing(p=1.0, pairing="noised_prefix")},
    ],
    ids=["fresh", "kept", "noised real", "noised prefix"],
)
def test_the_given_frame_of_a_rollout_is_the_real_one(change, step):
    """Catches a given frame that is noised, predicted, or rounded on its way: equal to the bit."""
    stage = matching_stage(given=GIVEN, **change)
    batch = tiny_batch()
    record = stage.roll_out(batch, draw(), ALL_ROWS, step)
    x0 = replay(stage.trained["student"], record, Conditioning(batch.text))
    for clip in (record.x0, record.x_exit, x0):
        assert torch.equal(clip[:, :GIVEN], batch.latents[:, :GIVEN])
    assert not record.sigma_exit[:, :GIVEN].any()
    assert (record.sigma_exit[:, GIVEN:] == LADDER[step]).all()
    torch.testing.assert_close(x0, record.x0, rtol=1e-12, atol=1e-12)


def test_the_student_sees_the_given_frame_at_every_step():
    """Catches a picture that only the last step, or only the commit pass, gets to see."""
    stage, batch = matching_stage(given=GIVEN), tiny_batch()
    seen = watched(stage.trained["student"])
    stage.roll_out(batch, draw(), NO_ROW, 3)
    assert len(seen) == len(LADDER) + 1  # and the commit pass
    for x_t, sigma in seen:
        assert torch.equal(x_t[:, :GIVEN], batch.latents[:, :GIVEN])
        if isinstance(sigma, Tensor):
            assert not sigma[:, :GIVEN].any()
    assert [float(sigma[0, -1]) for _, sigma in seen[:-1]] == list(LADDER)  # type: ignore[index]


def test_another_given_frame_makes_another_clip():
    """Catches a picture without effect on its own chunk, or on the later ones."""
    stage, batch = matching_stage(given=GIVEN), tiny_batch()
    changed = batch.latents.clone()
    changed[:, :GIVEN] += 0.5
    clips = [
        stage.roll_out(replace(batch, latents=each), draw(), NO_ROW, 3).x0
        for each in (batch.latents, changed)
    ]
    moved = (clips[0] - clips[1]).abs()[:, GIVEN:].amax((0, 2, 3, 4))
    assert moved.min() > 1e-4
    others = replace(batch, latents=torch.cat([batch.latents[:, :GIVEN], changed[:, GIVEN:]], 1))
    others.latents[:, GIVEN:] += 1.0
    assert torch.equal(stage.roll_out(others, draw(), NO_ROW, 3).x0, clips[0])


@pytest.mark.parametrize("name", STAGES)
def test_what_networks_predict_at_given_frames_does_not_matter(name):
    """Catches a loss, a normaliser, an anchor or a target that counts given frames.

    Loss and gradient are equal to the bit, and no gradient comes from these predictions.
    """
    turns = ("student", "fake") if name == "dmd" else ("student",)
    for turn in turns:
        found = []
        for amount in (None, 3.0):
            stage = STAGES[name]()
            by = torch.full((1,), amount or 0.0, dtype=torch.float64, requires_grad=True)
            if amount is not None:
                for network in networks_of(stage):
                    disturb(network, by)
            part = stage.loss(turn, tiny_batch(), draw(), 0)
            part.loss.backward()
            assert by.grad is None or not by.grad.any()
            found.append((part.loss.detach(), gradients(stage.trained[turn])))
        (loss, gradient), (disturbed_loss, disturbed_gradient) = found
        assert loss.isfinite() and loss > 0
        assert gradient.isfinite().all()
        assert torch.equal(loss, disturbed_loss)
        assert torch.equal(gradient, disturbed_gradient)


@pytest.mark.parametrize("name", ["teacher", "causal", "trajectory", "next_step", "consistency"])
def test_a_network_that_learns_from_clips_sees_the_given_frame_clean(name):
    """Catches a teacher that is trained on a noised picture and asked about a clean one."""
    stage, batch = STAGES[name](), tiny_batch()
    seen = watched(stage.trained["student"])
    stage.loss("student", batch, draw(), 0)
    x_t, sigma = seen[-1]
    assert isinstance(sigma, Tensor)
    assert torch.equal(x_t[:, :GIVEN], batch.latents[:, :GIVEN])
    assert not sigma[:, :GIVEN].any()
    assert sigma[:, GIVEN:].all()


def scores_of(stage: MatchingStage) -> list[tuple[Tensor, Tensor | float]]:
    teacher = watched(stage.teacher)  # type: ignore[arg-type]
    fake = watched(stage.trained["fake"])  # type: ignore[arg-type]
    stage.loss("student", tiny_batch(), draw(), 0)
    return [*teacher, *fake]


@pytest.mark.parametrize("pairing", ["caption", "noised_real"])
def test_teacher_and_fake_score_see_the_given_frame_clean(pairing):
    """Catches an anchor or a sample whose picture is noised for one of the two networks."""
    batch = tiny_batch()
    seen = scores_of(matching_stage(DataForcing(p=1.0, pairing=pairing), given=GIVEN))
    assert len(seen) == 2
    for x_t, sigma in seen:
        assert isinstance(sigma, Tensor)
        assert not sigma[:, :GIVEN].any()
        assert torch.equal(sigma[:, GIVEN:], sigma[:, -1:].expand(len(sigma), FRAMES - GIVEN))
        real = batch.latents[:, :GIVEN].repeat(len(x_t) // 2, 1, 1, 1, 1)
        assert torch.equal(x_t[:, :GIVEN], real)


def test_without_given_frames_noise_levels_are_one_a_sample():
    """Catches another path of rounding for runs that give nothing: theirs stays as it was."""
    stage = matching_stage()
    student = watched(stage.trained["student"])  # type: ignore[arg-type]
    assert all(sigma.shape == (len(x_t),) for x_t, sigma in scores_of(stage))  # type: ignore[union-attr]
    assert [isinstance(sigma, float) for _, sigma in student] == [True] * (len(student) - 1) + [
        False
    ]


def test_gradient_is_d_over_n_over_the_values_that_are_made():
    """Catches a mean over frames that cannot change: a weaker step the more frames are given."""
    teacher, fake = tiny_network(1), tiny_network(2)
    real, noise, text = latents("real"), latents("noise"), Conditioning(tiny_batch().text)
    x0 = torch.cat([real[:, :GIVEN], latents("x0")[:, GIVEN:]], dim=1).requires_grad_()
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    matching = distribution_matching(
        x0,
        real,
        noise,
        sigma,
        teacher=teacher,
        fake=fake,
        conditioning=text,
        negative=text,
        guidance=1.0,
        given=GIVEN,
    )
    (gradient,) = torch.autograd.grad(matching.loss.sum(), x0)
    assert not gradient[:, :GIVEN].any()
    level = torch.cat([torch.zeros(2, GIVEN), sigma[:, None].expand(2, FRAMES - GIVEN)], 1)
    with torch.no_grad():
        fake_t, real_t = add_noise(x0, noise, level), add_noise(real, noise, level)
        of_fake = x0_from_flow(fake_t, fake(fake_t, level, text).flow, level)[:, GIVEN:]
        of_real = x0_from_flow(real_t, teacher(real_t, level, text).flow, level)[:, GIVEN:]
        made = x0[:, GIVEN:]
    for row in range(2):
        n = (made[row] - of_real[row]).abs().mean()
        d = of_fake[row] - of_real[row]
        expected = d / n / made[row].numel()
        torch.testing.assert_close(gradient[row, GIVEN:], expected, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(matching.normaliser[row], n)
        torch.testing.assert_close(matching.discrepancy[row], d.abs().mean())


def test_data_equal_to_the_own_samples_is_dmd_bitwise():
    """Catches anything that data forcing changes besides the anchor, with a given frame too."""
    batch = tiny_batch()
    generated = matching_stage(given=GIVEN).loss("student", batch, draw(), 0).generated
    assert generated is not None
    own = replace(batch, latents=generated)
    found = []
    for forcing in (DataForcing(), DataForcing(p=1.0)):
        stage = matching_stage(forcing, given=GIVEN)
        part = stage.loss("student", own, draw(), 0)
        part.loss.backward()
        found.append((part.loss.detach(), gradients(stage.trained["student"])))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    anchored = matching_stage(DataForcing(p=1.0), given=GIVEN).loss("student", batch, draw(), 0)
    assert not torch.equal(anchored.loss, found[0][0])


@pytest.mark.parametrize("causal", [None, 3])
def test_the_anchor_of_dp_dmd_begins_with_the_given_frame(causal):
    """Catches a first step that starts from noise alone, and a mean over frames that are given."""
    stage = dp_stage(given=GIVEN, causal=causal and tiny_network(causal))
    batch = tiny_batch()
    text = Conditioning(batch.text)
    record = stage.roll_out(batch, draw(), NO_ROW, 2)
    seen = watched(stage.trained["student"])
    (_, loss) = stage.further_losses(batch, draw(), record)["anchor"]
    ((x_t, sigma),) = seen
    noise = stage.rollout_noise(batch, draw())[0]
    start = torch.cat([batch.latents[:, :GIVEN], noise[:, GIVEN:]], dim=1)
    assert torch.equal(x_t, start)
    assert isinstance(sigma, Tensor)
    assert not sigma[:, :GIVEN].any()
    assert (sigma[:, GIVEN:] == 1).all()
    target = stage.anchor(start, record.x0, text, batch.text)
    assert torch.equal(target[:, :GIVEN], batch.latents[:, :GIVEN])
    x0 = replay(stage.trained["student"], replace(record, x_exit=x_t, sigma_exit=sigma), text)
    torch.testing.assert_close(loss, (x0 - target)[:, GIVEN:].square().mean((1, 2, 3, 4)))


def test_a_shared_frame_makes_the_gap_smaller_only_by_what_follows_from_it():
    """Catches a gap of Eq. 7 that counts given frames, where it is always zero."""
    part = matching_stage(DataForcing(p=1.0), given=GIVEN).loss("student", tiny_batch(), draw(), 0)
    assert part.generated is not None
    assert part.real is not None
    distance = (part.generated - part.real)[:, GIVEN:].square().mean((1, 2, 3, 4))
    torch.testing.assert_close(part.values["gap"], distance)


@pytest.fixture
def config_with(tmp_path: Path) -> Callable[..., Config]:
    def load(*overrides: str) -> Config:
        (tmp_path / "config.yaml").write_text("run: {stage: dmd}\nrollout: {given: 1}\n")
        needed = ["data.shards=none", "weights.teacher=t.safetensors", "pairs.out=p"]
        return load_config(str(tmp_path / "config.yaml"), [*needed, *overrides])

    return load


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.given=3", r"given is 3 latent frames, but a chunk has 3, .* use 0 to 2"),
        ("run.stage=pairs", r"given is 1, but stage pairs makes every frame.*causal, dfd, dmd"),
        ("run.stage=init", "stage init makes every frame"),
        ("dfd.pairing=prefix", r"given is 1 and dfd\.pairing is prefix: the noise stored"),
    ],
)
def test_what_does_not_go_with_given_frames_is_refused(config_with, override, message):
    """Catches a stage that would take no notice of the setting."""
    stage = ["run.stage=dfd"] if override.startswith("dfd") else []
    with pytest.raises(ConfigError, match=message):
        config_with(*stage, override)


def test_given_frames_need_clips(config_with):
    """Catches captions without clips, whose pictures would all be zeros."""
    assert MatchingStage.uses_clips(config_with()) == "rollout.given is 1"
    assert MatchingStage.uses_clips(config_with("rollout.given=0")) == ""
