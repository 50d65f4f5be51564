"""Students of fewer passes: what the stream makes is the rollout, and the calls are as said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import tiny_network
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.benchmark.flops import chunk_flops
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.evaluation.generate import FewSteps, make_clip
from selfforcing_dfd.flow import add_noise
from selfforcing_dfd.rollout import Chunk, commit_chunk, denoise_chunk, rollout
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

# float64 through two blocks, sums in another order; a wrong past or level gives 1e-3 and more
ROUNDING = 1e-10
SIZE = (4, 6)
FOUR = (1.0, 0.9375, 0.8, 0.625)

VARIANTS: dict[str, dict[str, Any]] = {
    "four steps": {"ladder": FOUR},
    "two steps": {"ladder": (1.0, 0.8)},
    "one step": {"ladder": (1.0,)},
    "first chunk in four": {"ladder": (1.0, 0.8), "first_ladder": FOUR},
    "first chunk in one": {"ladder": (1.0, 0.8), "first_ladder": (1.0,)},
    "frame by frame": {"ladder": (1.0, 0.8), "chunk_frames": 1},
    "no commit": {"ladder": (1.0, 0.8), "commits": False},
    "no commit, one step": {"ladder": (1.0,), "commits": False},
    "no commit, kept noise": {"ladder": (1.0, 0.8), "commits": False, "keeps_noise": True},
    "all at once": {
        "ladder": (1.0, 0.8),
        "first_ladder": FOUR,
        "commits": False,
        "chunk_frames": 1,
    },
}


def stream_model(variant: str = "four steps") -> StreamModel:
    first, rest = (
        torch.linalg.qr(rng.normal((size, 16), 0, "basis", size)).Q for size in (192, 768)
    )
    codec = TinyCodec(first.contiguous(), rest.contiguous(), 1.0)
    student = tiny_network(in_channels=16, out_channels=16).requires_grad_(False)
    settings = {"chunk_frames": 2, **VARIANTS[variant]}
    return StreamModel(student, codec, TinyText(12, 5), latent_size=SIZE, **settings)


class Watched(StreamSession):
    """A session that keeps its clean latents."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.latents: list[Tensor] = []
        super().__init__(*arguments, **options)

    def _decode(self, x0: Tensor) -> Any:
        self.latents.append(x0)
        return super()._decode(x0)


def stream(model: StreamModel, num_chunks: int, **settings: Any) -> Tensor:
    """Latents [1, F, C, H, W] of a session's first chunks."""
    session = Watched(model, "a disc", StreamSettings(**settings))
    for _ in range(num_chunks):
        session.next_chunk()
    return torch.cat(session.latents, dim=1)


def text(model: StreamModel, prompt: str = "a disc") -> Conditioning:
    return Conditioning(model.text.encode([prompt]).double())


def noise_of(model: StreamModel, num_chunks: int, steps: int) -> Tensor:
    """[S, 1, F, C, H, W]: a stream's draws, as many for every chunk."""
    shape = (1, model.chunk_frames, 16, *SIZE)
    chunks = [
        torch.stack([rng.normal(shape, 0, "stream noise", chunk, step) for step in range(steps)])
        for chunk in range(num_chunks)
    ]
    return torch.cat(chunks, dim=2).double()


def chunks_of(model: StreamModel, num_chunks: int) -> tuple[Chunk, ...]:
    frames = model.chunk_frames
    return tuple(Chunk(frames * i, frames) for i in range(num_chunks))


