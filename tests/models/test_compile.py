"""Compiled blocks: the same numbers, one program for every chunk."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_models import LADDER, tiny_network
from torch._dynamo.testing import CompileCounter

from selfforcing_dfd import rng
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

# float32, fused sums in another order through two blocks, four steps, eight chunks fed back
ROUNDING = 1e-5


def stream_model() -> StreamModel:
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0)
    student = tiny_network(dtype=torch.float32, in_channels=16, out_channels=16).requires_grad_(
        False
    )
    return StreamModel(student, codec, TinyText(12), LADDER, 3, (4, 6))


def newest_latents(session: StreamSession) -> torch.Tensor:
    pending = session.snapshot().pending
    assert pending is not None
    return pending[0]


def test_no_chunk_compiles_again():
    """Catches compiled code that depends on the slot, the position or the chunk.

    Each of them would stop a stream for seconds.
    """
    torch._dynamo.reset()
    counter = CompileCounter()
    model = stream_model()
    model.student.compile_blocks(backend=counter)
    session = StreamSession(model, "a disc moves", StreamSettings(seed=1))
    session.next_chunk()
    session.next_chunk()
    compiled = counter.frame_count
    assert compiled == 1  # a whole block, once for all blocks, steps and noise levels
    for chunk in range(8):
        session.set_prompt(("a disc moves", "a cross moves")[chunk % 2], "recache")
        session.next_chunk()
    assert counter.frame_count == compiled


@pytest.mark.parametrize("backend", ["aot_eager", *(["inductor"] if shutil.which("g++") else [])])
def test_compiled_blocks_make_the_same_video(backend):
    """Catches a graph that freezes a position, a modulation or a weight of the first call."""
    torch._dynamo.reset()
    plain = stream_model()
    compiled = stream_model()
    compiled.student.compile_blocks(backend=backend)
    one, other = (
        StreamSession(model, "a disc moves", StreamSettings(seed=1)) for model in (plain, compiled)
    )
    for _ in range(8):
        one.next_chunk()
        other.next_chunk()
        torch.testing.assert_close(
            newest_latents(other), newest_latents(one), rtol=0, atol=ROUNDING
        )
