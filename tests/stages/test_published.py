"""The public code's deviations: off they change nothing, on they do what the public code does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_weights import golden
from tiny_models import DataForcing, latents, tiny_batch, tiny_network
from tiny_stages import CHUNKS, NO_ROW, draw, gradients, matching_stage
from torch import Tensor

from selfforcing_dfd.config import Config, ConfigError
from selfforcing_dfd.context import ChunkContext, ChunkKV, Conditioning
from selfforcing_dfd.flow import add_noise, x0_from_flow
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rollout import RealRows, Rollout, replay
from selfforcing_dfd.stages import arms_of, load_as_published, load_config, stage_of
from selfforcing_dfd.stages.causal import CausalStage
from selfforcing_dfd.stages.published import (
    NAMES,
    Published,
    PublishedConfig,
    looked_up,
    nearest,
    sigma_table,
    weight_table,
    weighted_flow_matching,
)

ALL = Published(context_gradient=True, context_noise=True, sigma_tables=True)


def test_off_everything_is_handed_back():
    """Catches a default run that is no longer the run it was: not even a copy is made."""
    off = Published()
    network = tiny_network()
    sigma = torch.rand(2)
    batch = tiny_batch()
    rows = RealRows(batch.latents, NO_ROW)
    assert off.replayed(network) is off.score(network, sigma) is network
    assert off.noised_at(sigma) is off.uniform(sigma) is sigma
    assert off.past(rows, batch.latents, draw()) is rows
    assert off.past(None, batch.latents, draw()) is None


@pytest.mark.parametrize("shift", [5, 8])
def test_tables_are_the_published_ones(shift):
    """Catches a table of another length, end or shift, and another weight."""
    tables = golden("schedule")
    assert torch.equal(sigma_table(shift), tables[f"shift{shift}/sigmas"])
    weights = tables[f"shift{shift}/training_weight"]
    torch.testing.assert_close(weight_table(shift), weights, rtol=0, atol=1e-6)
    sigma = tables["example/t"] / 1000
    assert torch.equal(nearest(sigma, shift), tables[f"shift{shift}/example/table_index"])
    assert torch.equal(looked_up(sigma, shift), tables[f"shift{shift}/example/sigma"])


def test_levels_of_scores_are_those_of_whole_timesteps():
    """Catches a lookup of levels that the published code never draws."""
    u = torch.tensor([0.0, 0.0005, 0.077, 0.4209, 0.9999], dtype=torch.float64)
    wanted = torch.tensor([0.0, 0.0, 0.077, 0.42, 0.999], dtype=torch.float64)
    assert torch.allclose(ALL.uniform(u), wanted, atol=1e-12)


def one_by_one(student: WanTransformer, record: Rollout, text: Conditioning) -> Tensor:
    """x0 with gradient, chunk after chunk, by a cache that keeps the trained steps' gradient.

    Written from what the published code does: values of the clean pass, gradient of the trained
    step. Its own K/V are caught by hooks, since `ChunkKV` detaches what it gets.
    """
    caught: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.register_forward_hook(lambda _, inputs, outputs: caught.append(outputs[1:]))
        for block in student.wan_blocks()
    ]
    past: list[ChunkKV] = []
    made = []
    for chunk, clean in zip(record.chunks, clean_past(record), strict=True):
        sigma = float(record.sigma_exit[0, chunk.start])
        x_t = chunk.of(record.x_exit)
        caught.clear()
        level = x_t.new_full((len(x_t),), sigma)
        out = student(x_t, level, text, ChunkContext(tuple(past), chunk.start))
        made.append(x0_from_flow(x_t, out.flow, sigma))
        if clean is not None:
            mixed = [
                tuple(own + (kept - own).detach() for own, kept in zip(ours, theirs, strict=True))
                for ours, theirs in zip(caught, clean.layers, strict=True)
            ]
            leaky = ChunkKV(chunk.frames, clean.layers)
            object.__setattr__(leaky, "layers", tuple(mixed))
            past.append(leaky)
    for hook in hooks:
        hook.remove()
    return torch.cat(made, dim=1)


def clean_past(record: Rollout) -> list[ChunkKV | None]:
    last = record.contexts[-1]
    assert isinstance(last, ChunkContext)
    return [*last.chunks, None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_leak_is_that_of_a_cache_written_in_place(checkpointing):
    """Catches gradient that reaches the chunk before and not the one before that.

    Three chunks, all in one packed call, with and without activation checkpointing.
    """
    batch = tiny_batch()
    stage = matching_stage(published=Published(context_gradient=True))
    student: Any = stage.trained["student"]
    text = Conditioning(batch.text)
    record = stage.roll_out(batch, draw(), NO_ROW, 2)
    wanted = one_by_one(student, record, text)
    wanted.square().mean().backward()
    theirs = gradients(student)
    student.zero_grad()
    if checkpointing:
        student.enable_gradient_checkpointing()
    ours = replay(stage.published.replayed(student), record, text)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    ours.square().mean().backward()
    assert (gradients(student) - theirs).norm() < 1e-12 * theirs.norm()
    student.zero_grad()
    replay(student, record, text).square().mean().backward()
    assert (gradients(student) - theirs).norm() > 0.02 * theirs.norm()


def test_the_leak_changes_the_gradient_alone():
    """Catches a leak that moves the sample, the loss or what the fake score learns from."""
    results = []
    for published in (Published(), Published(context_gradient=True)):
        stage = matching_stage(published=published)
        loss = stage.loss("student", tiny_batch(), draw(), 0)
        loss.loss.backward()
        results.append((loss, gradients(stage.trained["student"])))
    (plain, plain_grad), (leaky, leaky_grad) = results
    assert torch.equal(plain.loss, leaky.loss)
    assert torch.equal(plain.generated, leaky.generated)
    assert not torch.equal(plain_grad, leaky_grad)
    fake = [
        matching_stage(published=published).loss("fake", tiny_batch(), draw(), 0).loss
        for published in (Published(), Published(context_gradient=True))
    ]
    assert torch.equal(fake[0], fake[1])


@pytest.mark.parametrize("pairing", ["caption", "prefix"])
def test_context_noise_is_added_to_what_becomes_context(pairing):
    """Catches noise on the sample itself, on the wrong chunk, and real rows that are left clean."""
    batch = tiny_batch(with_noise=True)
    tied = torch.tensor([True, False])
    forcing = DataForcing(p=1.0, pairing=pairing)
    stage = matching_stage(forcing, published=Published(context_noise=True))
    rows = RealRows(batch.latents, tied) if stage.forcing.pairing.real_past else None
    past = stage.published.past(rows, batch.latents, draw())
    assert past is not None
    x0 = torch.zeros_like(CHUNKS[1].of(batch.latents))
    expected = x0 if rows is None else rows.instead_of(x0, CHUNKS[1])
    noise = CHUNKS[1].of(draw().normal("context_noise", batch.latents.shape[1:], batch.latents))
    sigma = 5 * 0.001 / (1 + 4 * 0.001)
    torch.testing.assert_close(past.instead_of(x0, CHUNKS[1]), add_noise(expected, noise, sigma))
    first, second = (
        matching_stage(published=each).roll_out(batch, draw(), NO_ROW, 3)
        for each in (Published(), Published(context_noise=True))
    )
    assert torch.equal(CHUNKS[0].of(first.x0), CHUNKS[0].of(second.x0))
    assert 0 < (CHUNKS[1].of(first.x0) - CHUNKS[1].of(second.x0)).abs().max() < 0.1


def causal_stage(published_weight: bool) -> CausalStage:
    return CausalStage(
        {"student": tiny_network()}, CHUNKS, 5.0, 0.0, published_weight=published_weight
    )


def test_the_loss_weight_of_ar_diffusion():
    """Catches a weight for samples in place of latent frames, and one where it is not wanted."""
    batch = tiny_batch()
    network = tiny_network()
    text = Conditioning(batch.text)
    noise = latents("noise of the loss")
    sigma = torch.tensor([[1.0, 1.0, 0.5, 0.5, 0.02, 0.02]], dtype=torch.float64).expand(2, 6)
    with torch.no_grad():
        flow = network(add_noise(batch.latents, noise, sigma), sigma, text).flow
        error = (flow - (noise - batch.latents)).square().mean((2, 3, 4))
        weighted = weighted_flow_matching(network, batch.latents, noise, sigma, text, None, 5.0)
    weights = weight_table(5.0)[nearest(sigma[0], 5.0)].double()
    assert weights[0] == 0  # at sigma 1, where generation begins
    assert weights[2] > 2 > 0.13 > weights[4]
    torch.testing.assert_close(weighted, (weights * error).mean(1))
    losses = [causal_stage(weight).loss("student", batch, draw(), 0).loss for weight in (0, 1)]
    assert not torch.equal(losses[0], losses[1])


MINIMAL = """
run: {name: tried, stage: dmd}
weights: {teacher: teacher.safetensors, student: student.safetensors}
data: {shards: shards}
arms: {matching: [], stable: [run.stage=regression, regression.target=clip]}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    (tmp_path / "minimal.yaml").write_text(MINIMAL)
    return str(tmp_path / "minimal.yaml")


