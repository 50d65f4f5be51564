"""A prompt change encodes the text once and prepares the network for it once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny_models import tiny_network
from tiny_wan import HEIGHT, RECIPE, WIDTH, tiny_parts, tiny_student
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline, export_scheduler
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

LADDER = (1.0, 0.625)
SETTINGS = StreamSettings(sink_frames=2, window_frames=4)


@dataclass
class CountingText:
    """The tiny text encoder, with what it was asked for."""

    text: TinyText
    asked: list[str] = field(default_factory=list)

    def encode(self, captions: list[str]) -> Tensor:
        self.asked += captions
        if "refused" in captions:
            raise ValueError("'refused' is not in the vocabulary")
        return self.text.encode(captions)


@pytest.fixture
def model() -> StreamModel:
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0)
    student = tiny_network(in_channels=16, out_channels=16).requires_grad_(False)
    return StreamModel(student, codec, CountingText(TinyText(12, 5)), LADDER, 2, (4, 6))


def test_a_prompt_is_encoded_once(model):
    """Catches a text encoder that runs once to check a prompt and once more to use it."""
    session = StreamSession(model, "a disc", SETTINGS)
    session.next_chunk()
    assert model.text.asked == ["a disc"]
    session.set_prompt("a cross")
    assert model.text.asked == ["a disc", "a cross"]
    for _ in range(2):
        session.next_chunk()
    assert (session.prompt, model.text.asked) == ("a cross", ["a disc", "a cross"])


def test_a_prompt_is_prepared_once(model):
    """Catches text K/V or noise levels computed again in a chunk or in a call."""
    embedded = []
    embedder = model.student.condition_embedder
    for part in (embedder.text_embedder.linear_1, embedder.time_embedder.linear_1):
        part.register_forward_hook(lambda module, *_: embedded.append(module.in_features))
    session = StreamSession(model, "a disc", SETTINGS)
    text_dim = embedder.text_embedder.linear_1.in_features
    freq_dim = embedder.freq_dim
    once = [text_dim, freq_dim, freq_dim, freq_dim]  # two steps of the ladder and the commit pass
    assert sorted(embedded) == sorted(once)
    session.next_chunk()
    session.set_prompt("a cross")
    for _ in range(3):
        session.next_chunk()
    assert sorted(embedded) == sorted(2 * once)


def test_a_refused_prompt_leaves_the_stream_as_it_is(model):
    """Catches a stream that forgets its context, or an earlier change, at an error in the text."""
    plain, disturbed = (StreamSession(model, "a disc", SETTINGS) for _ in range(2))
    for session in (plain, disturbed):
        session.next_chunk()
        session.set_prompt("a cross")
    for disturb in (disturbed.set_prompt, disturbed.reset):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            disturb("refused")
    assert torch.equal(plain.next_chunk().frames, disturbed.next_chunk().frames)
    assert disturbed.prompt == "a cross"


def test_a_prompt_of_the_pipeline_is_encoded_once(monkeypatch):
    """Catches two passes of UMT5-XXL, whose text the pipeline does not cache, for one change."""
    parts = tiny_parts()
    passes = []
    parts[1].register_forward_hook(lambda *_: passes.append(1))
    pipe = CausalWanPipeline(tiny_student(recipe=RECIPE), *parts, export_scheduler(RECIPE))
    settings = replace(StreamSettings(), sink_frames=0, window_frames=6)
    stream = pipe.stream("a red disc", height=HEIGHT, width=WIDTH, seed=0, settings=settings)
    next(stream)
    assert len(passes) == 1
    stream.set_prompt("a blue cross")
    next(stream)
    next(stream)
    assert len(passes) == 2
