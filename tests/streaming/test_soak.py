"""Long streams: latency stays flat, memory does not grow, and the picture stays a picture."""

from __future__ import annotations

import ctypes
import gc
import sys
from statistics import median

import pytest
import torch
from tqdm import tqdm

from selfforcing_dfd.common import resident_bytes
from selfforcing_dfd.streaming.load import load_settings, load_stream_model
from selfforcing_dfd.streaming.session import StreamChunk, StreamModel, StreamSession
from selfforcing_dfd.tiny.readout import read

NUM_CHUNKS = 5000
PART = 500
RAMP = 20
MIB = 2**20


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return load_stream_model()


def live_tensors() -> tuple[int, int]:
    """How many tensors there are, and their bytes."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


def test_nothing_grows_from_chunk_to_chunk(model):
    """Catches a list that keeps every chunk, and remains of each change of prompt."""
    session = StreamSession(model, "a disc moves", load_settings("tiny"))

    def run() -> tuple[int, int]:
        for chunk in range(12):
            if chunk % 6 == 0:
                session.set_prompt(f"a {('disc', 'cross')[chunk // 6]} moves", "recache")
            session.next_chunk()
        return live_tensors()

    run()
    before = run()
    assert [run() for _ in range(3)] == [before] * 3


def bytes_in_use() -> int:
    """Resident memory once the allocator has given back what it only keeps for later."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


@pytest.mark.soak
def test_five_thousand_chunks(model, capsys):
    """Catches latency that creeps, memory that leaks, positions that end, and a broken picture.

    Latency: the last 500 chunks against the first 500, each in turn with chunks of a second stream,
    which is young both times. Other work of the machine slows both streams alike. So the ratios
    must agree to 2 %, three times the difference of two streams of the same age. Memory, 1 MiB: 240
    bytes left by each chunk would reach it.
    """
    session, young = (StreamSession(model, "a disc moves", load_settings("tiny")) for _ in range(2))
    latencies: list[float] = []
    young_latencies: list[float] = []
    recent: list[StreamChunk] = []
    valid = []
    memory = []
    for index in tqdm(range(NUM_CHUNKS + RAMP), desc="streaming", unit="chunk", disable=None):
        chunk = session.next_chunk()
        latencies.append(chunk.timings.total_ms)
        if index == NUM_CHUNKS + RAMP - PART:
            young.reset("a disc moves")
        if index < PART + RAMP or index >= NUM_CHUNKS + RAMP - PART:
            young_latencies.append(young.next_chunk().timings.total_ms)
        recent = [*recent, chunk][-3:]
        if index % PART == PART - 1 or index == RAMP:
            memory.append(bytes_in_use())
            clip = torch.cat([chunk.frames for chunk in recent])[-33:].float() / 255
            reading = read(clip[None])
            valid.append((index, bool(reading.valid[0]), round(float(reading.contrast[0]), 2)))
    first, last, fresh = (
        median(part)
        for part in (latencies[RAMP:][:PART], latencies[-PART:], young_latencies[-PART + RAMP :])
    )
    growth = (memory[-1] - memory[1]) / MIB
    with capsys.disabled():
        print(
            f"\nfirst {PART} {first:.2f} ms, last {PART} {last:.2f} ms, "
            f"ratio {last / first:.4f}; in turn with a young stream of {fresh:.2f} ms, "
            f"ratio {last / fresh:.4f}; grown by {growth:.2f} MiB"
        )
        print(f"latent frames {session.next_frame}; read-out (chunk, valid, contrast) {valid}")
    assert abs(last / fresh - 1) < 0.02
    assert growth < 1
    assert session.next_frame == 3 * (NUM_CHUNKS + RAMP)
    assert all(is_valid for _, is_valid, _ in valid)
