"""What data, student and teacher are asked to show, and that it is the same for all of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import tiny_network
from torch import Tensor

from selfforcing_dfd.config import (
    Config,
    DataConfig,
    ReportConfig,
    RolloutConfig,
    RunConfig,
    TinyDataConfig,
)
from selfforcing_dfd.context import ChunkContext, Conditioning, KVCache
from selfforcing_dfd.evaluation.follow import follow_scores
from selfforcing_dfd.evaluation.generate import (
    Decode,
    EvaluationSet,
    FewSteps,
    ODEAtEachStep,
    ODESteps,
    causal_clips,
    make_clip,
    teacher_clips,
)
from selfforcing_dfd.evaluation.tiny_world import evaluation_factors, real_latents
from selfforcing_dfd.evaluation.worlds import TINY
from selfforcing_dfd.flow import add_noise
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import descend, sample
from selfforcing_dfd.rollout import RealRows, plan_chunks, rollout
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.metrics import summarise
from selfforcing_dfd.tiny.readout import read
from selfforcing_dfd.tiny.world import render

CONFIG = Config(
    run=RunConfig(stage="teacher"),
    rollout=RolloutConfig(frames=6),
    data=DataConfig(shards="none", tiny=TinyDataConfig(clips=8, level="long")),
)
CHUNKS = plan_chunks(6, 3)
LADDER = (1.0, 5 / 6)


@pytest.fixture(scope="module")
def decode() -> Decode:
    return TINY.decoder(CONFIG)


def network(seed: int = 0) -> WanTransformer:
    sizes = {"in_channels": 16, "out_channels": 16, "text_dim": 32}
    return tiny_network(seed, torch.float32, **sizes).requires_grad_(False)


def asked(num_clips: int) -> EvaluationSet:
    return TINY.draw(CONFIG, num_clips)


def real_clips(evaluation: EvaluationSet, decode: Decode) -> list[Tensor]:
    return list(TINY.real_clips(CONFIG, evaluation, decode))


def student_videos(evaluation: EvaluationSet, decode: Decode, window: int | None = None) -> Tensor:
    make_chunk = FewSteps(LADDER)
    parts = causal_clips(
        network(), evaluation, decode, make_chunk=make_chunk, chunks=CHUNKS, window=window
    )
    return torch.cat(list(parts))


def test_larger_set_begins_with_the_smaller_one():
    """Catches draws that depend on the number of clips: reports of 64 and 256 would share none."""
    small = asked(5)
    large = asked(9)
    assert large.captions[:5] == small.captions
    assert torch.equal(large.text[:5], small.text)
    assert torch.equal(large.noise(range(9))[:, :5], small.noise(range(5)))


def test_evaluation_seed_chooses_captions_and_noise():
    """Catches a seed that changes one of them alone, or none: settings would be chosen on the very
    clips that are reported.
    """
    other = dataclasses.replace(CONFIG, report=ReportConfig(seed=2000))
    one = asked(16)
    two = TINY.draw(other, 16)
    assert (one.seed, two.seed) == (1000, 2000)
    assert one.captions != two.captions
    assert not torch.equal(one.noise(range(1)), two.noise(range(1)))
    clips = real_latents(CONFIG, one, range(2)), real_latents(other, two, range(2))
    assert not torch.equal(*clips)


def test_student_and_teacher_start_from_the_same_noise():
    """Catches noise that depends on the ladder's length: columns of sheets would not correspond."""
    evaluation = asked(3)
    assert torch.equal(evaluation.noise(range(3), 4)[0], evaluation.noise(range(3), 1)[0])
    assert not torch.equal(evaluation.noise(range(3), 2)[0], evaluation.noise(range(3), 2)[1])


def test_data_clips_show_their_captions(decode: Decode):
    """Catches clips rendered from other draws than the captions: data would disagree with text."""
    evaluation = asked(8)
    scores = summarise(read(torch.cat(real_clips(evaluation, decode))), evaluation.captions)
    assert scores["valid"].value == 1
    for factor in ("shape", "hue", "direction", "speed", "size"):
        assert scores[f"agreement_{factor}"].value == 1


