"""Regression at the ladder's steps: what the answers are, whose past they see, what is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import CHUNK, FRAMES, LADDER, latents, tiny_batch, tiny_network
from tiny_stages import CHUNKS, draw, gradients, touched
from torch import Tensor

from selfforcing_dfd.config import ConfigError
from selfforcing_dfd.context import ChunkContext, Conditioning, KVCache, PackedContext
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import x0_from_flow
from selfforcing_dfd.ode import integrate, sampling_ladder, with_context
from selfforcing_dfd.rollout import commit_chunk, denoise_chunk
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.stages.init import InitStage
from selfforcing_dfd.stages.regression import RegressionStage


def regression(**changes: Any) -> RegressionStage:
    """Two different networks, neither frozen, so that misplaced gradient shows."""
    settings: dict[str, Any] = {
        "trained": {"student": tiny_network(0)},
        "causal": tiny_network(1),
        "chunks": CHUNKS,
        "ladder": LADDER,
        "shift": 5.0,
        "num_steps": 2,
    }
    return RegressionStage(**(settings | changes))


def endpoint(**changes: Any) -> RegressionStage:
    return regression(target="endpoint", keeps_noise=True, **changes)


def loss(stage: RegressionStage, batch: Batch | None = None, seed: int = 0) -> Tensor:
    return stage.loss("student", batch or tiny_batch(), draw(seed=seed), 0).loss


def test_the_answer_is_the_causal_teachers_ode_after_the_real_past():
    """Catches targets from another past, noise level or network than the student's input says.

    Chunk by chunk with the one-sigma integrator that samples clips; both in float64.
    """
    stage, batch = regression(), tiny_batch()
    assert stage.causal is not None
    text = Conditioning(batch.text)
    past, x_t, sigma, contexts = stage.real_inputs(batch, draw(), stage.num_steps)
    own = PackedContext(contexts, stage.frames)
    answer = stage.answer(x_t, sigma, past, text, own, stage.num_steps)
    for row in range(len(batch.latents)):
        cache = KVCache()
        one = Conditioning(batch.text[row : row + 1])
        for chunk in CHUNKS:
            start = chunk.of(x_t)[row : row + 1]
            level = float(sigma[row, chunk.start])
            u = level / (5.0 - 4.0 * level)
            ladder = tuple(5.0 * v / (1 + 4.0 * v) for v in (u, u / 2, 0.0))
            own_teacher = with_context(stage.causal, cache.read(chunk.frames))
            expected = integrate(own_teacher, start, ladder, one)
            torch.testing.assert_close(chunk.of(answer)[row : row + 1], expected)
            commit_chunk(stage.causal, chunk.of(batch.latents)[row : row + 1], one, cache)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_one_step():
    """Catches an input or context of the teacher that is not the student's.

    One step down to 0 is the teacher's clean prediction, so an equal student's loss is 0.
    """
    for own in (0.0, 1.0):
        same = regression(causal=tiny_network(0), num_steps=1, own=own)
        assert float(loss(same)) < 1e-20
        assert float(loss(regression(num_steps=1, own=own))) > 1e-3


def test_consistency_of_the_last_step_is_the_teachers_answer():
    """Catches a consistency target without its boundary: at sigma 0 the answer is the point."""
    torch.testing.assert_close(
        loss(regression(num_steps=1, target="consistency")), loss(regression(num_steps=1))
    )


def test_consistency_asks_the_student_one_step_further():
    """Catches a target that is only the teacher's: the student's own answer must enter it.

    The teacher's part stays, the student's changes: with one step of two left over, the target
    of two students differs.
    """
    batch, targets = tiny_batch(), []
    for seed in (0, 2):
        stage = regression(target="consistency", trained={"student": tiny_network(seed)})
        past, x_t, sigma, contexts = stage.real_inputs(batch, draw(), 2)
        own = PackedContext(contexts, stage.frames)
        targets.append(stage.answer(x_t, sigma, past, Conditioning(batch.text), own, 2))
    assert not torch.allclose(*targets)


def test_the_real_past_changes_the_loss_and_the_future_does_not():
    """Catches teacher forcing without the past, and chunks that see what comes after them."""
    batch = tiny_batch()
    stage = regression()
    texts = Conditioning(batch.text)
    answers = []
    for changed in (slice(0, 0), slice(0, CHUNK), slice(FRAMES - CHUNK, FRAMES)):
        clips = batch.latents.clone()
        clips[:, changed] += 1
        _, x_t, sigma, _ = stage.real_inputs(batch, draw(), 2)
        own = PackedContext((), ())
        answers.append(stage.answer(x_t, sigma, clips, texts, own, 2))
    plain, other_past, other_future = answers
    assert torch.equal(plain, other_future)
    assert torch.equal(plain[:, :CHUNK], other_past[:, :CHUNK])
    assert not torch.allclose(plain[:, CHUNK:], other_past[:, CHUNK:])


def test_own_rollouts_use_nothing_of_the_clip():
    """Catches real inputs or pasts in updates that are about the student's own."""
    stage, batch = regression(own=1.0), tiny_batch()
    assert torch.equal(loss(stage, batch), loss(stage, replace(batch, latents=latents("other"))))
    assert not torch.equal(loss(regression()), loss(regression(own=1.0)))