def whole(model: StreamModel, num_chunks: int) -> dict[str, Any]:
    """Settings under which nothing is forgotten."""
    window = num_chunks * model.chunk_frames
    return {"sink_frames": 0, "window_frames": window, "positions": "absolute"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_is_the_rollout_and_the_report(variant):
    """Catches a stream, a rollout or a report that runs a student otherwise than it was trained.

    In steps, ladders, noise, past or positions.
    """
    model = stream_model(variant)
    steps = 1 if model.keeps_noise else max(len(model.ladder), len(model.first_ladder or ()))
    noise = noise_of(model, 4, steps)
    chunks = chunks_of(model, 4)
    how = {"first_ladder": model.first_ladder, "commits": model.commits}
    made = stream(model, 4, **whole(model, 4))
    rolled = rollout(model.student, noise, text(model), KVCache(), model.ladder, chunks, **how).x0
    assert (made - rolled).abs().max() < ROUNDING
    few = FewSteps(model.ladder, model.keeps_noise, **how)
    shown = make_clip(model.student, few, noise, text(model), KVCache(), chunks)
    assert torch.equal(shown, rolled)


@pytest.mark.parametrize("sink", [0, 2])
def test_a_stream_without_commits_is_the_rollout_once_the_window_slides(sink):
    """Catches a slot that the last step has not written, or one that is forgotten too early."""
    model = stream_model("no commit")
    made = stream(model, 7, sink_frames=sink, window_frames=4, positions="absolute")
    rolled = rollout(
        model.student,
        noise_of(model, 7, 2),
        text(model),
        KVCache(sink, 4),
        model.ladder,
        chunks_of(model, 7),
        commits=False,
    ).x0
    assert (made - rolled).abs().max() < ROUNDING


@contextmanager
def calls_of(model: StreamModel) -> Iterator[list[float]]:
    """The noise levels at which the student is called."""
    levels: list[float] = []
    hook = model.student.register_forward_pre_hook(lambda _, inputs: levels.append(inputs[1]))
    try:
        yield levels
    finally:
        hook.remove()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_student_is_called_as_often_as_is_said(variant):
    """Catches a pass too many, and operations that are counted for passes nobody makes."""
    model = stream_model(variant)
    settings = StreamSettings(sink_frames=2, window_frames=4)
    session = StreamSession(model, "a disc", settings)
    commit = [0.0] if model.commits else []
    with calls_of(model) as levels:
        session.next_chunk()
        first = list(model.first_ladder or model.ladder)
        assert levels == first
        for _ in range(3):
            levels.clear()
            session.next_chunk()
            assert levels == [*commit, *model.ladder]  # the commit pass is the chunk's before


def test_operations_are_those_of_the_calls():
    """Catches operations that are counted for passes nobody makes."""
    settings = StreamSettings(sink_frames=2, window_frames=4)
    without, clean = (
        chunk_flops(stream_model(variant), settings, 5) for variant in ("no commit", "two steps")
    )
    assert (without.commit, without.dit) == (0, without.denoise)
    assert clean.denoise == without.denoise == 2 * clean.commit


def test_what_is_printed_names_the_passes():
    """Catches a benchmark or a page that says four steps of a student that makes other ones."""
    said = {name: stream_model(name).passes_in_words for name in VARIANTS}
    assert said["one step"] == "1 step and a commit pass"
    assert said["four steps"] == "4 steps and a commit pass"
    assert said["all at once"] == "2 steps (the first chunk 4), no commit pass"


def test_the_past_of_a_student_without_commits_changes_its_future():
    """Catches chunks that are made without any past, and a past that is seen clean after all."""
    model = stream_model("no commit")
    chunks = chunks_of(model, 3)
    noise = noise_of(model, 3, 2)

    def made(draws: Tensor, **how: Any) -> Tensor:
        cache = KVCache()
        clip = rollout(model.student, draws, text(model), cache, model.ladder, chunks, **how)
        return clip.x0.unflatten(1, (3, 2)).squeeze(0)

    plain = made(noise, commits=False)
    changed = noise.clone()
    changed[:, :, :2] += 0.5
    moved = (made(changed, commits=False) - plain).abs().amax((1, 2, 3, 4))
    assert moved.min() > 1e-3
    changed = noise.clone()
    changed[:, :, 2:4] += 0.5
    assert torch.equal(made(changed, commits=False)[0], plain[0])
    clean = made(noise)
    assert torch.equal(clean[0], plain[0])
    assert (clean[1:] - plain[1:]).abs().amax((1, 2, 3, 4)).min() > 1e-3


def prompted(model: StreamModel, mode: str) -> Watched:
    session = Watched(model, "a disc", StreamSettings(sink_frames=2, window_frames=6))
    for _ in range(6):
        session.next_chunk()
    session.set_prompt("a cross", mode)  # type: ignore[arg-type]
    session.next_chunk()
    return session


def test_a_prompt_change_sees_noisy_chunks_again_as_noisy_ones():
    """Catches a recache at level 0, on which such a student was never trained."""
    model = stream_model("no commit")
    last: list[Tensor] = []  # what entered each chunk's last step
    hook = model.student.register_forward_pre_hook(
        lambda _, inputs: last.append(inputs[0]) if inputs[1] == 0.8 else None
    )
    session = Watched(model, "a disc", StreamSettings(sink_frames=2, window_frames=6))
    for _ in range(6):
        session.next_chunk()
    hook.remove()
    session.set_prompt("a cross", "recache")
    with calls_of(model) as levels:
        session.next_chunk()
    assert levels == [0.8] * 3 + [1.0, 0.8]
    cache = KVCache(2, None)
    for x_last in (last[0], last[4], last[5]):  # sink and window: consecutive positions
        commit_chunk(model.student, x_last, text(model, "a cross"), cache, 0.8)
    noise = noise_of(model, 7, 2)[:, :, 12:]
    wanted = denoise_chunk(
        model.student, noise, text(model, "a cross"), cache.read(2), model.ladder
    )[0]
    assert (session.latents[6] - wanted).abs().max() < ROUNDING
    others = {mode: prompted(model, mode).latents[6] for mode in ("flush", "keep")}
    assert not torch.equal(others["flush"], others["keep"])


def test_a_clip_to_go_on_from_is_seen_as_own_chunks_are():
    """Catches a clean context before a student that has seen noisy ones only."""
    model = stream_model("no commit")
    video = rng.uniform((5, 32, 48, 3), 0, "context").float()
    session = Watched(model, "a disc", StreamSettings(**whole(model, 4)), video)
    session.latents.clear()
    session.next_chunk()
    clean = model.codec.start_encoding().encode(video[None]).float()
    noise = rng.normal((1, 2, 16, *SIZE), 0, "context noise", 0)
    cache = KVCache()
    commit_chunk(model.student, add_noise(clean, noise, 0.8), text(model), cache, 0.8)
    wanted = denoise_chunk(
        model.student, noise_of(model, 1, 2), text(model), cache.read(2), model.ladder
    )[0]
    assert (session.latents[0] - wanted).abs().max() < ROUNDING


def test_snapshots_and_resets_of_a_stream_without_commits():
    """Catches a past that a snapshot forgets, or that survives a reset."""
    model = stream_model("no commit")
    settings = StreamSettings(sink_frames=2, window_frames=4)

    def frames(session: StreamSession) -> Tensor:
        return torch.cat([session.next_chunk().frames for _ in range(4)])

    session = StreamSession(model, "a disc", settings)
    first = frames(session)
    moment = session.snapshot()
    ahead = frames(session)
    session.set_prompt("a cross", "recache")
    frames(session)
    session.restore(moment)
    assert torch.equal(frames(session), ahead)
    session.reset()
    assert torch.equal(frames(session), first)


def test_a_first_ladder_is_the_videos_first_chunk_alone():
    """Catches a first ladder in the chunk after a given clip, or again after a flush."""
    model = stream_model("first chunk in four")
    video = rng.uniform((5, 32, 48, 3), 0, "context").float()
    settings = StreamSettings(sink_frames=2, window_frames=4)
    with calls_of(model) as levels:
        session = StreamSession(model, "a disc", settings, video)
        levels.clear()
        session.next_chunk()
        session.set_prompt("a cross", "flush")
        session.next_chunk()
        assert levels == [1.0, 0.8, 0.0, 1.0, 0.8]