def test_student_clips_are_rollouts_to_the_last_step(decode: Decode):
    """Catches a report on an early exit, which training draws and streaming never uses."""
    evaluation = asked(2)
    ends = {}
    for step in range(len(LADDER)):
        noise = evaluation.noise(range(2), len(LADDER))
        conditioning = Conditioning(evaluation.text)
        exit_steps = (step,) * len(CHUNKS)
        record = rollout(network(), noise, conditioning, KVCache(), LADDER, CHUNKS, exit_steps)
        ends[step] = decode(record.x0)
    shown = student_videos(evaluation, decode)
    assert torch.equal(shown, ends[1])
    assert not torch.equal(shown, ends[0])


def test_student_sees_the_configured_window(decode: Decode):
    """Catches a report that lets the student attend to more of its past than it was trained for."""
    evaluation = asked(1)
    free = student_videos(evaluation, decode)
    narrow = student_videos(evaluation, decode, window=3)
    first = 1 + 4 * 2  # video frames of the first chunk, which has no past either way
    assert torch.equal(free[:, :first], narrow[:, :first])
    assert not torch.equal(free[:, first:], narrow[:, first:])


def test_teacher_clips_follow_the_guided_ode(decode: Decode):
    """Catches settings of the sampler that get lost: the row would show another teacher."""
    evaluation = asked(2)
    teacher = network(1)
    (shown,) = teacher_clips(teacher, evaluation, decode, num_steps=2, shift=3.0, guidance=2.0)
    noise = evaluation.noise(range(2))[0]
    text = Conditioning(evaluation.text)
    for steps, shift, guidance, same in (
        (2, 3.0, 2.0, True),
        (2, 3.0, 1.0, False),
        (2, 1.0, 2.0, False),
    ):
        latents = sample(teacher, noise, text, steps, shift, guidance)
        assert torch.equal(shown, decode(latents)) == same


def test_teacher_is_guided_away_from_the_packed_negative_prompt(decode: Decode):
    """Catches a Wan teacher guided away from zeros, which it never saw as text."""
    plain = asked(2)
    negative = asked(3).text[2]
    packed = dataclasses.replace(plain, negative=negative)
    settings = {"num_steps": 2, "shift": 3.0, "guidance": 2.0}
    (shown,) = teacher_clips(network(1), packed, decode, **settings)
    away = Conditioning(negative.expand_as(plain.text))
    noise = plain.noise(range(2))[0]
    latents = sample(network(1), noise, Conditioning(plain.text), 2, 3.0, 2.0, away)
    assert torch.equal(shown, decode(latents))


def test_clips_come_in_batches_in_the_order_of_the_captions(codec: TinyCodec, decode: Decode):
    """Catches a last batch that is dropped or repeated if batches do not divide the set."""
    first, last = real_clips(asked(33), decode)
    assert len(first) == 32
    alone = render(evaluation_factors(33, 1000)[slice(32, 33)], last.shape[1])
    assert torch.equal(last, decode(codec.encode(alone)))


def test_decoded_videos_stay_on_the_screen(decode: Decode):
    """Catches values outside [0, 1], which would raise saturation and contrast without limit."""
    shown = decode(10 * asked(1).noise(range(1))[0])
    assert shown.min() == 0
    assert shown.max() == 1


def test_given_chunks_are_the_past_of_later_ones():
    """Catches a follow test on the student's own past, or one whose first chunk is changed.

    The rollout with a real past makes the same second chunk.
    """
    evaluation = asked(2)
    real = real_latents(CONFIG, evaluation, range(2))
    noise = evaluation.noise(range(2), len(LADDER))
    text = Conditioning(evaluation.text)
    first = CHUNKS[0].of(real)
    made = make_clip(network(), FewSteps(LADDER), noise, text, KVCache(), CHUNKS, first)
    assert torch.equal(CHUNKS[0].of(made), first)
    past = RealRows(real, torch.tensor([True, True]))
    record = rollout(network(), noise, text, KVCache(), LADDER, CHUNKS, real_past=past)
    assert torch.equal(CHUNKS[1].of(made), CHUNKS[1].of(record.x0))
    free = make_clip(network(), FewSteps(LADDER), noise, text, KVCache(), CHUNKS)
    assert not torch.equal(CHUNKS[1].of(made), CHUNKS[1].of(free))


def test_a_causal_teacher_makes_chunks_by_its_ode():
    """Catches steps or shift that do not reach the ODE of a chunk, or a lost context.

    The first chunk has no past, so it is what the ODE makes of a clip of three latent frames.
    """
    evaluation = asked(2)
    noise = evaluation.noise(range(2))
    text = Conditioning(evaluation.text)
    teacher = network(1)
    made = make_clip(teacher, ODESteps(2, 3.0), noise, text, KVCache(), CHUNKS)
    first = CHUNKS[0].of(noise[0])
    assert torch.equal(CHUNKS[0].of(made), sample(teacher, first, text, 2, 3.0))
    alone = sample(teacher, CHUNKS[1].of(noise[0]), text, 2, 3.0)
    assert not torch.allclose(CHUNKS[1].of(made), alone)


