"""A student that is trained with a given first latent frame, streamed from a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_network
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.live.web.shared import Student
from selfforcing_dfd.models.identity import Identity, Recipe, recipe_of
from selfforcing_dfd.rollout import Chunk, rollout
from selfforcing_dfd.streaming.load import load_student, student_recipe
from selfforcing_dfd.streaming.output import to_uint8
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.weights.tensors import save_weights
from selfforcing_dfd.weights.write import file_metadata

LADDER = (1.0, 0.9375, 0.625)
LATENT_SIZE = (4, 6)
SHAPE = (1, 2, 16, *LATENT_SIZE)
NUM_CHUNKS = 3
WHOLE = StreamSettings(sink_frames=0, window_frames=8, positions="absolute")
ROUNDING = 1e-5  # the picture's latents are float32, as the codec gives them


@pytest.fixture(scope="module")
def model() -> StreamModel:
    """A small student in float64 with random weights; chunks of two latent frames, one given."""
    sizes = (192, 768)
    first, rest = (torch.linalg.qr(rng.normal((n, 16), 0, "basis", n)).Q for n in sizes)
    codec = TinyCodec(first.contiguous(), rest.contiguous(), 1.0)
    student = tiny_network(in_channels=16, out_channels=16).requires_grad_(False)
    return StreamModel(student, codec, TinyText(12, 5), LADDER, 2, LATENT_SIZE, given=1)


class Watched(StreamSession):
    """A session that keeps its clean latents."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.latents: list[Tensor] = []
        super().__init__(*arguments, **options)

    def _decode(self, x0: Tensor) -> Any:
        self.latents.append(x0)
        return super()._decode(x0)


def picture(name: str = "picture", num_frames: int = 1) -> Tensor:
    return rng.uniform((num_frames, 32, 48, 3), 0, name).float()


def latents_of(model: StreamModel, video: Tensor) -> Tensor:
    return model.codec.start_encoding().encode(video[None])


def made(session: Watched) -> Tensor:
    for _ in range(NUM_CHUNKS):
        session.next_chunk()
    return torch.cat(session.latents, dim=1)


@pytest.mark.parametrize("keeps_noise", [False, True], ids=["fresh", "kept"])
def test_a_stream_from_a_picture_is_the_rollout_of_training(model, keeps_noise):
    """Catches a picture that is committed as a chunk of its own, as training never does."""
    model = replace(model, keeps_noise=keeps_noise)
    given = latents_of(model, picture())
    steps = range(1 if keeps_noise else len(LADDER))
    draws = [
        torch.stack([rng.normal(SHAPE, 0, "stream noise", chunk, step) for step in steps])
        for chunk in range(NUM_CHUNKS)
    ]
    wanted = rollout(
        model.student,
        torch.cat(draws, dim=2).double(),
        Conditioning(model.text.encode(["a disc"]).double()),
        KVCache(),
        LADDER,
        tuple(Chunk(2 * n, 2) for n in range(NUM_CHUNKS)),
        given=given.double(),
    ).x0
    streamed = made(Watched(model, "a disc", WHOLE, picture()))
    assert torch.equal(streamed[:, :1].float(), given)
    assert (streamed - wanted).abs().max() < ROUNDING


def test_the_first_frame_that_is_shown_is_the_picture(model):
    """Catches a picture that is left out, shown twice, or decoded without its chunk."""
    session = StreamSession(model, "a disc", WHOLE, picture())
    assert len(session.context_frames) == 0
    chunk = session.next_chunk()
    assert len(chunk.frames) == 5  # two latent frames, of which the first is one video frame
    shown = model.codec.start_decoding().decode(latents_of(model, picture()))[0]
    assert torch.equal(chunk.frames[:1], to_uint8(shown))
    assert len(session.next_chunk().frames) == 8


def test_another_picture_makes_another_video(model):
    """Catches chunks that the picture does not reach."""
    one, other = (made(Watched(model, "a disc", WHOLE, picture(name))) for name in ("a", "b"))
    moved = (one - other).abs().amax((0, 2, 3, 4))
    assert moved.min() > 1e-4


def test_reset_keeps_the_picture_and_takes_another_one(model):
    """Catches a reset into a stream without a picture, and a snapshot without it."""
    session = Watched(model, "a disc", WHOLE, picture("a"))
    moment = session.snapshot()
    first = made(session)
    for begin in (session.reset, lambda: session.restore(moment)):
        session.latents.clear()
        begin()
        assert torch.equal(made(session), first)
    session.latents.clear()
    session.reset(context=picture("b"))
    assert not torch.equal(made(session)[:, :1], first[:, :1])
    session.restore(moment)
    session.latents.clear()
    assert torch.equal(made(session), first)


def test_a_longer_clip_is_continued_in_whole_chunks(model):
    """Catches a clip whose frames are put into the first chunk, where only one is given."""
    clip = picture("clip", 13)
    streamed = Watched(model, "a disc", WHOLE, clip)
    without = Watched(replace(model, given=0), "a disc", WHOLE, clip)
    assert len(streamed.context_frames) == 13
    assert torch.equal(made(streamed), made(without))
    streamed.latents.clear()
    streamed.reset()
    assert torch.equal(made(streamed)[:, :1].float(), latents_of(model, clip)[:, :1])


def test_a_picture_that_is_missing_or_too_short_is_refused(model):
    """Catches a student that makes its first frame, which it has never learnt."""
    with pytest.raises(UserError, match=r"first 1 video frame\(s\) .* by --image"):
        StreamSession(model, "a disc", WHOLE)
    longer = replace(model, chunk_frames=4, given=3)
    settings = replace(WHOLE, window_frames=8)
    with pytest.raises(UserError, match=r"context is 5 video frames; .* with 9 that are given"):
        StreamSession(longer, "a disc", settings, picture("short", 5))
    with pytest.raises(UserError, match="single pictures; use `stream --video FILE`"):
        Student(longer, settings).facts()
    assert Student(model, WHOLE).facts()["needs_picture"]
    with pytest.raises(UserError, match="this student begins with a picture; choose one"):
        Student(model, WHOLE).begin("a disc", 0)
    grey = model.grey()
    assert grey is not None
    assert len(StreamSession(model, "a disc", WHOLE, grey).next_chunk().frames) == 5
    assert replace(model, given=0).grey() is None


@pytest.mark.parametrize("given", [0, 1])
def test_a_students_file_says_what_is_given(tmp_path: Path, given: int):
    """Catches a student that streams as it was not trained; files without it stay as they were."""
    recipe = Recipe((1000.0, 500.0), 5.0, 2, 6, given=given)
    student = tiny_network(dtype=torch.float32)
    metadata = file_metadata(student.config, Identity("causal_student", recipe))
    save_weights(tmp_path / "student.safetensors", student, metadata)
    assert ("given" in str(metadata)) == bool(given)
    loaded = load_student(tmp_path / "student.safetensors")
    assert student_recipe(loaded) == recipe
    stated = recipe_of(loaded.config)
    assert stated is not None
    assert stated.given == given


def test_a_recipe_that_makes_nothing_of_its_first_chunk_is_refused():
    """Catches a file whose first chunk is all given, or less than nothing."""
    for given in (-1, 2):
        with pytest.raises(UserError, match=r"given is .* use 0 to 1, or longer chunks"):
            Recipe((1000.0, 500.0), 5.0, 2, 6, given=given)
