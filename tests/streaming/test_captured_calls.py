"""What a captured graph repeats is the plain call, chunk after chunk: graphs emulated on the CPU.

An emulated graph is the list of the operators that a call ran, with the very tensors and numbers
that it ran them on. A replay runs them again on these, and what they left is made useless after it.
So whatever is not in fixed memory stays as it was at capture, as in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_fewer_passes import VARIANTS, stream_model
from test_static_calls import RAMP, SETTINGS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfforcing_dfd import rng
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.streaming.static_calls import StaticStudent

QUICK = ("first chunk in four", "no commit, kept noise")
SLOW = [name for name in VARIANTS if name not in QUICK]


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Graph(TorchDispatchMode):
    """Operators as they ran, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        new = [x for x in tensors(result) if x.untyped_storage().data_ptr() not in given]
        self.nodes.append((func, args, kwargs or {}, new))
        return result

    def replay(self) -> None:
        for func, args, kwargs, new in self.nodes:
            again = tensors(func(*args, **kwargs))
            for tensor, value in zip(new, again, strict=bool(new)):
                tensor.copy_(value)
        for *_, new in self.nodes:
            for tensor in new:  # another graph has this memory next
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


def capture(
    student: StaticStudent, call: Callable[[], Tensor], flow: Tensor
) -> Callable[[], Tensor]:
    """In place of `StaticStudent._captured`."""
    call()
    graph = Graph()
    with graph:
        call()
    flow.fill_(float("nan"))  # nothing is computed while a graph is captured

    def replay() -> Tensor:
        graph.replay()
        return flow

    return replay


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StaticStudent, "_captured", capture)


def pair(
    model: StreamModel, settings: StreamSettings = SETTINGS, context: Tensor | None = None
) -> tuple[StreamSession, StreamSession]:
    """The same stream, plain and by graphs, with a host that runs ahead as beside a GPU."""
    graphs = replace(model, calls="graph")
    one, other = (StreamSession(each, "a disc", settings, context) for each in (model, graphs))
    other._host_runs_ahead = True
    return one, other


def go_on(sessions: tuple[StreamSession, StreamSession], num_chunks: int) -> None:
    """The next chunks of both are the same."""
    for _ in range(num_chunks):
        assert torch.equal(*(session.next_chunk().frames for session in sessions))


@pytest.mark.parametrize(
    "variant", [*QUICK, *(pytest.param(name, marks=pytest.mark.soak) for name in SLOW)]
)
def test_replayed_chunks_are_the_plain_ones(variant):
    """Catches a number in a captured call: a slot, a position, a length, a level, a prompt's text.

    While the window fills and slides by twice its length, under every kind of prompt change.
    """
    model = stream_model(variant)
    sessions = pair(model, StreamSettings(sink_frames=2, window_frames=4))
    go_on(sessions, 12 // model.chunk_frames + 2)
    for mode in ("recache", "flush", "keep"):
        for session in sessions:
            session.set_prompt(f"a cross {mode}", mode)
        go_on(sessions, 2)


@pytest.mark.parametrize("positions", ["absolute", "window_relative"])
def test_replayed_chunks_are_the_plain_ones_at_other_positions(positions):
    """Catches rotary tables that are captured."""
    go_on(pair(stream_model("two steps"), replace(SETTINGS, positions=positions)), RAMP + 6)


@pytest.mark.parametrize("given", [0, 1])
def test_replayed_chunks_follow_every_jump(given):
    """Catches a stream that jumps while its graphs stay: clips, snapshots, resets, another text."""
    model = replace(stream_model("two steps"), given=given)
    video = rng.uniform((5, 32, 48, 3), 0, "context").float()  # the last chunk of it is short
    sessions = pair(model, SETTINGS, video)
    go_on(sessions, 3)
    moments = [session.snapshot() for session in sessions]
    for session in sessions:
        session.set_prompt("a cross")
    go_on(sessions, 4)
    for session, moment in zip(sessions, moments, strict=True):
        session.restore(moment)
    go_on(sessions, 2)
    for session in sessions:
        session.reset("a square", seed=4)
    go_on(sessions, RAMP + 2)


def test_a_graph_of_numbers_would_be_seen():
    """Guards these tests themselves: an emulated graph has to repeat what it was captured with."""
    x = torch.ones(2)
    flow = torch.zeros(2)
    shift = 1.0

    def call() -> Tensor:
        return flow.copy_(x * 2 + shift)

    student: Any = None
    replay = capture(student, call, flow)
    x.fill_(5)
    shift = 100.0
    assert replay().tolist() == [11, 11]
