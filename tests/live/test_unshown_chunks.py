"""A new prompt takes back the chunks that nobody has seen."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from tabs import SETTINGS, Tab, alone, make_model, serving

from selfforcing_dfd.streaming.session import PromptMode, Snapshot, StreamModel, StreamSession


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return make_model()


@pytest.mark.parametrize("mode", ["recache", "flush", "keep"])
def test_a_prompt_follows_the_chunk_on_the_screen(model: StreamModel, mode: PromptMode):
    """Catches a prompt that waits for unseen chunks, and a state that a restore leaves behind.

    Of 3 chunks that were sent, chunk 4 is on the screen. Chunks 5 and 6 are dropped, and chunk 5 is
    made again, with the bits of a stream that was never ahead.
    """
    with serving(model, max_queue_chunks=3) as port, Tab(port).start() as tab:
        seen = [tab.chunk().frames for _ in range(4)]
        tab.until("chunk"), tab.until("chunk"), tab.until("chunk")
        tab.send("prompt", text="a cross", mode=mode)
        taken = tab.until("prompt")
        assert (taken["keep"], taken["from_chunk"]) == (4, 7)
        later = [tab.chunk(ack=False) for _ in range(2)]
    wanted = alone(model, "a disc", 0, 7, (5, "a cross", mode))
    assert seen == wanted[:4]
    assert [chunk.info["chunk"] for chunk in later] == [7, 8]
    assert [chunk.info["index"] for chunk in later] == [5, 6]
    assert [chunk.info["prompt"] for chunk in later] == ["a cross", "a cross"]
    assert [chunk.frames for chunk in later] == wanted[5:]


def test_frames_before_the_new_prompt_are_those_of_one_chunk_at_most(model):
    """Catches a queue that is shown before the prompt, wherever the viewer is in a chunk."""
    for num_seen in range(3):
        with serving(model, max_queue_chunks=3) as port, Tab(port).start() as tab:
            for _ in range(num_seen):
                tab.chunk()
            sent = [tab.until("chunk") for _ in range(3)]
            tab.send("prompt", text="a cross", mode="recache")
            taken = tab.until("prompt")
            before = [info for info in sent if info["chunk"] <= taken["keep"]]
            assert [info["chunk"] for info in before] == [num_seen]
            assert sum(info["num_frames"] for info in before) <= 8
            assert tab.until("chunk")["prompt"] == "a cross"


def test_a_second_prompt_takes_the_first_ones_chunks_back(model):
    """Catches a prompt that nobody saw and that stays in the context."""
    with serving(model, max_queue_chunks=2) as port, Tab(port).start() as tab:
        tab.chunk()
        tab.until("chunk"), tab.until("chunk")
        tab.send("prompt", text="a square", mode="recache")
        tab.chunk(ack=False)
        tab.send("prompt", text="a cross", mode="keep")
        assert tab.until("prompt")["keep"] == 1
        again = tab.chunk()
    assert again.info["index"] == 2
    assert again.frames == alone(model, "a disc", 0, 3, (2, "a cross", "keep"))[2]


def test_a_refused_prompt_drops_nothing(model):
    """Catches chunks that are lost for a prompt that the model does not take."""
    with serving(model, max_queue_chunks=2) as port, Tab(port).start() as tab:
        tab.chunk(ack=False), tab.chunk(ack=False)
        tab.send("prompt", text="one two three four five six", mode="keep")
        assert "6 words, 5 fit" in tab.until("error")["message"]
        tab.send("ack", chunk=1)
        assert tab.chunk().frames == alone(model, "a disc", 0, 3)[2]


def test_a_prompt_right_after_a_reset_stays_in_the_new_stream(model):
    """Catches a restore to a moment of the stream before."""
    with serving(model, max_queue_chunks=2) as port, Tab(port).start() as tab:
        tab.chunk(), tab.chunk(ack=False), tab.chunk(ack=False)
        tab.send("reset")
        tab.send("prompt", text="a cross", mode="recache")
        assert tab.until("began")["next_chunk"] == 3
        assert tab.until("prompt")["keep"] == 2
        tab.send("ack", chunk=2)
        assert tab.chunk().frames == alone(model, "a cross", 0, 1)[0]


@pytest.mark.parametrize("max_queue_chunks", [1, 2, 3])
def test_as_few_states_are_kept_as_prompts_may_need(model, monkeypatch, max_queue_chunks):
    """Catches a copy of the context for every chunk, which at Wan's size takes gigabytes each."""
    taken: list[weakref.ref[torch.Tensor]] = []
    counts = [0]
    take = StreamSession.snapshot

    def counted(session: StreamSession) -> Snapshot:
        snapshot = take(session)
        taken.append(weakref.ref(snapshot.ring.buffers[0]))
        counts.append(sum(ref() is not None for ref in taken))
        return snapshot

    monkeypatch.setattr(StreamSession, "snapshot", counted)
    with serving(model, max_queue_chunks=max_queue_chunks) as port, Tab(port).start() as tab:
        for _ in range(6):
            chunk = tab.until("chunk")["chunk"]
            tab.num_waiting_chunks(0.1)
            tab.send("ack", chunk=chunk)
    assert max(counts) == max_queue_chunks - 1


def test_a_session_goes_back_and_keeps_the_prompt_that_waits(model):
    """Catches a restore that forgets what was asked for, and a plain one that does not."""
    session = StreamSession(model, "a disc", replace(SETTINGS, seed=1))
    session.next_chunk()
    moment = session.snapshot()
    session.next_chunk()
    session.set_prompt("a cross", "recache")
    session.restore(moment, keeps_prompt=True)
    kept = session.next_chunk().frames
    assert session.prompt == "a cross"
    session.set_prompt("a square", "recache")
    session.restore(moment)
    assert not torch.equal(session.next_chunk().frames, kept)
    assert session.prompt == "a disc"
