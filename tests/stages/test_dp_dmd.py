"""DP-DMD: the first step keeps to a teacher's ODE, distribution matching trains the others."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LADDER, tiny_batch, tiny_network
from tiny_stages import CHUNKS, NO_ROW, SIGMAS, dp_stage, draw, gradients
from torch import Tensor

from selfforcing_dfd.config import Config, ConfigError
from selfforcing_dfd.context import ChunkContext, Conditioning, KVCache
from selfforcing_dfd.flow import x0_from_flow
from selfforcing_dfd.ode import teacher_forced_contexts
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.stages.dp_dmd import AnchorConfig, DPDMDStage
from selfforcing_dfd.training.build import build_networks, training_stage_of
from selfforcing_dfd.training.plan import plan


def anchor_of(stage: DPDMDStage, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(the noise that clips start from, what their first step should predict)."""
    batch, text = tiny_batch(seed=seed), Conditioning(tiny_batch(seed=seed).text)
    start = stage.rollout_noise(batch, draw())[0]
    return start, stage.anchor(start, batch.latents, text, batch.text)


@pytest.mark.parametrize(("own", "guidance"), [(None, 3.0), (1.0, 1.0), (2.0, 2.0)])
def test_the_anchor_is_where_the_guided_ode_of_the_whole_clip_leads(own: Any, guidance: float):
    """Catches guidance on the wrong side, another schedule, and an anchor that is a clean clip.

    A step straight to the anchor must end where two Euler steps of the teacher's ODE end, with a
    guidance of its own or that of distribution matching.
    """
    stage = dp_stage(anchor_guidance=own)
    start, x0 = anchor_of(stage)
    text = tiny_batch().text
    x_t = start
    for level, following in pairwise(SIGMAS):
        sigma = torch.full((2,), level, dtype=torch.float64)
        cond = stage.teacher(x_t, sigma, Conditioning(text)).flow
        uncond = stage.teacher(x_t, sigma, Conditioning(torch.zeros_like(text))).flow
        x_t = x_t + (following - level) * (uncond + guidance * (cond - uncond))
    straight = start + (SIGMAS[-1] - 1.0) * (start - x0)
    torch.testing.assert_close(straight, x_t, rtol=0, atol=1e-12)


def test_a_student_that_is_the_causal_teacher_has_an_error_of_0_after_one_step():
    """Catches a first step that sees another noise, level or past than the anchor's."""
    same = dp_stage(causal=tiny_network(0), anchor_sigmas=(1.0, 0.97))
    other = dp_stage(causal=tiny_network(1), anchor_sigmas=(1.0, 0.97))
    error, wrong = (
        float(stage.loss("student", tiny_batch(), draw(), 0).values["anchor"].max())
        for stage in (same, other)
    )
    assert error < 1e-20
    assert wrong > 1e-3


def test_the_first_step_of_each_chunk_sees_its_own_past():
    """Catches first steps without context, or after another clip's."""
    stage, batch = dp_stage(), tiny_batch()
    student, text = stage.trained["student"], Conditioning(batch.text)
    record = stage.roll_out(batch, draw(), NO_ROW, 2)
    start = stage.rollout_noise(batch, draw())[0]
    target = stage.anchor(start, record.x0, text, batch.text)
    contexts = teacher_forced_contexts(student, record.x0, text, KVCache(), CHUNKS)
    errors = []
    for chunk, context in zip(CHUNKS, contexts, strict=True):
        flow = student(chunk.of(start), 1.0, text, context).flow
        x0 = x0_from_flow(chunk.of(start), flow, 1.0)
        errors.append((x0 - chunk.of(target)).square().mean((1, 2, 3, 4)))
    weight, loss = stage.further_losses(batch, draw(), record)["anchor"]
    assert weight == 0.5
    torch.testing.assert_close(loss, torch.stack(errors).mean(0))


def test_distribution_matching_never_trains_the_first_step():
    """Catches the mode-seeking gradient at the step that keeps the modes, and steps left out."""
    stage, seen = dp_stage(anchor_weight=0.0), set()
    turns = len(LADDER) - 1
    for update in range(turns):
        exit_step = 1 + draw().in_turn("exit", turns, update)
        generated = stage.loss("student", tiny_batch(), draw(), update).generated
        assert generated is not None
        record = stage.roll_out(tiny_batch(), draw(), NO_ROW, exit_step)
        torch.testing.assert_close(generated, record.x0)
        seen |= set(record.sigma_exit.flatten().tolist())
    assert seen == set(LADDER[1:])