def test_follow_scores_take_student_and_teacher(decode: Decode):
    """Catches a test that only one of the two can take."""
    evaluation = asked(3)
    real = real_latents(CONFIG, evaluation, range(3))
    for make_chunk in (FewSteps(LADDER), ODESteps(1, 3.0)):
        scores = follow_scores(
            network(), evaluation, real, decode, make_chunk=make_chunk, chunks=CHUNKS
        )
        assert scores["follow"].n == 3
        assert "follow_speed_1" in scores
        assert "follow_speed_2" not in scores  # two chunks: one follows


@pytest.mark.parametrize("keeps_noise", [False, True])
def test_the_ideal_student_answers_with_the_teachers_ode(keeps_noise: bool):
    """Catches another ODE, another noise between steps, or steps that are left out."""
    teacher = network()
    evaluation = asked(2)
    text = Conditioning(evaluation.text)
    make_chunk = ODEAtEachStep(FewSteps(LADDER, keeps_noise), 2, 3.0)
    noise = evaluation.noise(range(2), make_chunk.num_draws)[:, :, :3]
    made = make_chunk(teacher, noise, text, ChunkContext())
    x_t = noise[0]
    for step, sigma in enumerate(LADDER):
        level = torch.full(x_t.shape[:2], sigma, dtype=x_t.dtype)
        x0 = descend(teacher, x_t, level, text, ChunkContext(), 2, 3.0)
        if step + 1 < len(LADDER):
            kept = (x_t - (1 - sigma) * x0) / sigma
            x_t = add_noise(x0, kept if keeps_noise else noise[step + 1], LADDER[step + 1])
    torch.testing.assert_close(made, x0)


def test_clips_begin_with_what_is_given():
    """Catches a report that asks students of image-to-video for their first frame.

    Drawn sets hold the real clips' first frames. Student, teacher, causal teacher and the ideal
    student all keep them, and make the rest as training and the ODE do.
    """
    given = dataclasses.replace(CONFIG, rollout=RolloutConfig(frames=6, given=1))
    evaluation = TINY.draw(given, 3).first(2)
    real = real_latents(CONFIG, evaluation, range(2))
    assert evaluation.given is not None
    assert torch.equal(evaluation.given, real[:, :1])
    noise = evaluation.noise(range(2), len(LADDER))
    text = Conditioning(evaluation.text)
    begin = evaluation.given
    record = rollout(network(), noise, text, KVCache(), LADDER, CHUNKS, given=begin)
    ideal = ODEAtEachStep(FewSteps(LADDER), 2, 3.0)
    makers = (FewSteps(LADDER), ODESteps(2, 3.0), ideal)
    made = [
        make_clip(network(), each, noise, text, KVCache(), CHUNKS, None, begin) for each in makers
    ]
    whole = sample(network(), noise[0], text, 2, 3.0, 2.0, given=begin)
    for clip in (*made, whole):
        assert torch.equal(clip[:, :1], real[:, :1])
        assert clip.isfinite().all()
    assert torch.equal(made[0], record.x0)
    student = causal_clips(network(), evaluation, lambda x: x, make_chunk=makers[0], chunks=CHUNKS)
    assert torch.equal(torch.cat(list(student)), record.x0)
    (teacher,) = teacher_clips(
        network(), evaluation, lambda x: x, num_steps=2, shift=3.0, guidance=2.0
    )
    assert torch.equal(teacher, whole)


def test_the_ode_sees_given_frames_clean_at_every_step():
    """Catches a teacher whose picture is noised while it samples, as it never was in training."""
    seen: list[tuple[Tensor, Tensor]] = []
    teacher = network()
    teacher.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[:2]))
    evaluation = asked(2)
    begin = real_latents(CONFIG, evaluation, range(2))[:, :1]
    noise = evaluation.noise(range(2))[0]
    sample(teacher, noise, Conditioning(evaluation.text), 3, 3.0, given=begin)
    assert len(seen) == 5
    for x_t, sigma in seen:
        assert torch.equal(x_t[:, :1], begin)
        assert not sigma[:, 0].any()
        assert sigma[:, 1:].all()
