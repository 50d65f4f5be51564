"""The cost of a chunk once window and sink are full: no copies, no waiting for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import LADDER, tiny_network
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfforcing_dfd import rng
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

RAMP = 6  # K = 12 is full after four chunks of three
READS_BACK = (
    "item",
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique",
)
"""Operators whose result, or its size, the host must wait for."""

MAKES_A_VIEW = (
    "view",
    "select",
    "slice",
    "transpose",
    "unbind",
    "split",
    "alias",
    "as_strided",
    "expand",
    "detach",
)


@pytest.fixture(scope="module")
def model() -> StreamModel:
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0)
    student = tiny_network(dtype=torch.float32, in_channels=16, out_channels=16).requires_grad_(
        False
    )
    return StreamModel(student, codec, TinyText(12), LADDER, 3, (4, 6))


class Watcher(TorchDispatchMode):
    """Lists operators that read values back to the host, and readers of the given memory.

    Attention may read that memory and is not listed.
    """

    def __init__(self, stored: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.memory = {tensor.untyped_storage().data_ptr() for tensor in stored}
        self.read_back: list[str] = []
        self.readers: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS_BACK:
            self.read_back.append(name)
        written = name.endswith("_")  # in place: the first argument is a destination
        read = [part for part in args[written:] if isinstance(part, Tensor)]
        read += [
            part
            for parts in args
            if isinstance(parts, list | tuple)
            for part in parts
            if isinstance(part, Tensor)
        ]
        if not name.startswith(MAKES_A_VIEW) and any(
            t.untyped_storage().data_ptr() in self.memory for t in read
        ):
            self.readers.add(name)
        return func(*args, **(kwargs or {}))


def watched(session: StreamSession) -> Watcher:
    """Three chunks of the steady state."""
    for _ in range(RAMP):
        session.next_chunk()
    ring = session._ring
    with Watcher((ring.keys, ring.values)) as watcher:
        for _ in range(3):
            session.next_chunk()
    return watcher


@pytest.mark.parametrize(
    "settings",
    [StreamSettings(), StreamSettings(positions="absolute", sink_frames=0, window_frames=12)],
    ids=["moving sink", "no sink"],
)
def test_stored_keys_and_values_are_read_by_attention_only(model, settings):
    """Catches a cat, clone or contiguous of the K/V.

    It would cost memory and time that grow with the window.
    """
    watcher = watched(StreamSession(model, "a disc moves", settings))
    assert len(watcher.readers) == 1
    assert "attention" in watcher.readers.pop()


def test_nothing_waits_for_the_device(model):
    """Catches an `.item()`, a mask used as an index, or a comparison in Python (T9).

    Each of them empties a GPU's queue.
    """
    assert watched(StreamSession(model, "a disc moves")).read_back == []


def test_the_watcher_sees_what_it_is_for(model):
    """Catches a watcher that is blind: copies and read-backs of the same memory are found."""
    keys = StreamSession(model, "a disc moves")._ring.keys
    for context in (torch.no_grad, torch.inference_mode):
        with context(), Watcher((keys,)) as watcher:
            torch.cat([keys[0], keys[1]])
            bool(keys.sum() > 1)
        assert "cat" in watcher.readers
        assert watcher.read_back


def test_memory_of_the_past_stays_where_it_is(model):
    """Catches a ring that is allocated again.

    The three buffers stay the same over chunks, prompts and resets.
    """
    session = StreamSession(model, "a disc moves")
    ring = session._ring
    places = [tensor.data_ptr() for tensor in (ring.keys, ring.values, ring.home_keys)]
    for chunk in range(RAMP):
        session.set_prompt(
            ("a disc moves", "a cross moves")[chunk % 2], ("flush", "recache")[chunk % 2]
        )
        session.next_chunk()
    session.reset("a square moves")
    session.next_chunk()
    assert session._ring is ring
    assert [tensor.data_ptr() for tensor in (ring.keys, ring.values, ring.home_keys)] == places


def test_frames_are_the_callers_own(model):
    """Catches frames that refuse to be drawn on outside of inference mode."""
    frames = StreamSession(model, "a disc moves").next_chunk().frames
    frames[:, 0].fill_(255)
    assert not frames.is_inference()
