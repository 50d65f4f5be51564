"""The network against the public reference code: bidirectional, causal, teacher-forced, rolling."""

from __future__ import annotations

import hashlib

import pytest
import torch
from golden_weights import FOLDER, FORWARD, diffusers_name, golden, golden_network, manifest
from torch import Tensor

from selfforcing_dfd.context import (
    ChunkContext,
    ChunkKV,
    Conditioning,
    KVCache,
    NetworkOutput,
    PackedContext,
)
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rollout import Chunk, plan_chunks

CHUNK = 3


@pytest.fixture(scope="module")
def student() -> WanTransformer:
    return golden_network().requires_grad_(False)


def split_frames(kv: ChunkKV, frames: int) -> list[ChunkKV]:
    """The same keys and values in pieces of `frames` latent frames."""
    pieces = kv.frames // frames
    layers = [
        [(k, v) for k, v in zip(k.chunk(pieces, 1), v.chunk(pieces, 1), strict=True)]
        for k, v in kv.layers
    ]
    return [ChunkKV(frames, tuple(layer[i] for layer in layers)) for i in range(pieces)]


def sequential(
    student: WanTransformer,
    data: dict[str, Tensor],
    window: int | None,
    sink: int,
    split: int = CHUNK,
) -> tuple[dict[str, Tensor], list[ChunkKV]]:
    """Flows and K/V, chunk after chunk.

    Each chunk has two noisy passes and one context pass.
    """
    flows: dict[str, list[Tensor]] = {"pass0": [], "pass1": [], "context": []}
    cache = KVCache(sink, window)
    left = []
    text = Conditioning(data["text"])
    for chunk in plan_chunks(data["x_context"].shape[1], CHUNK):
        context = cache.read(chunk.frames)
        for name, outputs in flows.items():
            sigma = float(data[f"t_{name}"]) / 1000
            out = student(chunk.of(data[f"x_{name}"]), sigma, text, context)
            outputs.append(out.flow)
        left.append(out.kv)
        for piece in split_frames(out.kv, split):
            cache.append(piece)
    return {name: torch.cat(parts, dim=1) for name, parts in flows.items()}, left


@pytest.mark.parametrize(
    "name", ["bidirectional", "rolling", "losses", "gradients", "weights", "weights_teacher"]
)
def test_golden_files_are_the_ones_that_were_published(name):
    """Catches a golden file made by this package, which would agree with whatever it does."""
    content = (FOLDER / f"{name}.safetensors").read_bytes()
    assert (
        hashlib.sha256(content).hexdigest() == manifest()["files"][f"{name}.safetensors"]["sha256"]
    )


def test_original_names_cover_every_parameter_and_no_other():
    """Catches a swap: Wan's norm3 (affine, before cross-attention) is diffusers' norm2."""
    names = {diffusers_name(key) for key in golden("weights")}
    assert names == {
        name for name, _ in WanTransformer(num_layers=2, num_attention_heads=1).named_parameters()
    }


def test_bidirectional(student):
    """Catches any error in the network itself.

    Such as norms' eps, gelu form, modulation order, unpatchify, text padding.
    """
    data = golden("bidirectional")
    out = student(data["x"], data["t"] / 1000, Conditioning(data["text"]))
    torch.testing.assert_close(out.flow, data["flow"], **FORWARD)


def test_causal_passes_over_clean_context(student):
    """Catches noisy K/V in the context, chunks in a wrong order, and positions that restart."""
    data = golden("causal_kv")
    flows, _ = sequential(student, data, window=None, sink=0)
    for name, flow in flows.items():
        torch.testing.assert_close(flow, data[f"flow_{name}"], **FORWARD)


def test_keys_and_values_left_behind(student):
    """Catches keys returned before their norm or rotation.

    Flows of the chunk itself would still be right.
    """
    data = golden("causal_kv")
    _, left = sequential(student, data, window=None, sink=0)
    for name, layer in (("layer0", 0), ("last_layer", -1)):
        for part, index in (("k", 0), ("v", 1)):
            ours = torch.cat([kv.layers[layer][index] for kv in left], dim=1)
            torch.testing.assert_close(ours, data[f"{name}_{part}"], **FORWARD)


def test_sequential_noisy_chunks_equal_the_block_causal_mask(student):
    """Catches context that is not a chunk's own K/V.

    The masked training pass must equal chunk after chunk.
    """
    data = golden("block_mask")
    cache = KVCache()
    flows = []
    for chunk in plan_chunks(6, CHUNK):
        sigma = chunk.of(data["t"]) / 1000
        out: NetworkOutput = student(
            chunk.of(data["x"]), sigma, Conditioning(data["text"]), cache.read(CHUNK)
        )
        cache.append(out.kv)
        flows.append(out.flow)
    torch.testing.assert_close(torch.cat(flows, dim=1), data["flow"], **FORWARD)


def test_packed_noisy_chunks_over_clean_context_equal_teacher_forcing(student):
    """Catches sigmas or positions mixed up between packed chunks.

    Sigma differs by sample and chunk here.
    """
    data = golden("block_mask")
    text = Conditioning(data["text"])
    chunks = plan_chunks(6, CHUNK)
    clean = student(chunks[0].of(data["tf_clean"]), 0.0, text, ChunkContext()).kv
    packed = PackedContext((ChunkContext(), ChunkContext((clean,), CHUNK)), (CHUNK, CHUNK))
    out = student(data["x"], data["t"] / 1000, text, packed)
    torch.testing.assert_close(out.flow, data["tf_flow"], **FORWARD)


@pytest.mark.parametrize(("window", "sink", "split"), [(6, 0, 3), (6, 3, 3), (9, 3, 3), (7, 1, 1)])
def test_rolling_window_and_sink(student, window, sink, split):
    """Catches history that is rotated or computed again.

    Past K/V must stay those computed with the window that their chunk had. The reference's sink of
    one frame splits a chunk. Our cache counts whole chunks, so that case uses chunks of one frame.
    """
    data = golden("rolling")
    flows, _ = sequential(student, data, window - sink, sink, split)
    for name, flow in flows.items():
        torch.testing.assert_close(flow, data[f"local{window}_sink{sink}/flow_{name}"], **FORWARD)


def test_the_window_matters_far_beyond_the_tolerance(student):
    """Catches golden tests that are too weak to see the window.

    Without it the same chunks must differ by 1e4 tolerances.
    """
    data = golden("rolling")
    first = {name: value[:, :12] if value.ndim == 5 else value for name, value in data.items()}
    flows, _ = sequential(student, first, window=None, sink=0)
    last = Chunk(9, CHUNK)
    assert (last.of(flows["pass0"]) - last.of(data["local6_sink0/flow_pass0"])).abs().max() > 0.1
