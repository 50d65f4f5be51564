"""Rollout and replay: the chunk-wise gradient, causality, and training that equals streaming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_weights import ROLLOUT, golden, golden_network
from tiny_models import (
    CHUNK,
    FRAMES,
    LADDER,
    SHAPE,
    conditioning,
    ladder_noise,
    latents,
    tiny_network,
)
from torch import Tensor

from selfforcing_dfd.context import ChunkContext, ChunkKV, Conditioning, KVCache
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rollout import (
    Rollout,
    commit_chunk,
    denoise_chunk,
    plan_chunks,
    replay,
    rollout,
)

LONG = 10  # latent frames: five chunks, so that windows of two or three chunks do forget
EXITS = [(0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (2, 2, 2, 2, 2), (3, 3, 3, 3, 3), (3, 0, 2, 1, 2)]


def roll(
    network: WanTransformer,
    noise: Tensor,
    exit_steps: tuple[int, ...] | None = None,
    sink: int = 0,
    window: int | None = None,
) -> Rollout:
    chunks = plan_chunks(noise.shape[2], CHUNK)
    return rollout(
        network, noise, conditioning(), KVCache(sink, window), LADDER, chunks, exit_steps
    )


def visible(index: int, sink: int, window: int | None) -> list[int]:
    """The earlier chunks that chunk `index` may see: the sink and the rest of the window.

    Written from the definition, not from the code.
    """
    first = list(range(min(index, sink // CHUNK)))
    room = index if window is None else (window - CHUNK) // CHUNK
    recent = [i for i in range(index) if i not in first]
    return first + recent[len(recent) - max(0, min(room, len(recent))) :]


def chunk_by_chunk(
    network: WanTransformer,
    noise: Tensor,
    exit_steps: tuple[int, ...],
    sink: int = 0,
    window: int | None = None,
) -> Tensor:
    """Self-Forcing's Algorithm 1 as published, with autograd through each chunk's exit step.

    It shares no code with the package.
    """
    text, past, clips = conditioning(), [], []
    for index, exit_step in enumerate(exit_steps):
        part = noise[:, :, index * CHUNK : (index + 1) * CHUNK]
        context = ChunkContext(tuple(past[i] for i in visible(index, sink, window)), index * CHUNK)
        x = part[0]
        for step in range(exit_step):
            with torch.no_grad():
                x0 = x - LADDER[step] * network(x, LADDER[step], text, context).flow
            x = (1 - LADDER[step + 1]) * x0 + LADDER[step + 1] * part[step + 1]
        x0 = x - LADDER[exit_step] * network(x, LADDER[exit_step], text, context).flow
        with torch.no_grad():
            past.append(network(x0, 0.0, text, context).kv)
        clips.append(x0)
    return torch.cat(clips, dim=1)


def gradients(network: WanTransformer, x0: Tensor) -> dict[str, Tensor]:
    """Of one fixed linear function of x0."""
    loss = (x0 * latents("weight", x0.shape[1])).sum()
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def relative(ours: Tensor, expected: Tensor) -> float:
    return float(((ours - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("exit_steps", EXITS, ids=str)
def test_replay_gradient_is_the_chunk_wise_gradient(exit_steps):
    """Catches a packed pass that differs from the chunks: position, context, sigma, leak.

    float64; 1e-12 relative over all parameters allows sums in another order and nothing else.
    """
    network, noise = tiny_network(), ladder_noise(LONG)
    expected = chunk_by_chunk(network, noise, exit_steps)
    ours = replay(network, roll(network, noise, exit_steps), conditioning())
    assert relative(ours, expected) < 1e-12
    ours_grad, expected_grad = gradients(network, ours), gradients(network, expected)
    assert (
        relative(*(torch.cat([g[n].flatten() for n in g]) for g in (ours_grad, expected_grad)))
        < 1e-12
    )
    for name, gradient in expected_grad.items():
        # single parameters can cancel by a factor of ten
        assert relative(ours_grad[name], gradient) < 1e-11, name


@pytest.mark.parametrize(("sink", "window"), [(0, 4), (0, 6), (2, 2), (2, 4), (4, 4), (0, 2)])
def test_replay_gradient_is_the_chunk_wise_gradient_within_sink_and_window(sink, window):
    """Catches replay over the whole past where the rollout saw a window of it."""
    network, noise, exit_steps = tiny_network(), ladder_noise(LONG), (3, 1, 2, 0, 2)
    expected = chunk_by_chunk(network, noise, exit_steps, sink, window)
    record = roll(network, noise, exit_steps, sink, window)
    assert relative(record.x0, expected) < 1e-12
    ours = replay(network, record, conditioning())
    ours_grad, expected_grad = gradients(network, ours), gradients(network, expected)
    assert (
        relative(*(torch.cat([g[n].flatten() for n in g]) for g in (ours_grad, expected_grad)))
        < 1e-12
    )


def test_replay_gradient_survives_gradient_checkpointing():
    """Catches recomputation over a context that has changed.

    The public code needs an in-place cache that does not change.
    """
    noise, results = ladder_noise(), []
    for checkpointing in (False, True):
        network = tiny_network()
        if checkpointing:
            network.enable_gradient_checkpointing()
        record = roll(network, noise, (2, 0, 3))
        results.append(gradients(network, replay(network, record, conditioning())))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_replayed_clip_is_the_generated_clip():
    """Catches a loss computed on another clip than the one that was rolled out."""
    network = tiny_network()
    record = roll(network, ladder_noise(), (3, 0, 2))
    assert relative(replay(network, record, conditioning()), record.x0) < 1e-13


def test_no_gradient_reaches_another_chunk():
    """Catches the leak of the public code: exactly zero, not small."""
    network = tiny_network()
    record = roll(network, ladder_noise(), (1, 1, 1))
    entering = record.x_exit.clone().requires_grad_()
    x0 = replay(network, replace(record, x_exit=entering), conditioning())
    for chunk in record.chunks:
        (gradient,) = torch.autograd.grad((chunk.of(x0) ** 2).sum(), entering, retain_graph=True)
        others = [
            frame for frame in range(FRAMES) if not chunk.start <= frame < chunk.start + CHUNK
        ]
        assert not gradient[:, others].any()
        assert chunk.of(gradient).abs().max() > 0


def test_nothing_in_a_rollout_carries_gradient():
    """Catches a graph kept by the recorded context: memory would grow with every chunk."""
    network = tiny_network()
    record = roll(network, ladder_noise().requires_grad_(), (2, 2, 2))
    kv: list[ChunkKV] = [chunk for context in record.contexts for chunk in context.chunks]
    assert not record.x0.requires_grad
    assert not record.x_exit.requires_grad
    assert not any(part.requires_grad for chunk in kv for layer in chunk.layers for part in layer)


def test_past_changes_the_future_and_never_the_other_way_round():
    """Catches chunks generated independently, and a look into the future.

    The minimal re-implementation has the first fault.
    """
    network, noise = tiny_network(), ladder_noise()
    base = roll(network, noise).x0
    for index in range(3):
        changed = noise.clone()
        changed[:, :, index * CHUNK : (index + 1) * CHUNK] += 0.5
        moved = (
            (roll(network, changed).x0 - base).abs().unflatten(1, (3, CHUNK)).amax((0, 2, 3, 4, 5))
        )
        assert not moved[:index].any()
        assert moved[index:].min() > 1e-3


def test_window_forgets_and_sink_remembers():
    """Catches a sink that is evicted, or a window that keeps too much.

    Chunks of 2 frames, window 2, sink 2: chunk 2 sees chunk 0 and itself. So chunk 1 must not
    matter to it, bit for bit.
    """
    network, noise = tiny_network(), ladder_noise()
    changed = noise.clone()
    changed[:, :, CHUNK : 2 * CHUNK] += 0.5
    with_sink = [
        roll(network, value, sink=2, window=2).x0[:, 2 * CHUNK :] for value in (noise, changed)
    ]
    without_sink = [
        roll(network, value, sink=0, window=4).x0[:, 2 * CHUNK :] for value in (noise, changed)
    ]
    assert torch.equal(*with_sink)
    assert (without_sink[0] - without_sink[1]).abs().max() > 1e-3


def test_rollout_generates_what_streaming_generates():
    """Catches a training rollout that differs from the sampler.

    Chunk by chunk, it is the same clip bit for bit.
    """
    network, noise, text = tiny_network(), ladder_noise(), conditioning()
    cache, clips = KVCache(sink=2, window=2), []
    for chunk in plan_chunks(FRAMES, CHUNK):
        x0, _ = denoise_chunk(
            network, chunk.of(noise, dim=2), text, cache.read(chunk.frames), LADDER
        )
        commit_chunk(network, x0, text, cache)
        clips.append(x0)
    assert torch.equal(roll(network, noise, sink=2, window=2).x0, torch.cat(clips, dim=1))


def test_exit_step_is_honoured():
    """Catches a rollout that always takes all steps.

    The input of step 0 is the noise, and sigma is that of the exit.
    """
    network, noise = tiny_network(), ladder_noise()
    record = roll(network, noise, (0, 3, 1))
    assert torch.equal(record.x_exit[:, :CHUNK], noise[0][:, :CHUNK])
    assert record.sigma_exit[0].tolist() == [LADDER[i] for i in (0, 0, 3, 3, 1, 1)]
    assert torch.equal(record.x0[:, :CHUNK], roll(network, noise, (0, 0, 0)).x0[:, :CHUNK])
    assert not torch.equal(
        record.x0[:, CHUNK : 2 * CHUNK], roll(network, noise, (0, 0, 0)).x0[:, CHUNK : 2 * CHUNK]
    )


def test_exit_step_beyond_the_ladder_is_an_error():
    """Catches an index that wraps around: step five of four would be the first."""
    chunk = plan_chunks(FRAMES, CHUNK)[0]
    with pytest.raises(IndexError):
        denoise_chunk(
            tiny_network(),
            chunk.of(ladder_noise(), 2),
            conditioning(),
            ChunkContext(),
            LADDER,
            len(LADDER),
        )


def test_each_step_adds_its_own_noise():
    """Catches one noise used for all steps: step 2's draw matters to exit 2, step 3's does not."""
    network, noise = tiny_network(), ladder_noise()
    base = roll(network, noise, (2, 2, 2)).x0
    for step, matters in ((0, True), (1, True), (2, True), (3, False)):
        changed = noise.clone()
        changed[step] += 0.5
        assert torch.equal(roll(network, changed, (2, 2, 2)).x0, base) is not matters


def test_one_draw_of_noise_is_kept_to_the_end():
    """Catches noise that is redrawn or scaled: kept, it makes the ladder Euler's steps."""
    network, noise, text = tiny_network(), ladder_noise()[:1], conditioning()
    chunk = noise[:, :, :CHUNK]
    x_t = chunk[0]
    for sigma, following in zip(LADDER, (*LADDER[1:], 0.0), strict=True):
        entered = x_t
        x_t = x_t + (following - sigma) * network(x_t, sigma, text, ChunkContext()).flow
    x0, x_exit = denoise_chunk(network, chunk, text, ChunkContext(), LADDER)
    torch.testing.assert_close(x0, x_t)
    torch.testing.assert_close(x_exit, entered)
    fresh, _ = denoise_chunk(network, ladder_noise()[:, :, :CHUNK], text, ChunkContext(), LADDER)
    assert not torch.allclose(fresh, x0)


