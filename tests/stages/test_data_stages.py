"""Stages that regress on data, teacher and init: noise, context, text dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import CHUNK, latents, tiny_batch, tiny_network
from tiny_stages import CHUNKS, draw

from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.ode import teacher_forced_contexts
from selfforcing_dfd.stages.base import drop_text
from selfforcing_dfd.stages.init import InitStage
from selfforcing_dfd.stages.teacher import TeacherStage


def single_stages() -> dict[str, TeacherStage | InitStage]:
    return {
        "teacher": TeacherStage({"student": tiny_network()}, shift=3.0, text_dropout=0.1),
        "init": InitStage({"student": tiny_network()}, CHUNKS, shift=3.0, text_dropout=0.1),
    }


@pytest.mark.parametrize("name", ["teacher", "init"])
def test_data_stages_reach_every_parameter(name):
    """Catches a stage that trains half a network.

    Every parameter gets a finite gradient that is not zero.
    """
    stage = single_stages()[name]
    part = stage.loss("student", tiny_batch(), draw(), 0)
    part.loss.backward()
    assert part.loss.isfinite()
    for parameter_name, p in stage.trained["student"].named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), parameter_name


def test_init_stage_is_teacher_forcing():
    """Catches context of the student's own or of noisy clips, and stored noise in later chunks.

    With stored noise there, the student would learn to follow its noise and not its context.
    Compared with a loop over the chunks of real clips.
    """
    stage, batch = (
        InitStage({"student": tiny_network()}, CHUNKS, 3.0, 0.0),
        tiny_batch(with_noise=True),
    )
    assert batch.noise is not None
    noises = draw().normal("noise", batch.latents.shape[1:], batch.latents)
    noises[:, : CHUNKS[0].frames] = batch.noise[:, : CHUNKS[0].frames]
    network, text, losses = stage.trained["student"], Conditioning(batch.text), []
    level = draw().uniform("sigma", (3,))
    sigma = 3 * level / (1 + 2 * level)
    contexts = teacher_forced_contexts(network, batch.latents, text, KVCache(), CHUNKS)
    for index, (chunk, context) in enumerate(zip(CHUNKS, contexts, strict=True)):
        x0, noise, s = (
            chunk.of(batch.latents),
            chunk.of(noises),
            sigma[:, index, None, None, None, None],
        )
        flow = network((1 - s) * x0 + s * noise, sigma[:, index], text, context).flow
        losses.append((flow - (noise - x0)).square().mean())
    assert [context.next_frame for context in contexts] == [0, 2, 4]
    assert [len(context.chunks) for context in contexts] == [0, 1, 2]
    loss = stage.loss("student", batch, draw(), 0).loss
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-12, atol=0)


def test_init_stage_uses_the_stored_noise_where_there_is_some():
    """Catches a regression from independent noise.

    The few-step student would learn the mean of all clips.
    """
    stage, batch = (
        InitStage({"student": tiny_network()}, CHUNKS, 3.0, 0.0),
        tiny_batch(with_noise=True),
    )
    with_noise, other, without = (
        stage.loss("student", replace(batch, noise=noise), draw(), 0).loss
        for noise in (batch.noise, latents("other clip noise"), None)
    )
    assert len({float(loss.detach()) for loss in (with_noise, other, without)}) == 3


def test_teacher_stage_shifts_and_clamps_nothing_else():
    """Catches sigmas that stop short of 0 or 1.

    The sampler starts at exactly 1 and inversion at 0.
    """
    level = draw(64).uniform("sigma")
    stage = TeacherStage({"student": tiny_network()}, shift=3.0, text_dropout=0.0)
    losses = stage.loss("student", tiny_batch(64, frames=1), draw(64), 0).values["flow_loss"]
    network, batch = stage.trained["student"], tiny_batch(64, frames=1)
    noise = draw(64).normal("noise", batch.latents.shape[1:], batch.latents)
    sigma = 3 * level / (1 + 2 * level)
    s = sigma[:, None, None, None, None]
    flow = network((1 - s) * batch.latents + s * noise, sigma, Conditioning(batch.text)).flow
    torch.testing.assert_close(
        losses, (flow - (noise - batch.latents)).square().mean((1, 2, 3, 4)).detach()
    )


def test_a_teacher_learns_first_chunks_as_clips_of_their_own():
    """Catches first chunks that see the rest of their clip, and shares that are not kept."""
    stage = TeacherStage({"student": tiny_network()}, 3.0, 0.0, chunk_frames=CHUNK, first_chunk=0.5)
    batch = tiny_batch()
    others = replace(batch, latents=batch.latents.clone())
    others.latents[:, CHUNK:] += 1
    alone = 0
    for update in range(0, 16 * 40, 16):
        one = draw(2, update, update)
        losses = [stage.loss("student", each, one, 0).loss for each in (batch, others)]
        alone += int(torch.equal(*losses))
    assert 10 <= alone <= 30  # 40 coins at .5: five standard errors are 16


def test_text_dropout_empties_whole_captions():
    """Catches dropout of single words.

    Guidance needs an answer to a text that is all zero. 1000 samples at .25: five standard errors
    are .069.
    """
    batch = tiny_batch(2)
    many = replace(batch, text=batch.text[:1].expand(1000, -1, -1))
    text = drop_text(many, draw(1000), 0.25).text
    empty = (text == 0).all(dim=(1, 2))
    assert torch.equal(text[~empty], many.text[~empty])
    assert empty.double().mean() == pytest.approx(0.25, abs=0.069)
    assert torch.equal(drop_text(many, draw(1000), 0.0).text, many.text)
    assert not drop_text(many, draw(1000), 1.0).text.any()
