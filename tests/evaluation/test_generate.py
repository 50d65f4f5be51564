"""What data, student and teacher are asked to show, and that it is the same for all of them."""

from __future__ import annotations

import torch
from tiny_models import tiny_network
from torch import Tensor

from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.evaluation.generate import (
    EvaluationSet,
    data_clips,
    decoded,
    evaluation_factors,
    student_clips,
    teacher_clips,
)
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import sample
from selfforcing_dfd.rollout import plan_chunks, rollout
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.metrics import summarise
from selfforcing_dfd.tiny.readout import read
from selfforcing_dfd.tiny.world import render

FRAMES, TEXT_DIM = 6, 32
CHUNKS = plan_chunks(FRAMES, 3)
LADDER = (1.0, 5 / 6)


def network(seed: int = 0) -> WanTransformer:
    sizes = {"in_channels": 16, "out_channels": 16, "text_dim": TEXT_DIM}
    return tiny_network(seed, torch.float32, **sizes).requires_grad_(False)


def asked(num_clips: int) -> EvaluationSet:
    return EvaluationSet.draw(num_clips, "long", FRAMES, TEXT_DIM)


def student_videos(
    evaluation: EvaluationSet, codec: TinyCodec, window: int | None = None
) -> Tensor:
    parts = student_clips(network(), evaluation, codec, ladder=LADDER, chunks=CHUNKS, window=window)
    return torch.cat(list(parts))


def test_larger_set_begins_with_the_smaller_one():
    """Catches draws that depend on how many clips are asked for: reports of 64 and of 256 clips
    would share none.
    """
    small, large = asked(5), asked(9)
    assert large.captions[:5] == small.captions
    assert torch.equal(large.text[:5], small.text)
    assert torch.equal(large.noise(range(9))[:, :5], small.noise(range(5)))


def test_student_and_teacher_start_from_the_same_noise():
    """Catches noise that depends on the ladder's length: columns of the contact sheets would not
    belong together.
    """
    evaluation = asked(3)
    assert torch.equal(evaluation.noise(range(3), 4)[0], evaluation.noise(range(3), 1)[0])
    assert not torch.equal(evaluation.noise(range(3), 2)[0], evaluation.noise(range(3), 2)[1])


def test_data_clips_show_their_captions(codec: TinyCodec):
    """Catches clips rendered from other draws than the captions: the reference itself would
    disagree with its text.
    """
    evaluation = asked(8)
    scores = summarise(read(torch.cat(list(data_clips(evaluation, codec)))), evaluation.captions)
    assert scores["valid"].value == 1
    for factor in ("shape", "hue", "direction", "speed", "size"):
        assert scores[f"agreement_{factor}"].value == 1


def test_student_clips_are_rollouts_to_the_last_step(codec: TinyCodec):
    """Catches a report on an early exit of the ladder, which training draws at random but streaming
    never uses.
    """
    evaluation, ends = asked(2), {}
    for step in range(len(LADDER)):
        noise, conditioning = evaluation.noise(range(2), len(LADDER)), Conditioning(evaluation.text)
        record = rollout(
            network(), noise, conditioning, KVCache(), LADDER, CHUNKS, (step,) * len(CHUNKS)
        )
        ends[step] = decoded(record.x0, codec)
    shown = student_videos(evaluation, codec)
    assert torch.equal(shown, ends[1])
    assert not torch.equal(shown, ends[0])


def test_student_sees_the_configured_window(codec: TinyCodec):
    """Catches a report that lets the student attend to more of its past than it was trained for."""
    evaluation = asked(1)
    free, narrow = student_videos(evaluation, codec), student_videos(evaluation, codec, window=3)
    first = 1 + 4 * 2  # video frames of the first chunk, which has no past either way
    assert torch.equal(free[:, :first], narrow[:, :first])
    assert not torch.equal(free[:, first:], narrow[:, first:])


def test_teacher_clips_follow_the_guided_ode(codec: TinyCodec):
    """Catches settings of the sampler that get lost: the teacher row would not be the teacher that
    is distilled.
    """
    evaluation, teacher = asked(2), network(1)
    (shown,) = teacher_clips(teacher, evaluation, codec, num_steps=2, shift=3.0, guidance=2.0)
    noise = evaluation.noise(range(2))[0]
    for steps, shift, guidance, same in (
        (2, 3.0, 2.0, True),
        (2, 3.0, 1.0, False),
        (2, 1.0, 2.0, False),
    ):
        latents = sample(teacher, noise, Conditioning(evaluation.text), steps, shift, guidance)
        assert torch.equal(shown, decoded(latents, codec)) == same


def test_clips_come_in_batches_in_the_order_of_the_captions(codec: TinyCodec):
    """Catches a last batch that is dropped or repeated where the number of clips is no multiple of
    the batch.
    """
    first, last = data_clips(asked(33), codec)
    assert len(first) == 32
    alone = render(evaluation_factors(33)[slice(32, 33)], last.shape[1])
    assert torch.equal(last, decoded(codec.encode(alone), codec))


def test_decoded_videos_stay_on_the_screen(codec: TinyCodec):
    """Catches values outside [0, 1], which would make saturation and contrast as large as one
    likes.
    """
    shown = decoded(10 * asked(1).noise(range(1))[0], codec)
    assert shown.min() == 0
    assert shown.max() == 1