def test_as_published_turns_on_what_each_stage_knows(minimal):
    """Catches a deviation that the switch forgets, or that a stage claims and does not have."""
    config = load_as_published(minimal)
    assert all(vars_of(config).values())
    known = {run.run.name: stage_of(run).as_published(run) for run in arms_of(config)}
    assert known == {"tried/matching": NAMES[:3], "tried/stable": ()}
    causal = load_as_published(minimal, ["run.stage=causal"])
    assert stage_of(causal).as_published(causal) == ("loss_weight",)
    one_off = load_as_published(minimal, ["published.context_noise=false"])
    assert vars_of(one_off) == vars_of(config) | {"context_noise": False}
    assert not any(vars_of(load_config(minimal)).values())


def vars_of(config: Config) -> dict[str, bool]:
    return dataclasses.asdict(config.of(PublishedConfig))


def test_a_switch_without_effect_is_refused(minimal):
    """Catches a run that is called published and is not, and a leak past a window."""
    with pytest.raises(ConfigError, match="changes nothing in stage init, regression; it is for"):
        load_as_published(minimal, ["run.stage=init"])
    with pytest.raises(ConfigError, match="the published code cannot train with a window"):
        load_as_published(minimal, ["rollout.window=6"])
    load_as_published(minimal, ["rollout.window=6", "published.context_gradient=false"])
    with pytest.raises(ConfigError, match=r"published\.sigma_tables and rollout\.given=1"):
        load_config(minimal, ["rollout.given=1", "published.sigma_tables=true"])
