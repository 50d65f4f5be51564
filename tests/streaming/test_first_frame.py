"""What is done before a stream's first frame, and what must not be left for its middle."""

from __future__ import annotations

import io
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tiny_models import tiny_network
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from selfforcing_dfd import rng
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.codecs.text_ahead import TextAhead
from selfforcing_dfd.codecs.text_cache import CachedText
from selfforcing_dfd.live import play, ready
from selfforcing_dfd.streaming.load import TinyPrompts
from selfforcing_dfd.streaming.noise import ChunkNoise
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.streaming.warm_up import warm_up
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

LADDER = (1.0, 0.625)
PROMPT = "a disc moves"
SIZE = (4, 6)


@pytest.fixture
def model() -> StreamModel:
    """Chunks of three latent frames, so that K is 3, 6, 9 and 12 while the window fills."""
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0)
    sizes = {"in_channels": 16, "out_channels": 16, "num_layers": 1}
    student = tiny_network(dtype=torch.float32, **sizes).requires_grad_(False)
    return StreamModel(student, codec, TinyText(12), LADDER, 3, SIZE)


class Shapes(TorchDispatchMode):
    """Every operator with the shapes that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parts = [part for each in args for part in (each if isinstance(each, list) else [each])]
        shapes = [(*part.shape, part.dtype) for part in parts if isinstance(part, Tensor)]
        self.met.add((func.overloadpacket.__name__, *shapes))
        return func(*args, **(kwargs or {}))


def live(session: StreamSession) -> None:
    """What may happen to a stream: it goes on, prompts change in every way, it starts again."""
    for mode in ("keep", "flush", "recache"):
        for chunks in (1, 4):
            session.set_prompt(PROMPT, mode)
            for _ in range(chunks):
                session.next_chunk()
    session.reset(seed=5)
    session.next_chunk()
    session.set_prompt(PROMPT, "recache")
    session.next_chunk()


@pytest.mark.parametrize(("num_frames", "sink"), [(0, 3), (5, 3), (0, 0)])
def test_a_stream_meets_no_shape_that_warming_up_has_not_met(model, num_frames, sink):
    """Catches a kernel that is planned or tuned in mid-stream.

    By every operator and all its shapes: of the ramp, of the full window, of prompts and resets.
    """
    video = rng.uniform((num_frames, 32, 48, 3), 0, "clip").float() if num_frames else None
    settings = StreamSettings(sink_frames=sink, window_frames=9)
    session = StreamSession(model, PROMPT, settings, video)
    with Shapes() as before:
        warm_up(session, video)
    with Shapes() as after:
        for _ in range(6):
            session.next_chunk()
        live(session)
    assert len(after.met) > 100
    assert after.met - before.met == set()


def test_a_clip_longer_than_what_is_given_is_not_all_that_is_met(model):
    """Catches a reset of a student with a given picture, which begins with the picture alone.

    Its stream began with a longer clip, so no chunk of it was the video's first one.
    """
    video = rng.uniform((9, 32, 48, 3), 0, "clip").float()
    session = StreamSession(replace(model, given=1), PROMPT, StreamSettings(), video)
    with Shapes() as before:
        warm_up(session, video)
    with Shapes() as after:
        live(session)
    assert after.met - before.met == set()


def test_every_piece_of_warming_up_is_done_where_it_is_asked_for(model):
    """Catches a pass on the wrong thread: what cuDNN plans there no other thread can use."""
    threads: set[int] = set()

    def noted(module: Any, inputs: Any) -> None:
        threads.add(threading.get_ident())

    session = StreamSession(model, PROMPT)
    model.student.register_forward_pre_hook(noted)
    with ThreadPoolExecutor(1) as worker:
        warm_up(session, run=lambda work: worker.submit(work).result())
        assert threads == {worker.submit(threading.get_ident).result()}


def test_warming_up_leaves_the_stream_as_new(model):
    """Catches a warm-up that shows: a past, another prompt or another noise."""
    video = rng.uniform((5, 32, 48, 3), 0, "clip").float()
    for context in (None, video):
        new, warmed = (StreamSession(model, PROMPT, StreamSettings(), context) for _ in range(2))
        warm_up(warmed, context)
        assert torch.equal(new.context_frames, warmed.context_frames)
        for _ in range(5):
            assert torch.equal(new.next_chunk().frames, warmed.next_chunk().frames)


def test_warming_up_leaves_nothing_to_compile(model):
    """Catches a compiled stream that compiles during its first seconds, while a viewer waits."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model.student.compile_blocks(backend=counter)
    session = StreamSession(model, PROMPT)
    warm_up(session)
    compiled = counter.frame_count
    assert compiled > 0
    live(session)
    assert counter.frame_count == compiled


def test_streams_on_a_gpu_and_compiled_ones_are_warmed_up(model, monkeypatch, capsys, tmp_path):
    """Catches a command that goes straight to the first frame where a shape is slow at first."""
    warmed: list[StreamSession] = []
    monkeypatch.setattr(ready, "warm_up", lambda session, *_: warmed.append(session))
    monkeypatch.setattr(ready, "is_warmed_up", play.is_warmed_up)
    stream = ["stream", "--chunks", "1", "--out", str(tmp_path / "s.y4m"), "--overwrite"]
    assert main(stream) == 0
    assert warmed == []  # on a CPU, uncompiled, it starts at once
    monkeypatch.setattr(StreamModel, "compile", lambda self: None)
    assert main([*stream, "--compile"]) == 0
    assert len(warmed) == 1
    assert "warming up every shape" in capsys.readouterr().err


