"""Context as values: what a chunk sees, that it cannot change, and that it has no gradient."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from golden_weights import manifest

from selfforcing_dfd import rng
from selfforcing_dfd.context import ChunkContext, ChunkKV, KVCache, PackedContext
from selfforcing_dfd.models.attention import attend

TOKENS = 2  # of one latent frame


def frames_kv(first: int, frames: int, layers: int = 1) -> ChunkKV:
    """Keys that say which latent frame they are of, and values that say the negative."""
    index = torch.arange(first, first + frames, dtype=torch.float64).repeat_interleave(TOKENS)[
        None, :, None, None
    ]
    return ChunkKV(
        frames, tuple((index + 100 * layer, -index - 100 * layer) for layer in range(layers))
    )


class Weigher(pickle.Pickler):
    """Adds up the bytes of all tensors that an object holds, in whatever attribute."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.tensor_bytes = 0

    def persistent_id(self, obj: object) -> str | None:
        """Keep tensors out of the pickle: there they hold addresses, whose length varies."""
        if not isinstance(obj, torch.Tensor):
            return None
        self.tensor_bytes += obj.untyped_storage().nbytes()
        return "tensor"


def held_bytes(held: object) -> int:
    weigher = Weigher()
    weigher.dump(held)
    return weigher.tensor_bytes


def seen_frames(context: ChunkContext) -> list[int]:
    """The latent frames in a context, in order, read off its keys."""
    if not context.chunks:
        return []
    keys = torch.cat([chunk.layers[0][0] for chunk in context.chunks], dim=1)
    return [int(key) for key in keys.flatten()[::TOKENS]]


def attended(cache: KVCache, num_chunks: int, split: int) -> list[list[int]]:
    """The frames that each chunk of 3 attends to, itself included.

    Chunks are committed in pieces of `split` frames.
    """
    table = []
    for start in range(0, 3 * num_chunks, 3):
        table.append([*seen_frames(cache.read(3)), start, start + 1, start + 2])
        for first in range(start, start + 3, split):
            cache.append(frames_kv(first, split))
    return table


@pytest.mark.parametrize(("window", "sink", "split"), [(6, 0, 3), (6, 3, 3), (9, 3, 3), (7, 1, 1)])
def test_sink_and_window_keep_the_frames_that_the_reference_attends_to(window, sink, split):
    """Catches a window that forgets to count the current chunk.

    The student would see one chunk more or less. The reference's lists were read off its running
    cache. Its sink of 1 frame splits a chunk, so here chunks have 1 frame.
    """
    expected = manifest()["files"]["rolling.safetensors"]["attended_frames"][
        f"local{window}_sink{sink}"
    ]
    assert attended(KVCache(sink, window - sink), 6, split) == list(expected.values())


def test_no_window_keeps_everything_in_order():
    """Catches eviction by default, or a sink that is moved out of the order of time."""
    assert attended(KVCache(sink=3), 5, 3) == [list(range(end)) for end in range(3, 18, 3)]


@pytest.mark.parametrize("sink", [1, 2, 4])
def test_a_sink_that_cuts_a_chunk_is_refused(sink):
    """Catches silent rounding: a sink of 1 frame would be none, without an error."""
    cache = KVCache(sink)
    with pytest.raises(ValueError, match=f"sink is {sink} .* chunk has 3 "):
        for start in (0, 3):
            cache.append(frames_kv(start, 3))


@pytest.mark.parametrize(("window", "cure"), [(8, "6 or 9"), (1, "3 or 6"), (0, "3 or 6")])
def test_a_window_that_cuts_a_chunk_is_refused(window, cure):
    """Catches silent rounding, and a window without room for the chunk itself."""
    with pytest.raises(ValueError, match=f"window is {window} .* use {cure}"):
        KVCache(window=window).read(3)


def test_window_of_one_chunk_sees_no_past_but_the_sink():
    """Catches a negative room that wraps around and shows everything."""
    cache = KVCache(sink=3, window=3)
    for start in (0, 3, 6, 9):
        cache.append(frames_kv(start, 3))
    assert seen_frames(cache.read(3)) == [0, 1, 2]


