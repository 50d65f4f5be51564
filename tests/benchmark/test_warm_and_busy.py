"""What a benchmark calls warm, and how certain its pace is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny_models import LADDER, tiny_network

from selfforcing_dfd import rng
from selfforcing_dfd.benchmark.measure import Bench, Plan, measure
from selfforcing_dfd.benchmark.statistics import Recording, certainty
from selfforcing_dfd.processes import processor
from selfforcing_dfd.processes.processor import ProcessorTime, processor_time
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText


@pytest.fixture(scope="module")
def model() -> StreamModel:
    """Two layers on 4 x 6 latents."""
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0)
    network = tiny_network(dtype=torch.float32, in_channels=16, out_channels=16).requires_grad_(
        False
    )
    return StreamModel(network, codec, TinyText(12), LADDER, 3, (4, 6))


@dataclass
class CountedText:
    """A text encoder that notes what it is asked for."""

    text: TinyText
    asked: list[str] = field(default_factory=list)

    def encode(self, captions: list[str]) -> torch.Tensor:
        self.asked += captions
        return self.text.encode(captions)


def test_cached_prompts_are_cached_and_warm_ones_are_not(model):
    """Catches a cached first frame that runs the text encoder, and a warm one that does not."""
    text = CountedText(TinyText(12))
    plan = Plan(num_restarts=3)
    bench = Bench(replace(model, text=text), StreamSettings(), ("a", "b"), plan)
    session, _ = bench.start()
    text.asked.clear()
    found = bench.restarts(session)
    assert text.asked == ["a", "b", "a", "a", "b"]  # three warm starts, and both told in advance
    assert [len(found[kind]) for kind in ("warm", "cached")] == [3, 3]
    session.set_prompt("a")
    assert text.asked[-1] == "a"
    assert len(text.asked) == 6  # later prompts are new ones again


class Stop(Exception):
    """Raised once a test has seen enough."""


def test_warm_starts_come_after_every_shape(model, monkeypatch):
    """Catches cold shapes in warm figures where fewer warm-up chunks are asked for than it takes.

    K = 9 is full after three chunks; the fourth is the first that forgets one.
    """
    seen = []

    def restarts(bench: Bench, session: StreamSession) -> None:
        seen.append(session.chunk_index)
        raise Stop

    monkeypatch.setattr(Bench, "restarts", restarts)
    settings = StreamSettings(sink_frames=3, window_frames=6)
    for asked, made in ((0, 1 + 4), (7, 1 + 7)):
        with pytest.raises(Stop):
            measure(model, settings, ("a", "b"), Plan(num_warmup=asked))
        assert seen[-1] == made


def test_parts_are_of_the_steady_state_in_order():
    """Catches parts that begin with the ramp, and the processor's time of more than was counted."""
    ready = [0.0, 9.0] + [9.0 + n + 1 for n in range(20)]
    recording = Recording(steady=2)
    for moment in ready:
        recording.add(moment, 100.0, 80.0, 12, 10**6)
    recording.processor = ProcessorTime(20.0, 12.0, 5.0)
    found = certainty(recording)
    assert found["interval_parts_ms"] == [1000.0] * 10
    assert found["processor_ms_per_frame"] == 12_000 / 240
    assert found["waited_share"] == 0.25
    span = ProcessorTime(3.0, 2.0, None) - ProcessorTime(1.0, 0.5, None)
    assert (span.wall_s, span.busy_s, span.waited_share) == (2.0, 1.5, None)


def test_waiting_is_what_linux_says(tmp_path, monkeypatch):
    """Catches the time that ran in place of the time that waited, and a crash elsewhere."""
    scheduler = tmp_path / "schedstat"
    monkeypatch.setattr(processor, "SCHEDULER", scheduler)
    assert processor_time().waited_s is None
    scheduler.write_text("9000000000 3000000000 7\n")
    before = processor_time()
    assert before.waited_s == 3.0
    scheduler.write_text("9500000000 3250000000 8\n")
    assert (processor_time() - before).waited_s == 0.25
