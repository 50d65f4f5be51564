"""A stream is the rollout of training, for every cache, split and batch; float64 to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import tiny_network
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rollout import Chunk, commit_chunk, denoise_chunk, rollout
from selfforcing_dfd.streaming.ring import Positions, RingCache
from selfforcing_dfd.streaming.session import PromptMode, StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

LADDER = (1.0, 0.9375, 0.625)
# float64 through two blocks, sums in another order; a wrong key or position gives 1e-2 and more
ROUNDING = 1e-10
LATENT_SIZE = (4, 6)


@pytest.fixture(scope="module")
def model() -> StreamModel:
    """The real network, codec and text encoder, small, in float64, with random weights.

    Chunks have two latent frames.
    """
    first, rest = (
        torch.linalg.qr(rng.normal((size, 16), 0, "basis", size)).Q for size in (192, 768)
    )
    codec = TinyCodec(first.contiguous(), rest.contiguous(), 1.0)
    student = tiny_network(in_channels=16, out_channels=16).requires_grad_(False)
    return StreamModel(student, codec, TinyText(12, 5), LADDER, 2, LATENT_SIZE)


class Watched(StreamSession):
    """A session that keeps its clean latents."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.latents: list[Tensor] = []
        super().__init__(*arguments, **options)

    def _decode(self, x0: Tensor) -> Any:
        self.latents.append(x0)
        return super()._decode(x0)


def stream(model: StreamModel, num_chunks: int, prompt: str = "a disc", **settings: Any) -> Tensor:
    """Latents [1, F, C, H, W] of a session's first chunks."""
    session = Watched(model, prompt, StreamSettings(**settings))
    for _ in range(num_chunks):
        session.next_chunk()
    return torch.cat(session.latents, dim=1)


def conditioning(model: StreamModel, prompt: str = "a disc") -> Conditioning:
    return Conditioning(model.text.encode([prompt]).double())


def ring(student: WanTransformer, sink: int, window: int, positions: Positions) -> RingCache:
    model_shape = StreamModel(student, None, None, LADDER, 2, LATENT_SIZE).kv_shape()  # type: ignore[arg-type]
    return RingCache(model_shape, 2, sink, window, positions, dtype=torch.float64)


def run(
    student: WanTransformer, cache: Any, text: Conditioning, lengths: Sequence[int]
) -> list[Tensor]:
    """Generate chunks of these lengths with any cache; the same noise for chunk i each time."""
    made = []
    for i, frames in enumerate(lengths):
        noise = rng.normal((3, 1, frames, 16, *LATENT_SIZE), 0, "ring noise", i).double()
        x0, _ = denoise_chunk(student, noise, text, cache.read(frames), LADDER)
        commit_chunk(student, x0, text, cache)
        made.append(x0)
    return made


def test_stream_is_the_rollout(model):
    """Catches any difference between training and streaming.

    In noise, steps, cache, positions or commit pass.
    """
    made = stream(model, 4, sink_frames=0, window_frames=8, positions="absolute")
    shape = (1, 2, 16, *LATENT_SIZE)
    draws = [
        torch.stack([rng.normal(shape, 0, "stream noise", chunk, step) for step in range(3)])
        for chunk in range(4)
    ]
    chunks = tuple(Chunk(2 * i, 2) for i in range(4))
    wanted = rollout(
        model.student, torch.cat(draws, dim=2), conditioning(model), KVCache(), LADDER, chunks
    ).x0
    assert (made - wanted).abs().max() < ROUNDING


def test_a_stream_that_keeps_its_noise_is_the_rollout_from_that_noise(model):
    """Catches fresh noise between a stream's steps where its student was trained to keep it."""
    kept = replace(model, keeps_noise=True)
    made = stream(kept, 2, sink_frames=0, window_frames=8, positions="absolute")
    shape = (1, 2, 16, *LATENT_SIZE)
    draws = [rng.normal(shape, 0, "stream noise", index, 0).double() for index in range(2)]
    expected = rollout(
        model.student,
        torch.cat(draws, dim=1)[None],
        conditioning(model),
        KVCache(),
        LADDER,
        (Chunk(0, 2), Chunk(2, 2)),
    ).x0
    assert (made - expected).abs().max() < ROUNDING
    fresh = stream(model, 2, sink_frames=0, window_frames=8, positions="absolute")
    assert (made - fresh).abs().max() > 1e-2