def test_every_step_learns_where_the_ode_leads_from_the_kept_noise():
    """Catches answers of another noise or past, steps left out, and fresh noise between steps."""
    stage, batch = endpoint(), tiny_batch()
    student, causal = stage.trained["student"], stage.causal
    assert causal is not None
    real, text = batch.latents, Conditioning(batch.text)
    noise = draw().normal("noise", real.shape[1:], real)
    errors = []
    for chunk in CHUNKS:
        cache, seen = KVCache(), KVCache()
        for past in CHUNKS[: CHUNKS.index(chunk)]:
            commit_chunk(student, past.of(real), text, cache)
            commit_chunk(causal, past.of(real), text, seen)
        ladder = sampling_ladder(stage.num_steps, 5.0)
        own_teacher = with_context(causal, seen.read(chunk.frames))
        answer = integrate(own_teacher, chunk.of(noise), ladder, text)
        for step in range(len(LADDER)):
            context = cache.read(chunk.frames)
            x0, _ = denoise_chunk(student, chunk.of(noise)[None], text, context, LADDER, step)
            errors.append((x0 - answer).square().mean())
    torch.testing.assert_close(loss(stage, batch), torch.stack(errors).mean())


def test_steps_of_the_kept_noise_do_not_train_each_other():
    """Catches gradient through a step into those before it, a graph four times as deep."""
    batch = tiny_batch(frames=CHUNK)
    stage = endpoint(chunks=CHUNKS[:1], weights=(0.0, 0.0, 0.0, 1.0))
    student, causal = stage.trained["student"], stage.causal
    assert causal is not None
    loss(stage, batch).backward()
    ours = gradients(student)
    student.zero_grad()
    text = Conditioning(batch.text)
    noise = draw().normal("noise", batch.latents.shape[1:], batch.latents)
    _, x_exit = denoise_chunk(student, noise[None], text, ChunkContext(), LADDER)
    x0 = x0_from_flow(x_exit, student(x_exit, LADDER[-1], text, ChunkContext()).flow, LADDER[-1])
    answer = integrate(causal, noise, sampling_ladder(stage.num_steps, 5.0), text)
    ((x0 - answer).square().mean() / len(LADDER)).backward()
    torch.testing.assert_close(ours, gradients(student))


def test_the_endpoint_needs_kept_noise():
    """Catches one answer for steps between which the noise, and so the clip, changes."""
    config = ["run.stage=regression", "regression.target=endpoint", "weights.causal=x"]
    with pytest.raises(ConfigError, match=r"use rollout\.noise=kept"):
        RegressionStage.check(load_config("dfd_ar", config))
    RegressionStage.check(load_config("dfd_ar", [*config, "rollout.noise=kept"]))


def test_only_the_student_is_trained():
    """Catches gradient in the causal teacher."""
    stage = regression()
    assert stage.causal is not None
    loss(stage).backward()
    assert touched(stage.trained["student"])
    assert not touched(stage.causal)


def test_the_clip_as_target_is_teacher_forcing_weighed_by_sigma():
    """Catches another regression than that of stage `init`, which is in flows.

    A flow's error is that of the clean prediction over sigma: with weights 1 / sigma^2 and the same
    sigma in all chunks both losses are one.
    """
    batch = tiny_batch()
    one = (LADDER[1],)
    clip = regression(causal=None, target="clip", ladder=one, weights=(1 / LADDER[1] ** 2,))
    init = InitStage({"student": clip.trained["student"]}, CHUNKS, 5.0, 0.0, sigmas=one)
    torch.testing.assert_close(loss(clip, batch), init.loss("student", batch, draw(), 0).loss)
    loss(clip, batch).backward()
    ours = gradients(clip.trained["student"])
    assert ours.norm() > 0


@pytest.mark.parametrize("step", range(len(LADDER)))
def test_a_step_of_weight_0_teaches_nothing(step):
    """Catches weights given to other steps of the ladder than they were meant for."""
    only = [1.0 if n == step else 0.0 for n in range(len(LADDER))]
    stage = regression(weights=tuple(only))
    sigma = torch.tensor(LADDER)[None]
    assert stage.weight_of(sigma).tolist() == [only]