def test_last_chunk_is_not_committed():
    """Catches one wasted network pass in three (of three chunks) on a clip that nothing follows."""
    cache = KVCache()
    rollout(
        tiny_network(), ladder_noise(), conditioning(), cache, LADDER, plan_chunks(FRAMES, CHUNK)
    )
    assert cache.read(CHUNK).next_frame == FRAMES - CHUNK


def test_commit_remembers_the_clean_chunk():
    """Catches K/V of the noisy exit input, and context noise (.005 in the public code)."""
    network, text, x0 = tiny_network(), conditioning(), latents("x0", CHUNK)
    cache = KVCache()
    commit_chunk(network, x0, text, cache)
    expected = network(x0, 0.0, text, ChunkContext()).kv
    assert torch.equal(cache.read(CHUNK).chunks[0].layers[1][0], expected.layers[1][0])


def golden_noise(data: dict[str, Tensor]) -> Tensor:
    """The reference's draws as [S, B, F, C, H, W].

    It stores noise added later as [chunk, step, B, frames, C, H, W].
    """
    draws = [data["noise"]]
    if "renoise" in data:
        draws += [
            torch.cat(tuple(data["renoise"][:, step]), dim=1)
            for step in range(data["renoise"].shape[1])
        ]
    return torch.stack(draws)


