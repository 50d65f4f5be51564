"""What data, student and teacher are asked to show, and that it is the same for all of them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_network
from torch import Tensor

from selfforcing_dfd.config import Config, DataConfig, RolloutConfig, RunConfig, TinyDataConfig
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.evaluation.generate import Decode, EvaluationSet, student_clips, teacher_clips
from selfforcing_dfd.evaluation.tiny_world import evaluation_factors
from selfforcing_dfd.evaluation.worlds import TINY
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import sample
from selfforcing_dfd.rollout import plan_chunks, rollout
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
    parts = student_clips(
        network(), evaluation, decode, ladder=LADDER, chunks=CHUNKS, window=window
    )
    return torch.cat(list(parts))


def test_larger_set_begins_with_the_smaller_one():
    """Catches draws that depend on the number of clips: reports of 64 and 256 would share none."""
    small = asked(5)
    large = asked(9)
    assert large.captions[:5] == small.captions
    assert torch.equal(large.text[:5], small.text)
    assert torch.equal(large.noise(range(9))[:, :5], small.noise(range(5)))


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
    packed = EvaluationSet(plain.captions, plain.text, plain.latent_shape, negative)
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
    alone = render(evaluation_factors(33)[slice(32, 33)], last.shape[1])
    assert torch.equal(last, decode(codec.encode(alone)))


def test_decoded_videos_stay_on_the_screen(decode: Decode):
    """Catches values outside [0, 1], which would raise saturation and contrast without limit."""
    shown = decode(10 * asked(1).noise(range(1))[0])
    assert shown.min() == 0
    assert shown.max() == 1