@dataclass
class Encoder:
    """The tiny world's text encoder, with what it was asked for, and when it was loaded."""

    happened: list[str]
    text: TinyPrompts = field(default_factory=lambda: TinyPrompts(TinyText(32)))
    fingerprint = "counted"

    def encode(self, captions: list[str]) -> Tensor:
        self.happened += captions
        return self.text.encode(captions)


class Pipe(io.StringIO):
    """A stdin that a command reads: the read end of a pipe."""

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize(("told", "cached"), [(False, False), (False, True), (True, True)])
def test_the_text_encoder_works_before_the_stream_begins(told, cached, monkeypatch, tmp_path):
    """Catches 11 GB of weights that are read when the first new prompt comes, in mid-stream.

    And prompts of a schedule that are encoded when their time has come. Without anybody who could
    type a prompt the encoder is not loaded where all prompts are in the cache.
    """
    happened: list[str] = []

    def load() -> Encoder:
        happened.append("loaded")
        return Encoder(happened)

    schedule = tmp_path / "schedule.txt"
    schedule.write_text("0: a disc moves\n1: a cross moves\n2: a square moves\n")
    text = Encoder([]).text
    cache = CachedText(Encoder([]), tmp_path / "cache", "counted")
    if cached:
        for prompt in ("a disc moves", "a cross moves", "a square moves"):
            cache.encode([prompt])
    load_model = play.load_model

    def with_cache(options: Any) -> StreamModel:
        model = load_model(options)
        assert torch.equal(model.text.encode([PROMPT]), text.encode([PROMPT]))
        late = CachedText(load, tmp_path / "cache", "counted")
        return StreamModel(
            model.student, model.codec, late, model.ladder, model.chunk_frames, model.latent_size
        )

    def chunk(self: StreamSession) -> Any:
        happened.append("chunk")
        return next_chunk(self)

    next_chunk = StreamSession.next_chunk
    monkeypatch.setattr(play, "load_model", with_cache)
    monkeypatch.setattr(StreamSession, "next_chunk", chunk)
    ends = os.pipe() if told else (os.open(os.devnull, os.O_RDONLY), -1)
    stdin = Pipe()
    stdin.number = ends[0]
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(play, "listen", lambda player: None)
    out = str(tmp_path / "s.y4m")
    assert main(["stream", "--prompts", str(schedule), "--chunks", "4", "--out", out]) == 0
    for end in ends[: 1 + told]:
        os.close(end)
    before = happened[: happened.index("chunk")]
    assert happened[len(before) :] == ["chunk"] * 4
    assert before.count("loaded") == int(told or not cached)
    assert len(before) == int(told or not cached) + (0 if cached else 3)


def test_known_prompts_are_not_encoded_again():
    """Catches a prompt that is told in advance and waits for the encoder all the same."""
    happened: list[str] = []
    text = TextAhead(Encoder(happened))
    text.prefetch(["a disc moves", "a cross moves", "a disc moves"])
    assert happened == ["a disc moves", "a cross moves"]
    both = text.encode(["a cross moves", "a disc moves"])
    assert happened == ["a disc moves", "a cross moves"]
    assert torch.equal(both, Encoder([]).encode(["a cross moves", "a disc moves"]))
    text.encode(["a square moves"])
    assert happened[2:] == ["a square moves"]
    with pytest.raises(ValueError, match="names nothing of the tiny world"):
        text.prefetch(["a lion"])


def test_noise_is_what_it_always_was_and_drawn_when_it_is_needed():
    """Catches another noise, and a first step that waits for the draws of all later ones."""
    shape = (1, 3, 16, *SIZE)
    noise = ChunkNoise(7, 2, shape, 4, torch.device("cpu"))
    assert (len(noise), len(noise._drawn)) == (4, 0)
    wanted = [rng.normal(shape, 7, "stream noise", 2, step) for step in range(4)]
    assert torch.equal(noise[0], wanted[0])
    assert len(noise._drawn) == 1
    assert all(torch.equal(one, other) for one, other in zip(noise, wanted, strict=True))
    with pytest.raises(IndexError):
        noise[4]


def test_a_host_that_runs_ahead_makes_the_same_video(model):
    """Catches noise of another chunk or seed: drawn ahead, as beside a GPU, and after resets."""
    plain, ahead = (StreamSession(model, PROMPT, StreamSettings(seed=3)) for _ in range(2))
    ahead._host_runs_ahead = True

    def both(**changes: Any) -> None:
        for session in (plain, ahead):
            session.reset(**changes) if changes else None
        for _ in range(3):
            assert torch.equal(plain.next_chunk().frames, ahead.next_chunk().frames)

    both()
    assert ahead._ahead is not None and ahead._ahead.is_for(3, 3, len(LADDER))
    assert len(ahead._ahead._drawn) == len(LADDER)
    both(seed=4)
    both(prompt="a cross moves")
    moments = plain.snapshot(), ahead.snapshot()
    both(seed=5)
    for session, moment in zip((plain, ahead), moments, strict=True):
        session.restore(moment)
    both()