@pytest.mark.parametrize("first", [2, 1])
@pytest.mark.parametrize(("sink", "window"), [(0, 6), (0, 2), (2, 4), (2, 2), (4, 4)])
def test_ring_is_the_cache_by_concatenation(model, sink, window, first):
    """Catches a slot that is overwritten too early or seen too long.

    In every phase of the ring, after a short first chunk.
    """
    lengths = [first] + [2] * 8
    by_ring = run(
        model.student, ring(model.student, sink, window, "absolute"), conditioning(model), lengths
    )
    wanted = run(model.student, KVCache(sink, window), conditioning(model), lengths)
    for made, other in zip(by_ring, wanted, strict=True):
        assert (made - other).abs().max() < ROUNDING


@pytest.mark.parametrize(("sink", "window"), [(2, 4), (4, 4), (2, 2), (0, 4)])
def test_moving_the_sink_is_counting_from_zero(model, sink, window):
    """Catches a sink rotated by a wrong angle or twice, and a mode without effect."""
    made = {
        positions: run(
            model.student,
            ring(model.student, sink, window, positions),
            conditioning(model),
            [2] * 8,
        )
        for positions in ("absolute", "sink_relative", "window_relative")
    }
    for relative, reference in zip(made["sink_relative"], made["window_relative"], strict=True):
        assert (relative - reference).abs().max() < ROUNDING
    moved = (made["absolute"][-1] - made["sink_relative"][-1]).abs().max()
    assert (moved > 1e-3) == (sink > 0)


@pytest.mark.parametrize("start", [1024, 1_000_000])
def test_positions_have_no_end(model, start):
    """Catches a table of positions, and angles in a type that loses them.

    1e-9: float64 angles of a million turns.
    """
    near, far = (ring(model.student, 0, 6, "absolute") for _ in range(2))
    far.next_frame = start
    pairs = zip(
        *(run(model.student, cache, conditioning(model), [2] * 5) for cache in (near, far)),
        strict=True,
    )
    for made, shifted in pairs:
        assert (made - shifted).abs().max() < 1e-9


def test_turning_often_adds_no_rounding(model):
    """Catches a sink that is rotated from its last position.

    In bfloat16 the error would grow with every chunk.
    """
    cache = ring(model.student, 2, 2, "sink_relative")
    run(model.student, cache, conditioning(model), [2] * 3)
    sink = slice(0, 2 * cache.shape.tokens)
    once = cache.keys[:, :, sink].clone()
    (slot,) = cache._kept
    for position in (*range(1000), slot.position):
        cache._turn(slot, position)
    assert torch.equal(cache.keys[:, :, sink], once)


def test_noisy_steps_leave_nothing_and_touch_nothing_else(model):
    """Catches steps that write beside their slot, and noisy keys that stay after the commit."""
    cache = ring(model.student, 2, 4, "absolute")
    made = run(model.student, cache, conditioning(model), [2] * 5)
    before = cache.keys.clone()
    own = cache.read(2).own
    noise = rng.normal((3, 1, 2, 16, *LATENT_SIZE), 1, "other").double()
    denoise_chunk(model.student, noise, conditioning(model), cache.read(2), LADDER)
    others = torch.ones(cache.keys.shape[2], dtype=torch.bool)
    others[own] = False
    assert torch.equal(cache.keys[:, :, others], before[:, :, others])
    commit_chunk(model.student, made[0], conditioning(model), cache)
    after = cache.keys.clone()
    other = ring(model.student, 2, 4, "absolute")
    run(model.student, other, conditioning(model), [2] * 5)
    commit_chunk(model.student, made[0], conditioning(model), other)
    assert torch.equal(other.keys, after)


def test_text_keys_worked_out_once_are_the_same(model):
    """Catches text keys of another prompt or layer, to the bit."""
    text = conditioning(model)
    x_t = rng.normal((1, 2, 16, *LATENT_SIZE), 0, "x").double()
    plain, prepared = (
        model.student(x_t, 0.5, each).flow for each in (text, model.student.prepare(text))
    )
    assert torch.equal(plain, prepared)


