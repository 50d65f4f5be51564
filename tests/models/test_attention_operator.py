"""Attention as one operator: a block is one program, whatever the kernel."""

from __future__ import annotations

import math
from functools import partial

import kernel_packages
import pytest
import torch
from inductor_plan import planned
from kernel_packages import install
from tiny_models import LADDER, tiny_network
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from selfforcing_dfd import rng
from selfforcing_dfd.models import attention_operator
from selfforcing_dfd.models.attention import KERNELS, attend, load_kernel
from selfforcing_dfd.models.attention_operator import (
    KernelAttention,
    Slots,
    attend_operator,
    loaded,
)
from selfforcing_dfd.models.block import WanBlock
from selfforcing_dfd.models.prepared import Modulation
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

CPU = torch.device("cpu")
NAMES = ["sdpa", "sdpa-flash", *KERNELS]
CHUNKS = 8  # K = 3, 6, 9 and 12 latent frames, then the sink moves and slots are written over


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """All kernels can be imported, and nothing is compiled yet."""
    torch._dynamo.reset()
    counters.clear()
    install(monkeypatch, "fa2", "fa3", "fa4")
    yield
    loaded.cache_clear()


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """q of four tokens, k and v of nine, of which `visible` shows six."""
    lengths = {"q": 4, "k": 9, "v": 9}
    parts = (rng.normal((2, n, 3, 8), 0, name).to(dtype) for name, n in lengths.items())
    return (*parts, torch.tensor([2, 8]))


def stream_of(name: str) -> StreamSession:
    """A compiled stream whose attention is that kernel; bfloat16, as kernels want it."""
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0)
    student = tiny_network(dtype=torch.bfloat16, in_channels=16, out_channels=16)
    for block in student.requires_grad_(False).wan_blocks():
        block.attend = KernelAttention(name, load_kernel(name, CPU))
    model = StreamModel(student, codec, TinyText(12), LADDER, 3, (4, 6))
    return StreamSession(model, "a disc moves", StreamSettings(seed=1))


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_is_one_program_through_the_whole_ramp(name):
    """Catches a kernel that is traced, and code that depends on a slot, a length or a position.

    Each would compile again in mid-stream, for seconds.
    """
    plain = stream_of(name)
    compiled = stream_of(name)
    counter = CompileCounter()
    compiled.model.student.compile_blocks(backend=counter, fullgraph=True)
    for _ in range(CHUNKS):
        assert torch.equal(compiled.next_chunk().frames, plain.next_chunk().frames)
    assert counter.frame_count == 1
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 1


def fake_block(name: str, device: str) -> WanBlock:
    """A block of bfloat16 weights, on a GPU that is not there too; for use in a FakeTensorMode."""
    with torch.device("meta"):
        block = WanBlock(64, 96, 4, 1e-6)
    for module in block.modules():
        for key, value in list(module.named_parameters(recurse=False)):
            empty = torch.empty(value.shape, device=device, dtype=torch.bfloat16)
            setattr(module, key, nn.Parameter(empty, requires_grad=False))
    block.attend = KernelAttention(name, pytest.fail)
    return block


@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_a_block_is_one_graph(name):
    """Catches what differs there: half types, another device, a kernel that is looked into.

    The tensors are fake, so the graph is made for a GPU, and nothing runs.
    """
    counter = CompileCounter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = torch.compile(fake_block(name, "cuda").over_slots, backend=counter, dynamic=False)

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, device="cuda", dtype=dtype)

        level = Modulation(*(empty(1, 1, 64) for _ in range(6)))
        rotary = (empty(12, 1, 16, dtype=torch.float32), empty(12, 1, 16, dtype=torch.float32))
        text = (empty(1, 5, 4, 16), empty(1, 5, 4, 16))
        keys = empty(1, 48, 4, 16)
        values = empty(1, 48, 4, 16)
        for visible in ((0, 12), (0, 48)):
            own = empty(12, dtype=torch.int64)
            slots = Slots(keys, values, own, torch.tensor(visible))
            x, k, v = run(empty(1, 12, 64), text, level, rotary, slots)
    assert (x.device.type, x.shape, x.dtype) == ("cuda", (1, 12, 64), torch.bfloat16)
    assert k.shape == v.shape == (1, 12, 4, 16)
    assert counter.frame_count == 1
    assert counters["graph_break"] == {}