def test_the_fake_score_never_learns_samples_of_the_first_step(monkeypatch: pytest.MonkeyPatch):
    """Catches a fake score of other samples than those that it is asked about."""
    stage, seen = dp_stage(), set()
    roll_out = stage.roll_out

    def noticing(batch: Any, draw: Any, tied: Tensor, exit_step: int, of_first: int | None) -> Any:
        seen.add(exit_step)
        return roll_out(batch, draw, tied, exit_step, of_first)

    monkeypatch.setattr(stage, "roll_out", noticing)
    for n in range(24):
        stage.fake_loss(tiny_batch(), draw(first=2 * n, update=2 * n))
    assert seen == {1, 2, 3}


def test_the_loss_is_distribution_matching_and_the_weighted_error():
    """Catches a weight that is not applied, and a gradient that stops at the first step."""
    found = {}
    for weight in (0.0, 0.5, 1.0):
        stage = dp_stage(anchor_weight=weight)
        part = stage.loss("student", tiny_batch(), draw(), 0)
        part.loss.backward()
        found[weight] = part, gradients(stage.trained["student"])
    none, half, whole = (found[weight][1] for weight in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + whole) / 2)
    assert (whole - none).norm() > 1e-2 * none.norm()
    values = found[1.0][0].values
    torch.testing.assert_close(found[1.0][0].loss, (values["loss"] + values["anchor"]).mean())


def small(tmp_path: Any, *overrides: str) -> Config:
    (tmp_path / "config.yaml").write_text("run: {stage: dp_dmd}\n")
    paths = ["data.shards=nowhere", "weights.teacher=assets/tiny/teacher.safetensors"]
    return load_config(str(tmp_path / "config.yaml"), [*paths, *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.ladder=[1000]", "one step, which DP-DMD does not train"),
        ("anchor.teacher=causal", "weights.causal is empty: name a causal teacher"),
        ("anchor.steps=31", "anchor.steps is 31 and anchor.of 30"),
        (
            "anchor.teacher=causal weights.causal=some anchor.guidance=2",
            "anchor.guidance is 2, but the causal teacher.s ODE is not guided",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Any, override: str, message: str):
    """Catches a run that fails after its first rollout, or anchors beyond the ODE's end."""
    with pytest.raises(ConfigError, match=message):
        small(tmp_path, *override.split())


def test_settings_reach_the_stage(tmp_path: Any):
    """Catches a schedule, weight or causal teacher that is not the config's."""
    config = small(
        tmp_path,
        "anchor.teacher=causal",
        "anchor.steps=3",
        "anchor.of=4",
        "anchor.weight=0.25",
        "weights.causal=assets/tiny/causal.safetensors",
        "flow.shift=1",
    )
    stage = training_stage_of(config).build(
        config, build_networks(config, torch.device("cpu")), None
    )
    assert isinstance(stage, DPDMDStage)
    assert stage.anchor_sigmas == (1.0, 0.75, 0.5, 0.25)
    assert stage.anchor_weight == 0.25
    assert stage.causal is not None
    assert "3 of 4 steps of the causal teacher's ODE, weight 0.25" in plan(config)


def test_what_an_update_costs_counts_the_anchor(tmp_path: Any):
    """Catches estimates that leave the teacher's ODE out."""

    def times(name: str, *overrides: str) -> float:
        config = small(tmp_path, *overrides)
        passes = DPDMDStage.passes(config)["student"]
        return next(each.times for each in passes if each.name == name)

    assert times("anchor") == 10  # five steps, with and without caption
    assert times("anchor", "score.guidance=1") == 5
    assert times("anchor", "anchor.guidance=1") == 5
    causal = ("anchor.teacher=causal", "weights.causal=assets/tiny/causal.safetensors")
    assert times("anchor", *causal) == 5
    assert times("rollout") == 3  # two, three or four steps


def test_each_step_goes_on_with_the_noise_of_the_first(tmp_path: Path):
    """Catches recipes with fresh noise between steps, which forget what the first one decided."""
    stage, batch = dp_stage(keeps_noise=True), tiny_batch()
    student, text = stage.trained["student"], Conditioning(batch.text)
    record = stage.roll_out(batch, draw(), NO_ROW, 1)
    chunk = CHUNKS[0]
    start = chunk.of(stage.rollout_noise(batch, draw())[0])
    flow = student(start, 1.0, text, ChunkContext()).flow
    torch.testing.assert_close(
        chunk.of(record.x_exit), start + (LADDER[1] - LADDER[0]) * flow, rtol=0, atol=1e-12
    )
    for recipe in ("tiny/dp_dmd", "tiny/dp_dmd_t2v", "wan1.3b/dp_dmd", "wan1.3b/dp_dmd_t2v"):
        rollout = load_config(f"{recipe}.yaml").rollout
        assert rollout.noise == "kept", recipe
        assert rollout.chunk_frames == (rollout.frames if recipe.endswith("t2v") else 3), recipe
    image = load_config("wan1.3b/dp_dmd_i2v.yaml")
    assert (image.rollout.noise, image.rollout.given) == ("kept", 1)
    assert image.of(AnchorConfig).steps == 1