def prompted(model: StreamModel, mode: PromptMode, num_before: int, **settings: Any) -> Watched:
    session = Watched(model, "a disc", StreamSettings(**settings))
    for _ in range(num_before):
        session.next_chunk()
    session.set_prompt("a cross", mode)
    session.next_chunk()
    return session


def after_change(
    model: StreamModel, session: Watched, kept: list[Tensor], text: Conditioning, sink: int
) -> Tensor:
    """The next chunk after these chunks alone, committed under `text`, at consecutive positions."""
    cache = KVCache(sink, None)
    for x0 in kept:
        commit_chunk(model.student, x0, text, cache)
    chunk = len(session.latents) - 1
    shape = (1, 2, 16, *LATENT_SIZE)
    noise = torch.stack([rng.normal(shape, 0, "stream noise", chunk, step) for step in range(3)])
    return denoise_chunk(
        model.student, noise, conditioning(model, "a cross"), cache.read(2), LADDER
    )[0]


def test_recache_is_the_past_under_the_new_prompt(model):
    """Catches chunks recached out of order, under the old prompt, or with the wrong context.

    The sink (one chunk) and two chunks of the window are visible. Moving the sink along makes their
    positions consecutive.
    """
    session = prompted(model, "recache", 6, sink_frames=2, window_frames=6)
    kept = [session.latents[0], session.latents[4], session.latents[5]]
    wanted = after_change(model, session, kept, conditioning(model, "a cross"), 2)
    assert (session.latents[6] - wanted).abs().max() < ROUNDING


def test_recache_under_the_same_prompt_changes_nothing_before_the_window_slides(model):
    """Catches a recache that is not a fixed point while nothing has been forgotten."""
    plain = stream(model, 4, sink_frames=2, window_frames=6)
    session = Watched(model, "a disc", StreamSettings(sink_frames=2, window_frames=6))
    for i in range(4):
        if i == 3:
            session.set_prompt("a disc", "recache")
        session.next_chunk()
    assert (torch.cat(session.latents, dim=1) - plain).abs().max() < ROUNDING


def test_flush_leaves_sink_and_newest_chunk_as_they_were(model):
    """Catches a flush that keeps old chunks, forgets the sink, or moves keys without values."""
    cache = ring(model.student, 2, 6, "absolute")
    run(model.student, cache, conditioning(model), [2] * 6)
    tokens = 2 * cache.shape.tokens
    newest = cache._tokens(cache._recent[-1])
    wanted = [
        torch.cat([buffer[:, :, :tokens], buffer[:, :, newest]], 2)
        for buffer in (cache.keys, cache.values)
    ]
    cache.flush()
    assert cache.visible_starts == (0, 10)
    context = cache.read(2)
    assert context.next_frame == 12
    seen = slice(context.visible.start, context.own.start)
    assert context.own == slice(2 * tokens, 3 * tokens)
    for buffer, kept in zip((cache.keys, cache.values), wanted, strict=True):
        assert torch.equal(buffer[:, :, seen], kept)


def test_flush_reaches_the_stream(model):
    """Catches a session that forgets to flush."""
    flushed, kept = (
        prompted(model, mode, 6, sink_frames=2, window_frames=6) for mode in ("flush", "keep")
    )
    assert torch.equal(torch.cat(flushed.latents[:6]), torch.cat(kept.latents[:6]))
    assert not torch.equal(flushed.latents[6], kept.latents[6])


def test_keep_changes_the_text_alone(model):
    """Catches a past that is touched although it should be kept."""
    session = prompted(model, "keep", 3, sink_frames=0, window_frames=8, positions="absolute")
    cache = KVCache()
    text = conditioning(model)
    for x0 in session.latents[:3]:
        commit_chunk(model.student, x0, text, cache)
    noise = torch.stack(
        [rng.normal((1, 2, 16, *LATENT_SIZE), 0, "stream noise", 3, step) for step in range(3)]
    )
    wanted = denoise_chunk(
        model.student, noise, conditioning(model, "a cross"), cache.read(2), LADDER
    )[0]
    assert (session.latents[3] - wanted).abs().max() < ROUNDING


def frames(session: StreamSession, num_chunks: int) -> Tensor:
    return torch.cat([session.next_chunk().frames for _ in range(num_chunks)])