@pytest.mark.parametrize("exit_step", range(4))
def test_rollout_equals_the_reference(exit_step):
    """Catches any difference to Self-Forcing's rollout in order, noise, ladder or context.

    The variant with clean context.
    """
    data = golden(f"rollout_exit{exit_step}")
    ladder = tuple((data["steps"].double() / 1000).tolist())
    chunks = plan_chunks(6, 3)
    record = rollout(
        golden_network(),
        golden_noise(data),
        Conditioning(data["text"]),
        KVCache(),
        ladder,
        chunks,
        (exit_step,) * len(chunks),
    )
    torch.testing.assert_close(record.x0, data["x0_clean_context"], **ROLLOUT)
    replayed = replay(golden_network(), record, Conditioning(data["text"]))
    torch.testing.assert_close(replayed, data["x0_clean_context"], **ROLLOUT)


def test_golden_rollout_would_notice_the_references_context_noise():
    """Catches a tolerance too wide to see the reference's context noise of sigma .005.

    It moves the result by 1.6e-3.
    """
    data = golden("rollout_exit1")
    assert not torch.allclose(data["x0_reference"], data["x0_clean_context"], **ROLLOUT)


def test_chunks_cover_the_video_once():
    """Catches gaps and overlaps between chunks."""
    frames = torch.arange(6)[None]
    assert torch.cat([chunk.of(frames) for chunk in plan_chunks(6, 2)], dim=1).tolist() == [
        list(range(6))
    ]


@pytest.mark.parametrize(("frames", "chunk", "advice"), [(7, 3, "use 6 or 9"), (2, 3, "use 3")])
def test_frames_that_make_no_whole_chunks_are_refused_with_the_next_size(frames, chunk, advice):
    """Catches a last chunk of another size, on which no student was trained."""
    with pytest.raises(
        ValueError, match=f"clip is {frames} latent frames, but a chunk has {chunk} .*{advice}"
    ):
        plan_chunks(frames, chunk)


def test_one_exit_step_for_each_chunk_is_demanded():
    """Catches a clip that ends early because the list of exit steps was short."""
    with pytest.raises(ValueError, match="shorter"):
        roll(tiny_network(), ladder_noise(), (1, 1))


def test_tiny_shapes_are_not_symmetric():
    """Guards these tests themselves: with H = W or C = F, swapped axes would go unseen."""
    assert len({FRAMES, *SHAPE[1:], CHUNK}) >= 3