def test_a_compiled_block_copies_no_ring():
    """Catches a ring that is copied whole to keep a graph pure: 57 MB a block at Wan's size.

    What the program makes for itself is as large as the chunk, of which the ring here holds 400.
    """
    chunk = (1, 12, 4, 16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        block = fake_block("sdpa", "cpu")
        half = partial(torch.empty, dtype=torch.bfloat16)
        level = Modulation(*(half(1, 1, 64) for _ in range(6)))
        rotary = (torch.empty(12, 1, 16), torch.empty(12, 1, 16))
        rings = (half(1, 4800, 4, 16), half(1, 4800, 4, 16))
        slots = Slots(*rings, torch.empty(12, dtype=torch.int64), torch.tensor((0, 48)))
        text = (half(1, 5, 4, 16), half(1, 5, 4, 16))
        run = torch.compile(block.over_slots, dynamic=False)
        plan = planned(lambda: run(half(1, 12, 64), text, level, rotary, slots))
    assert math.prod(chunk) <= plan.largest <= 2 * math.prod(chunk)


def test_the_operator_keeps_its_promises():
    """Catches a wrong shape, stride or alias, by which compiled code would read other memory."""
    q, k, v, visible = inputs()
    for x in (q, k, v):
        x.requires_grad_()
    for part in (None, visible):
        torch.library.opcheck(attend_operator, (q, k, v, part, "sdpa"))


def test_a_kernel_may_lay_out_its_answer_as_it_likes(monkeypatch):
    """Catches an answer, or gradients, of another layout than compiled code was promised.

    Torch's own kernels put heads first on a GPU.
    """

    def heads_first(q, k, v):
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return (weights @ v.transpose(1, 2)).transpose(1, 2)

    monkeypatch.setattr(attention_operator, "loaded", lambda *_: heads_first)
    q, k, v, visible = inputs()
    for x in (q, k, v):
        x.requires_grad_()
    torch.library.opcheck(attend_operator, (q, k, v, visible, "sdpa"))
    attended = attend_operator(q, k, v, visible, "sdpa")
    assert attended.is_contiguous()
    grads = attention_operator.backward_operator(attended.detach(), q, k, v, visible, "sdpa")
    assert all(grad.is_contiguous() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("part", [False, True], ids=["all keys", "visible keys"])
def test_compiled_attention_is_the_same_and_so_are_its_gradients(part, dtype):
    """Catches a backward pass of other keys, and gradients of keys that were not seen.

    In half precision both are computed in float32 on a CPU, as `attend` does it.
    """
    *tensors, visible = inputs(dtype)
    shown = visible if part else None
    attention = KernelAttention()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    results = []
    for function in (attention, compiled):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        attended = function(q, k, v, shown)
        attended.square().sum().backward()
        results.append((attended, q.grad, k.grad, v.grad))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)
    if part:
        assert torch.all(results[1][2][:, :2] == 0)
        assert torch.equal(
            results[0][0], attend(tensors[0], tensors[1][:, 2:8], tensors[2][:, 2:8])
        )


def test_without_compilation_no_operator_is_called(monkeypatch):
    """Catches ten microseconds a call in every stream that is not compiled."""
    monkeypatch.setattr("selfforcing_dfd.models.attention_operator.call_operator", pytest.fail)
    q, k, v, visible = inputs()
    assert torch.equal(KernelAttention()(q, k, v), attend(q, k, v))
    assert torch.equal(KernelAttention()(q, k, v, visible), attend(q, k[:, 2:8], v[:, 2:8]))


def test_stand_ins_are_not_traced():
    """Catches a stand-in that could be traced, with which this file would prove nothing."""
    q, k, v, _ = inputs()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(kernel_packages.fa4, backend="eager", fullgraph=True)(q, k, v)