def test_sessions_do_not_know_of_each_other(model):
    """Catches state on the model or the module: two streams in turn are each what it is alone."""
    settings = StreamSettings(sink_frames=2, window_frames=4)
    alone = [
        frames(StreamSession(model, prompt, replace(settings, seed=i)), 6)
        for i, prompt in enumerate(("a", "b"))
    ]
    one, two = (
        StreamSession(model, prompt, replace(settings, seed=i))
        for i, prompt in enumerate(("a", "b"))
    )
    together = [(one.next_chunk().frames, two.next_chunk().frames) for _ in range(6)]
    assert torch.equal(torch.cat([pair[0] for pair in together]), alone[0])
    assert torch.equal(torch.cat([pair[1] for pair in together]), alone[1])


def test_reset_is_a_new_session_and_restore_goes_back(model):
    """Catches state that survives a reset, and a snapshot that the running stream changes.

    State is keys, features, history and counters.
    """
    settings = StreamSettings(seed=1, sink_frames=2, window_frames=4)
    fresh = frames(StreamSession(model, "a", settings), 6)
    session = StreamSession(model, "b", replace(settings, seed=2))
    frames(session, 5)
    session.reset("a", seed=1)
    started = frames(session, 3)
    session.set_prompt("c")
    moment = session.snapshot()
    ahead = frames(session, 4)
    session.reset("b")
    frames(session, 2)
    session.restore(moment)
    assert torch.equal(frames(session, 4), ahead)
    assert torch.equal(started, fresh[: len(started)])
    assert not torch.equal(ahead[:8], fresh[len(started) :][:8])


def test_restore_takes_the_decoder_back_too(model):
    """Catches a codec that goes on from the chunks after the snapshot."""
    session = StreamSession(model, "a", StreamSettings(sink_frames=2, window_frames=4))
    moment = session.snapshot()
    first = frames(session, 2)
    session.restore(moment)
    assert torch.equal(frames(session, 2), first)
    assert len(first) == 5 + 8


@pytest.mark.parametrize("num_frames", [1, 5, 9, 21])
def test_context_is_what_came_before(model, num_frames):
    """Catches a context that is not committed, not counted, or not seen by the decoder."""
    video = rng.uniform((num_frames, 32, 48, 3), 0, "context").float()
    session = Watched(
        model,
        "a disc",
        StreamSettings(sink_frames=0, window_frames=12, positions="absolute"),
        video,
    )
    assert len(session.context_frames) == num_frames
    chunk = session.next_chunk()
    latents = model.codec.start_encoding().encode(video[None])
    cache = KVCache()
    count = latents.shape[1]
    for x0 in latents.split([count % 2 or 2, *[2] * ((count - 1) // 2)], dim=1):
        commit_chunk(model.student, x0.double(), conditioning(model), cache)
    noise = torch.stack(
        [rng.normal((1, 2, 16, *LATENT_SIZE), 0, "stream noise", 0, step) for step in range(3)]
    )
    wanted = denoise_chunk(model.student, noise, conditioning(model), cache.read(2), LADDER)[0]
    # the session's context latents are float32, as the codec gives them; 1e-5 is their rounding
    # through the network
    assert (session.latents[-1] - wanted).abs().max() < 1e-5
    assert len(chunk.frames) == 8
    assert cache.read(2).next_frame + 2 == session.next_frame


def test_what_does_not_fit_is_refused(model):
    """Catches sizes that would split a chunk over slots, and clips that are cut silently."""
    with pytest.raises(
        ValueError,
        match=r"sink_frames is 3; slots hold whole chunks of 2 latent frames: use 2 or 4",
    ):
        StreamSession(model, "a", StreamSettings(sink_frames=3, window_frames=4))
    with pytest.raises(ValueError, match=r"window_frames is 0; it counts the current chunk"):
        StreamSession(model, "a", StreamSettings(sink_frames=2, window_frames=0))
    with pytest.raises(ValueError, match=r"want T = 1 \+ 4 n video frames of 32 x 48"):
        StreamSession(
            model, "a", StreamSettings(sink_frames=2, window_frames=4), torch.zeros(4, 32, 48, 3)
        )
