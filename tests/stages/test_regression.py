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
from selfforcing_dfd.context import (
    ChunkContext,
    ChunkKV,
    Conditioning,
    KVCache,
    NetworkOutput,
    PackedContext,
)
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.ode import descend, integrate, with_context
from selfforcing_dfd.rollout import commit_chunk, denoise_chunk, rollout
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


def test_students_of_single_steps_follow_the_teachers_ode():
    """Catches answers that do not lead to the ladder's next step when noise is kept.

    A student that gives the answers makes what the ODE makes, step by step. A clean prediction is
    there and back by a division by sigma, in float32: 1e-6 of values up to 4.
    """
    stage, text = regression(target="next_step", keeps_noise=True), Conditioning(tiny_batch().text)
    assert stage.causal is not None
    past, own = tiny_batch().latents, PackedContext((), ())

    def perfect(x_t: Tensor, sigma: float, *_: object) -> NetworkOutput:
        level = torch.full(x_t.shape[:2], sigma).to(x_t)
        x0 = stage.answer(x_t, level, past, text, own, stage.num_steps)
        return NetworkOutput((x_t - x0) / sigma, ChunkKV(x_t.shape[1], ()))

    noise = draw().normal("noise", past.shape[1:], past)
    made = denoise_chunk(perfect, noise[None], text, ChunkContext(), LADDER)[0]
    seen = PackedContext(stage.contexts_of(stage.causal, past, text), stage.frames)
    start, end, expected = torch.ones(past.shape[:2]).to(past), None, noise
    for level in (*LADDER[1:], 0.0):
        end = torch.full_like(start, level)
        expected = descend(stage.causal, expected, start, text, seen, stage.num_steps, 5.0, end)
        start = end
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_single_steps_and_whole_trajectories_end_in_the_same_clip_at_the_last_step():
    """Catches a last step of the ladder that stops above 0, and other steps that do not."""
    text = Conditioning(tiny_batch().text)
    answers = {}
    for target in ("trajectory", "next_step"):
        stage = regression(target=target, keeps_noise=True)
        past, x_t, _, contexts = stage.real_inputs(tiny_batch(), draw(), 2)
        own = PackedContext(contexts, stage.frames)
        for level in (LADDER[-1], LADDER[0]):
            sigma = torch.full(x_t.shape[:2], level).to(x_t)
            answers[target, level] = stage.answer(x_t, sigma, past, text, own, 2)
    last, first = LADDER[-1], LADDER[0]
    torch.testing.assert_close(answers["trajectory", last], answers["next_step", last])
    assert not torch.allclose(answers["trajectory", first], answers["next_step", first])


def test_single_steps_need_noise_that_is_kept():
    with pytest.raises(ConfigError, match=r"next_step and rollout\.noise fresh.*noise=kept"):
        load_config("dfd_ar", ["dfd.preset=stable", "rollout.noise=fresh"])


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


def test_own_rollouts_keep_their_noise_where_the_student_does():
    """Catches inputs that a student which keeps its noise never sees."""
    batch = tiny_batch()
    kept, fresh = regression(own=1.0, keeps_noise=True), regression(own=1.0)
    noise = draw().normal("rollout", (1, *batch.latents.shape[1:]), batch.latents).transpose(0, 1)
    _, x_t, sigma, _ = kept.own_inputs(batch, draw())
    levels = torch.tensor(LADDER)
    steps = tuple(int((levels - sigma[0, chunk.start]).abs().argmin()) for chunk in CHUNKS)
    assert max(steps) > 0  # else no step before the one that is trained
    text = Conditioning(batch.text)
    student = kept.trained["student"]
    expected = rollout(student, noise, text, KVCache(), LADDER, CHUNKS, steps).x_exit
    torch.testing.assert_close(x_t, expected)
    assert not torch.allclose(fresh.own_inputs(batch, draw())[1], x_t)