def test_frame_index_counts_forgotten_chunks_too():
    """Catches positions restarted by eviction: the rotation of every later chunk would be wrong."""
    cache = KVCache(window=6)
    for start in range(0, 30, 3):
        cache.append(frames_kv(start, 3))
    assert cache.read(3).next_frame == 30


def test_memory_does_not_grow_with_the_video():
    """Catches a cache that hides old chunks but keeps them.

    Memory of an endless video would grow without end.
    """
    cache, sizes = KVCache(sink=3, window=9), []
    for start in range(0, 120, 3):
        cache.append(frames_kv(start, 3))
        sizes.append(held_bytes(cache))
        cache.read(3)
    assert max(sizes) == max(sizes[:10]) > sizes[0] > 0


def test_what_was_read_does_not_change_when_the_cache_moves_on():
    """Catches contexts that are views of a changing cache.

    The recorded context of a rollout would be overwritten.
    """
    cache = KVCache(sink=0, window=6)
    cache.append(frames_kv(0, 3))
    context = cache.read(3)
    for start in (3, 6, 9):
        cache.append(frames_kv(start, 3))
    assert (seen_frames(context), context.next_frame) == ([0, 1, 2], 3)


def test_reading_is_a_question():
    """Catches a read that evicts.

    A read for a larger chunk would take K/V away from the next chunk.
    """
    cache = KVCache(window=12)
    for start in (0, 3, 6):
        cache.append(frames_kv(start, 3))
    assert seen_frames(cache.read(6)) == [3, 4, 5, 6, 7, 8]
    assert seen_frames(cache.read(3)) == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_keys_and_values_enter_without_gradient():
    """Catches the leak of the public code: gradient that reaches earlier chunks through K/V."""
    k, v = (torch.ones(1, 2, 1, 1, requires_grad=True) * 2 for _ in range(2))
    assert all(not part.requires_grad for pair in ChunkKV(1, ((k, v),)).layers for part in pair)


def test_extend_puts_the_past_before_the_present_and_keeps_layers_apart():
    """Catches keys of one layer or chunk paired with values of another, which no shape shows."""
    context = ChunkContext((frames_kv(0, 1, layers=2), frames_kv(1, 1, layers=2)), next_frame=2)
    present = frames_kv(2, 1, layers=2)
    for layer in range(2):
        k, v = present.layers[layer]
        seen = context.attend(lambda q, k, v: torch.stack([k, v]), layer, k, k, v)
        assert seen[0].flatten().tolist() == [layer * 100 + frame for frame in (0, 0, 1, 1, 2, 2)]
        assert torch.equal(seen[1], -seen[0])


def test_packed_chunks_attend_as_they_would_alone():
    """Catches a chunk that sees its packed neighbours.

    Replay would train on a network that never generates.
    """
    frames = (1, 3, 2)
    q, k, v = (rng.normal((2, TOKENS * sum(frames), 2, 4), 0, name).double() for name in "qkv")
    pasts = [
        ChunkKV(
            n,
            (
                (
                    rng.normal((2, TOKENS * n, 2, 4), 1, "k", n).double(),
                    rng.normal((2, TOKENS * n, 2, 4), 1, "v", n).double(),
                ),
            ),
        )
        for n in (1, 2)
    ]
    contexts = (ChunkContext(), ChunkContext((pasts[0],), 1), ChunkContext((pasts[0], pasts[1]), 4))
    packed = PackedContext(contexts, frames).attend(attend, 0, q, k, v)
    parts = [part.split([TOKENS * n for n in frames], dim=1) for part in (q, k, v)]
    alone = [
        context.attend(attend, 0, *qkv) for context, *qkv in zip(contexts, *parts, strict=True)
    ]
    assert torch.equal(packed, torch.cat(alone, dim=1))


def test_packed_chunks_start_where_their_first_one_does():
    """Catches replayed chunks at positions other than those they were generated at."""
    assert PackedContext((ChunkContext((), 6), ChunkContext((), 9)), (3, 3)).next_frame == 6
