"""Blocks that visit the device in groups give the same video from less of its memory."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_models import LADDER, tiny_network
from torch import nn
from torch._dynamo.testing import CompileCounter

from selfforcing_dfd import rng
from selfforcing_dfd.models.fp8 import use_fp8
from selfforcing_dfd.models.network import WanNetwork
from selfforcing_dfd.models.offload import BlockGroups, OffloadError
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

CPU = torch.device("cpu")
LAYERS = 5


def network() -> WanNetwork:
    sizes = {"in_channels": 16, "out_channels": 16, "num_layers": LAYERS}
    return tiny_network(dtype=torch.float32, **sizes).requires_grad_(False)


def video(student: WanNetwork) -> torch.Tensor:
    """Four chunks, with a prompt that changes under the second one."""
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0)
    model = StreamModel(student, codec, TinyText(12), LADDER, 3, (4, 6))
    session = StreamSession(model, "a disc moves", StreamSettings(seed=1, window_frames=6))
    chunks = [session.next_chunk().frames]
    session.set_prompt("a cross moves", "recache")
    chunks += [session.next_chunk().frames for _ in range(3)]
    return torch.cat(chunks)


@pytest.mark.parametrize(("group_size", "eight_bits"), [(1, False), (2, False), (2, True)])
def test_the_video_is_the_same_to_the_bit(group_size, eight_bits):
    """Catches a group that is overwritten while it is needed, or asked for too late.

    With groups of 2 the last one is smaller, and the number of groups is odd. In 8 bits a weight
    is made of two tensors.
    """
    plain = network()
    moved = network()
    if eight_bits:
        use_fp8(plain)
        use_fp8(moved)
    groups = moved.offload_blocks(CPU, group_size)
    assert len(groups.groups) == -(-LAYERS // group_size)
    rooms = {room.untyped_storage().data_ptr() for room in groups.rooms}
    used = []

    def on_the_device(layer: nn.Linear, inputs: object) -> None:
        weight = vars(layer.weight).get("qdata", layer.weight)
        used.append(weight.untyped_storage().data_ptr() in rooms)

    for layer in moved.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(on_the_device)
    assert torch.equal(video(moved), video(plain))
    assert all(used)
    assert len(used) > 500


def test_two_groups_are_on_the_device():
    """Catches rooms that grow with the network, and weights that stay there without being used."""
    student = network()
    block_bytes = sum(p.nbytes for p in student.blocks[0].parameters())
    groups = student.offload_blocks(CPU)
    assert 2 * block_bytes <= groups.device_bytes < 2.2 * block_bytes
    student.bring(1)
    in_rooms = []
    for number, block in enumerate(student.wan_blocks()):
        places = {p.untyped_storage().data_ptr() for p in block.parameters()}
        rooms = {room.untyped_storage().data_ptr() for room in groups.rooms}
        assert places <= rooms or not places & rooms
        in_rooms += [number] if places <= rooms else []
    assert in_rooms == [1, 2]  # the one that runs, and the next one on its way
    student.bring(4)
    assert [i for i, group in enumerate(groups.groups) if group.room is not None] == [0, 4]


def test_copies_and_products_wait_for_each_other(monkeypatch):
    """Catches a copy into a room in use, and a product of weights that have not arrived.

    The streams of a GPU are stand-ins that write down what they are told.
    """
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream):
        log.append(f"{stream.name} copies")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    groups = BlockGroups(network().wan_blocks(), CPU)
    groups.copying = Stream("side")
    copy = ["side waits for compute", "side copies"]
    groups.need(0)
    assert log == [*copy, "compute waits for side", *copy]
    log.clear()
    groups.need(0)
    assert not log
    groups.need(1)
    assert log == ["compute waits for side", *copy]  # it was on its way


def test_compiled_blocks_are_not_compiled_again():
    """Catches a program that holds on to the memory in which a weight was first seen."""
    torch._dynamo.reset()
    counter = CompileCounter()
    moved = network()
    moved.offload_blocks(CPU)
    moved.compile_blocks(backend=counter)
    plain = video(network())
    made = video(moved)
    assert counter.frame_count == 1
    assert torch.equal(made, plain)
    torch._dynamo.reset()


def test_groups_that_save_nothing_are_refused():
    """Catches two copies of all weights, one of them on the device."""
    with pytest.raises(OffloadError, match="5 blocks in groups of 3 are 2"):
        network().offload_blocks(CPU, 3)
