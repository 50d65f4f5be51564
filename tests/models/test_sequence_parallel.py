"""A sequence on several processes gives what one process gives, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import in_processes
from tiny_models import CHUNK, FRAMES, LADDER, conditioning, ladder_noise, latents, tiny_network
from tiny_pictures import asked, picture_sizes
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.models.sequence_parallel import SequenceParallel
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rollout import plan_chunks, replay, rollout
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

HEADS = 6  # shared by 2, 3 and 6 processes, as are the 2 x 3 tokens of a latent frame
ROUNDING = 1e-12  # sums in another order, in float64, of values of about 1


def network(shared: bool, **sizes: Any) -> WanTransformer:
    made = tiny_network(num_attention_heads=HEADS, attention_head_dim=12, **sizes)
    if shared:
        made.share_sequence(SequenceParallel())
    return made


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=ROUNDING)


def whole_clips() -> None:
    """The bidirectional network, and its gradient: the sum of what the processes have."""
    same_flow_and_gradient(conditioning())


def pictures() -> None:
    """The same with a picture, to which the tokens of every process attend."""
    sizes = {**picture_sizes(), "added_kv_proj_dim": HEADS * 12}
    same_flow_and_gradient(asked(FRAMES), **sizes)


def same_flow_and_gradient(given: Conditioning, **sizes: Any) -> None:
    x_t = latents("x_t")
    sigma = torch.rand(2, FRAMES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = latents("weight")
    flows = []
    grads = []
    for shared in (True, False):
        own = network(shared, **sizes)
        if shared:
            own.enable_gradient_checkpointing()  # which exchanges again in the backward pass
        flow = own(x_t, sigma, given).flow
        (flow * weight).sum().backward()
        flows.append(flow.detach())
        grads.append({name: p.grad for name, p in own.named_parameters() if p.grad is not None})
    close(*flows)
    assert grads[0].keys() == grads[1].keys()
    for name, own_grad in grads[0].items():
        assert own_grad is not None
        dist.all_reduce(own_grad)
        wanted = grads[1][name]
        assert wanted is not None
        torch.testing.assert_close(own_grad, wanted, rtol=1e-10, atol=1e-10)


def rollouts() -> None:
    """Chunk by chunk with a sink and a window, then all exit steps in one packed pass."""
    chunks = plan_chunks(FRAMES, CHUNK)
    exit_steps = (3, 1, 2)
    found = []
    for shared in (True, False):
        own = network(shared)
        cache = KVCache(sink=CHUNK, window=2 * CHUNK)
        record = rollout(own, ladder_noise(), conditioning(), cache, LADDER, chunks, exit_steps)
        repeated = replay(own, record, conditioning())
        found.append((record.x0, repeated.detach(), record.contexts))
    for got, wanted in zip(found[0][:2], found[1][:2], strict=True):
        close(got, wanted)
    kept = found[0][2][-1].chunks[0].layers[0][0]  # type: ignore[attr-defined]
    assert kept.shape[2] == HEADS // dist.get_world_size(), "K/V of all heads on one process"


def streams() -> None:
    """Frames of an endless stream, past the window, with a prompt change that commits again."""
    bases = [torch.linalg.qr(rng.normal((n, 16), 0, "basis", n)).Q for n in (192, 768)]
    codec = TinyCodec(bases[0].contiguous(), bases[1].contiguous(), 1.0)
    frames = []
    for shared in (True, False):
        student = network(shared, in_channels=16, out_channels=16)
        model = StreamModel(student, codec, TinyText(12, 5), LADDER, CHUNK, (4, 6))
        settings = StreamSettings(3, CHUNK, 2 * CHUNK, on_prompt="recache")
        session = StreamSession(model, "a disc moves", settings)
        chunks = []
        for number in range(6):
            if number == 4:
                session.set_prompt("a cross moves")
            chunks.append(session.next_chunk().frames)
        frames.append(torch.cat(chunks))
    assert torch.equal(*frames)


def refusals() -> None:
    """Heads and tokens that cannot be shared evenly are refused with the numbers that can."""
    odd = tiny_network(num_attention_heads=5, attention_head_dim=12)
    refused(
        lambda: odd.share_sequence(SequenceParallel()), "the model has 5 heads; use one of 1, 5"
    )
    own = network(shared=True)
    x_t = torch.zeros(1, 1, 4, 10, 14, dtype=torch.float64)
    message = "share the 5 x 7 tokens of a latent frame"
    refused(lambda: own(x_t, 0.5, conditioning(1)), message)


def refused(action: Callable[[], object], message: str) -> None:
    try:
        action()
    except UserError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def act() -> None:
    """All of it, in one of several processes."""
    for part in (whole_clips, pictures, rollouts, streams, refusals):
        part()


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_equal_one(tmp_path: Path, size: int):
    """Catches tokens in another order, heads of another process, and gradients counted twice.

    Each process holds its answers against a network of the same weights that shares nothing: whole
    clips and their gradients, rollouts and their replay, streams past the window with a prompt
    change, and what is refused.
    """
    in_processes(size, tmp_path / "ranks", act)
