"""Calls over fixed memory make the plain path's frames, bit for bit; capture needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from test_fewer_passes import VARIANTS, stream_model
from tiny_models import tiny_network

from selfforcing_dfd import rng
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import UserError
from selfforcing_dfd.streaming.ring import Positions
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.streaming.static_calls import StaticStudent, check_static, with_graphs

SETTINGS = StreamSettings(sink_frames=2, window_frames=6)
RAMP = 4


def pair(
    model: StreamModel, settings: StreamSettings = SETTINGS, context: Any = None
) -> tuple[StreamSession, StreamSession]:
    """The same stream, plain and in fixed memory."""
    static = replace(model, calls="static")
    one, other = (StreamSession(each, "a disc", settings, context) for each in (model, static))
    assert isinstance(other._student, StaticStudent)
    return one, other


def go_on(sessions: tuple[StreamSession, StreamSession], num_chunks: int) -> None:
    """The next chunks of both are the same, and so is what they remember."""
    for _ in range(num_chunks):
        frames = [session.next_chunk().frames for session in sessions]
        assert torch.equal(*frames)
    one, other = (session._ring for session in sessions)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("positions", get_args(Positions))
def test_frames_are_the_plain_ones_while_the_window_fills_and_slides(positions):
    """Catches a slot, a position or a length that stays as it was when the call was first made.

    Over the ramp, the full window, a sink that moves, and every slot of the ring twice.
    """
    go_on(pair(stream_model(), replace(SETTINGS, positions=positions)), RAMP + 7)


@pytest.mark.parametrize("mode", ["recache", "flush", "keep"])
def test_frames_are_the_plain_ones_after_a_prompt_change(mode):
    """Catches the old prompt's text, and a commit under the wrong one."""
    sessions = pair(stream_model())
    go_on(sessions, RAMP + 2)
    for prompt in ("a cross", "a square"):
        for session in sessions:
            session.set_prompt(prompt, mode)
        go_on(sessions, 2)


@pytest.mark.parametrize("variant", ["first chunk in four", "no commit", "all at once"])
def test_frames_are_the_plain_ones_with_fewer_passes(variant):
    """Catches levels or passes that the fixed calls do not know."""
    model = stream_model(variant)
    go_on(pair(model, StreamSettings(sink_frames=2, window_frames=4)), 7)


def test_snapshots_resets_and_clips_are_the_plain_ones():
    """Catches fixed memory that is not filled again when the stream jumps."""
    model = stream_model()
    video = rng.uniform((1, 32, 48, 3), 0, "context").float()  # a short first chunk
    sessions = pair(model, SETTINGS, video)
    go_on(sessions, 3)
    moments = [session.snapshot() for session in sessions]
    for session in sessions:
        session.set_prompt("a cross")
    go_on(sessions, 3)
    for session, moment in zip(sessions, moments, strict=True):
        session.restore(moment)
    go_on(sessions, 2)
    for session in sessions:
        session.reset("a square", seed=4)
    go_on(sessions, 2)


def test_calls_are_few_and_none_is_new_once_the_window_is_full():
    """Catches a graph that is captured for a chunk, a slot or a prompt, and so in mid-stream."""
    model = stream_model("two steps")
    _, session = pair(model)
    static = session._student
    assert isinstance(static, StaticStudent)
    counts = []
    for chunk in range(RAMP + 5):
        if chunk > RAMP:
            session.set_prompt(("a cross", "a square")[chunk % 2], "keep")
        session.next_chunk()
        counts.append(static.num_programs)
    passes = len(model.ladder)
    # after the ramp the last commit pass is new: it is made before the next chunk
    assert counts[:RAMP] == [passes, *(passes * n + n - 1 for n in range(2, RAMP + 1))]
    assert counts[RAMP:] == [RAMP * (passes + 1)] * 5


def test_a_returned_flow_is_in_fixed_memory():
    """Catches a test path that hides what replay does: the next call writes over the last flow."""
    model = stream_model("two steps")
    _, session = pair(model)
    static = session._student
    assert isinstance(static, StaticStudent)
    context = session._ring.read(2)
    x = rng.normal((1, 2, 16, 4, 6), 0, "x")
    with torch.inference_mode():
        one = static(x, 1.0, session._conditioning, context).flow
        kept = one.clone()
        other = static(2 * x, 1.0, session._conditioning, context).flow
        assert one.data_ptr() == other.data_ptr()
        assert not torch.equal(kept, other)
        assert torch.equal(static(x, 1.0, session._conditioning, context).flow, kept)


def test_given_frames_take_the_plain_call():
    """Catches frames of several noise levels that are called as if they had one."""
    model = replace(stream_model("two steps"), given=1)
    video = rng.uniform((1, 32, 48, 3), 0, "picture").float()
    go_on(pair(model, SETTINGS, video), 3)


def test_graphs_are_refused_where_they_cannot_be(tmp_path, capsys):
    """Catches an option that is taken and does nothing, or fails within the first chunk."""
    with pytest.raises(UserError, match=r"the student is on cpu; drop it, or use --device cuda"):
        with_graphs(stream_model())
    out = ["--out", str(tmp_path / "s.y4m"), "--device", "cpu", "--chunks", "1"]
    assert main(["stream", "--cuda-graph", *out]) == 2
    assert main(["benchmark", "--cuda-graph", "--device", "cpu", "--quick"]) == 2
    assert capsys.readouterr().err.count("--cuda-graph captures the work of a GPU") == 2
    model = stream_model()
    pictured = tiny_network(
        in_channels=36, out_channels=16, image_dim=24, added_kv_proj_dim=32
    ).requires_grad_(False)
    with pytest.raises(UserError, match="for text-to-video students"):
        check_static(replace(model, student=pictured))
    with pytest.raises(UserError, match="drop it, or --offload"):
        check_static(replace(model, run_device=torch.device("cpu")))
    model.student.sequence_parallel = object()  # type: ignore[assignment]
    with pytest.raises(UserError, match="for one process"):
        check_static(model)


def test_every_variant_has_a_name():
    """Guards these tests themselves: a variant that was renamed would not be held against."""
    assert {"first chunk in four", "no commit", "all at once", "two steps"} <= set(VARIANTS)
