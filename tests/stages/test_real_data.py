"""Stages on real data: negative prompt, noise of every chunk, sigmas of the ladder, whole clips."""

from __future__ import annotations

from dataclasses import replace

import torch
from golden_weights import golden
from tiny_models import LADDER, TEXT_LENGTH, TINY, DataForcing, tiny_batch, tiny_network
from tiny_stages import CHUNKS, draw, matching_stage
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.context import ChunkContext, Conditioning
from selfforcing_dfd.flow import shift_sigma
from selfforcing_dfd.stages.base import drop_text
from selfforcing_dfd.stages.init import InitStage
from selfforcing_dfd.stages.score import score_sigma

UNIT = torch.linspace(0, 1, 101, dtype=torch.float64)
NEGATIVE = rng.normal((TEXT_LENGTH, TINY["text_dim"]), 0, "negative prompt").double()


def losses_with(negative: Tensor | None, guidance: float) -> Tensor:
    stage = matching_stage(DataForcing(), guidance=guidance, negative=negative)
    return stage.loss("student", tiny_batch(), draw(), 0).loss.detach()


def test_guidance_leaves_the_negative_prompt_where_there_is_one():
    """Catches zeros in place of the negative prompt.

    Wan never saw a text of zeros, so guidance away from it has no meaning. The teacher is called
    twice for each row: with its caption, and with the negative prompt.
    """
    assert not torch.equal(losses_with(NEGATIVE, 4.0), losses_with(None, 4.0))
    assert torch.equal(losses_with(torch.zeros_like(NEGATIVE), 4.0), losses_with(None, 4.0))
    seen: list[Tensor] = []
    stage = matching_stage(DataForcing(), negative=NEGATIVE)
    stage.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2].text))
    batch = tiny_batch()
    stage.loss("student", batch, draw(), 0)
    assert torch.equal(torch.cat(seen), torch.cat([batch.text, NEGATIVE.expand_as(batch.text)]))


def test_without_guidance_the_negative_prompt_is_not_asked():
    """Catches a student or fake score that gets the negative prompt of the guided teacher."""
    assert torch.equal(losses_with(NEGATIVE, 1.0), losses_with(None, 1.0))
    fakes = [
        matching_stage(negative=each).loss("fake", tiny_batch(), draw(), 0).loss
        for each in (NEGATIVE, None)
    ]
    assert torch.equal(*fakes)


def test_dropped_captions_become_the_negative_prompt_where_there_is_one():
    """Catches a teacher trained on zeros and guided by a prompt.

    Guidance would use a text that it has never seen.
    """
    batch = tiny_batch(8)
    text = drop_text(batch, draw(8), 0.5, NEGATIVE).text
    kept = drop_text(batch, draw(8), 0.5).text.flatten(1).any(1)
    assert 0 < kept.sum() < 8
    assert torch.equal(text[kept], batch.text[kept])
    assert torch.equal(text[~kept], NEGATIVE.expand_as(text[~kept]))


def test_whole_clips_are_answered_alike_without_their_keys_and_values():
    """Catches a teacher and fake score that keep the K/V of every layer.

    That is 12 GB in a guided pass at 1.3B.
    """
    network, batch = tiny_network(), tiny_batch()
    inputs = batch.latents, torch.tensor([0.3, 0.8]), Conditioning(batch.text)
    plain, without = network(*inputs, ChunkContext()), network(*inputs)
    assert torch.equal(plain.flow, without.flow)
    assert (len(plain.kv.layers), len(without.kv.layers)) == (TINY["num_layers"], 0)


def test_pairs_of_every_chunk_where_the_noise_was_found_after_the_past():
    """Catches causal pairs whose later noise is not used.

    Without it the few-step student learns a mean.
    """
    batch, losses = tiny_batch(with_noise=True), []
    assert batch.noise is not None
    later = batch.noise.clone()
    later[:, CHUNKS[0].frames :] += 1
    for num_stored_noise in (1, len(CHUNKS)):
        stage = InitStage(
            {"student": tiny_network()}, CHUNKS, 3.0, 0.0, num_stored_noise=num_stored_noise
        )
        losses.append(
            [
                stage.loss("student", replace(batch, noise=n), draw(), 0).loss
                for n in (batch.noise, later)
            ]
        )
    assert torch.equal(*losses[0])
    assert not torch.equal(*losses[1])


def test_levels_of_the_ladder_are_trained_and_no_others():
    """Catches sigmas between the ladder's, and one that is never drawn.

    Rounding down would miss the last. 400 draws.
    """
    stage = InitStage({"student": tiny_network()}, CHUNKS, 3.0, 0.0, sigmas=LADDER)
    sigma = stage.draw_sigma(draw(400).uniform("sigma"))
    assert set(sigma.tolist()) == set(LADDER)
    # 100 +- 4 * 8.7
    assert (
        torch.bincount((sigma[:, None] == sigma.new_tensor(LADDER)).long().argmax(1)) > 60
    ).all()
    assert stage.draw_sigma(torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)).tolist() == [
        LADDER[0],
        LADDER[-1],
    ]


def test_score_sigma_equals_the_references_warp_and_clamp():
    """Catches a clamp before the shift, and a shift of 8 where the score's is 5."""
    tables = golden("schedule")
    sigma = score_sigma(tables["dmd_t/k"].double() / 1000, 5.0, 0.02, 0.98)
    # 3 float32 ulps
    torch.testing.assert_close(1000 * sigma, tables["dmd_t/t"].double(), rtol=0, atol=2e-4)


def test_score_sigma_is_clamped_to_exactly_its_limits():
    """Catches sigma 0 and 1, where x0 = x_t - sigma flow is empty and the normaliser explodes."""
    sigma = score_sigma(UNIT, 5.0, 0.02, 0.98)
    assert sigma.min() == 0.02
    assert sigma.max() == 0.98
    inside = (shift_sigma(UNIT, 5.0) > 0.02) & (shift_sigma(UNIT, 5.0) < 0.98)
    assert torch.equal(sigma[inside], shift_sigma(UNIT, 5.0)[inside])
