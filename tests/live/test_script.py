"""Links that tell a stream again, with its later prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tabs import SETTINGS, Tab, make_model, serving

from selfforcing_dfd.live.web.messages import BadMessage, encode_jpeg, parse_message
from selfforcing_dfd.live.web.script import MAX_CHANGES, Change, Script
from selfforcing_dfd.streaming.session import StreamModel, StreamSession

MODES = ("recache", "keep", "flush")


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return make_model()


def change(chunk: int, text: str = "a cross", mode: str = "recache") -> dict[str, Any]:
    return {"chunk": chunk, "text": text, "mode": mode}


def begin(tab: Tab, *changes: dict[str, Any]) -> dict[str, Any]:
    """Start as a link does; what the server says of it."""
    tab.send("start", prompt="a disc", seed=3, changes=changes)
    return tab.until("began")


def told_again(model: StreamModel, changes: list[dict[str, Any]], num_chunks: int) -> list[Any]:
    """What a session without a server makes of a link."""
    session = StreamSession(model, "a disc", replace(SETTINGS, seed=3))
    texts = {each["chunk"]: (each["text"], each["mode"]) for each in changes}
    chunks = []
    for index in range(num_chunks):
        if index in texts:
            session.set_prompt(*texts[index])
        chunks.append([encode_jpeg(frame) for frame in session.next_chunk().frames.numpy()])
    return chunks


@pytest.mark.parametrize("max_queue_chunks", [1, 2, 3])
def test_a_link_tells_the_stream_again_to_the_bit(model, max_queue_chunks):
    """Catches a link that knows the newest prompt alone, or chunks that were taken back.

    Prompts come while chunks are ahead of the one on the screen, and twice at one chunk.
    """
    shown = {}
    with serving(model, max_queue_chunks=max_queue_chunks) as port:
        with Tab(port).start("a disc", 3) as tab:
            for prompts in (["a cross"], [], ["a square", "a disc"], ["a cross"], []):
                chunks = [tab.chunk(ack=False) for _ in range(max_queue_chunks)]
                for text in prompts:
                    tab.send("prompt", text=text, mode=MODES[len(shown) % 3])
                    taken = tab.until("prompt")
                    assert taken["keep"] == chunks[0].info["chunk"]
                    chunks = chunks[:1]
                shown |= {chunk.info["index"]: chunk.frames for chunk in chunks}
                tab.send("ack", chunk=chunks[-1].info["chunk"])
            changes = taken["changes"]
        with Tab(port) as again:
            began = begin(again, *changes)
            frames = [again.chunk().frames for _ in shown]
    assert len(changes) == began["num_coming"] == 3
    assert frames == told_again(model, changes, len(shown))
    assert shown == dict(enumerate(frames))


def test_a_prompt_takes_the_place_of_those_to_come(model):
    """Catches a link that goes on steering after its viewer has begun to."""
    with serving(model, max_queue_chunks=2) as port, Tab(port) as tab:
        begin(tab, change(1), change(3, "a square"), change(5))
        tab.chunk()
        planned = tab.until("prompt")
        assert planned["is_planned"] and planned["text"] == "a cross"
        tab.until("chunk"), tab.until("chunk")
        tab.send("prompt", text="a disc", mode="keep")
        taken = tab.until("prompt")
        assert not taken["is_planned"]
        assert taken["changes"] == [change(1), change(2, "a disc", "keep")]
        infos = [tab.chunk().info for _ in range(5)]
    assert [info["prompt"] for info in infos] == ["a disc"] * 5
    assert infos[0]["index"] == 2


def test_a_reset_begins_without_later_prompts(model):
    """Catches prompts of the stream before, in the new one or in its link."""
    with serving(model, max_queue_chunks=1) as port, Tab(port) as tab:
        begin(tab, change(1), change(3, "a square"))
        tab.chunk(), tab.chunk(ack=False)
        tab.send("reset")
        began = tab.until("began")
        assert (began["first"], began["changes"], began["num_coming"]) == ("a cross", [], 0)
        tab.send("ack", chunk=1)
        assert {tab.chunk().info["prompt"] for _ in range(4)} == {"a cross"}


def test_a_prompt_that_the_model_refuses_is_left_out(model):
    """Catches a stream that ends with a link that somebody has mistyped."""
    with serving(model, max_queue_chunks=1) as port, Tab(port) as tab:
        begin(tab, change(1, "one two three four five six"), change(2))
        tab.chunk()
        assert "6 words, 5 fit" in tab.until("error")["message"]
        tab.chunk()
        assert tab.until("prompt")["changes"] == [change(2)]
        assert tab.chunk().info["prompt"] == "a cross"


BAD = [
    "x",
    {},
    [1],
    [{}],
    [{"said": "x"}],
    [change(-1)],
    [change(1, mode="x")],
    [change(2), change(1)],
    [change(1), change(1)],
    [{**change(1), "more": 1}],
    [change(each) for each in range(MAX_CHANGES + 1)],
]


@pytest.mark.parametrize("changes", BAD)
def test_bad_scripts_are_refused_in_words(changes):
    """Catches a crash, or half a script that is played without a word."""
    start = {"type": "start", "prompt": "a disc", "seed": 0}
    assert "changes" not in parse_message(json.dumps(start)).fields
    with pytest.raises(BadMessage, match=r"start: changes is .*; want at most 50 of"):
        parse_message(json.dumps({**start, "changes": changes}))


def test_a_script_is_bounded():
    """Catches memory that grows with every prompt, and a link that lacks the oldest of them."""
    script = Script("a disc")
    for chunk in range(MAX_CHANGES):
        script.add(Change(chunk, "a cross", "keep"), is_asked=True)
    assert script.told() == [change(each, mode="keep") for each in range(MAX_CHANGES)]
    script.add(Change(MAX_CHANGES, "a cross", "keep"), is_asked=True)
    assert script.told() is None and len(script.past) == MAX_CHANGES
