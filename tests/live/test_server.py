"""The live page's server, over real sockets, with a tiny random model."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pytest
import torch
from tabs import ASSETS, Tab, alone, get, make_model, num_sessions, serving, wait_for
from tiny_models import tiny_network
from torch import Tensor

from selfforcing_dfd.live import server
from selfforcing_dfd.streaming.session import StreamModel
from selfforcing_dfd.tiny.codec import TinyCodec, TinyDecoder
from selfforcing_dfd.tiny.text import TinyText


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return make_model()


def test_two_tabs_are_two_streams(model):
    """Catches state that sessions share: noise, cache, prompt, or frames sent to the wrong tab."""
    with (
        serving(model) as port,
        Tab(port).start("a disc", 1) as one,
        Tab(port).start("a cross", 2) as other,
    ):
        both = [(one.chunk(), other.chunk()) for _ in range(5)]
    assert [first.frames for first, _ in both] == alone(model, "a disc", 1, 5)
    assert [second.frames for _, second in both] == alone(model, "a cross", 2, 5)


def test_tab_beyond_the_limit_is_refused(model):
    """Catches memory that any number of tabs takes; and a refusal that hits those who are in."""
    with serving(model, max_sessions=1) as port, Tab(port).start() as first:
        with Tab(port) as second:
            code, reason = second.closing()
        assert code == 1013 and "1 other stream is running" in reason
        assert first.chunk().info["index"] == 0
        assert num_sessions(port) == 1


def test_tab_that_leaves_makes_room(model):
    """Catches slots that are lost, whether a tab says goodbye or its machine is switched off."""
    with serving(model, max_sessions=1) as port:
        with Tab(port).start() as polite:
            polite.chunk()
        wait_for(lambda: num_sessions(port) == 0)
        with Tab(port).start() as abrupt:
            abrupt.chunk()
            abrupt.socket.socket.shutdown(socket.SHUT_RDWR)
            wait_for(lambda: num_sessions(port) == 0)
        with Tab(port).start() as third:
            assert third.chunk().info["index"] == 0


def test_viewer_who_acknowledges_nothing_stops_generation(model):
    """Catches a queue that grows without a viewer, and an acknowledgement that counts twice."""
    with serving(model, max_queue_chunks=3) as port, Tab(port).start() as tab:
        assert tab.num_waiting_chunks() == 3
        tab.send("ack", chunk=0)
        assert tab.num_waiting_chunks() == 1
        tab.send("ack", chunk=0)
        assert tab.num_waiting_chunks() == 0
        tab.send("ack", chunk=3)
        assert tab.num_waiting_chunks() == 3


@pytest.mark.parametrize(
    ("preparation", "why"),
    [([], "not started"), (["start"], "not watched"), (["start", "pause"], "paused")],
)
def test_idle_tab_is_ended(model, preparation, why):
    """Catches forgotten tabs that hold a slot and its memory for ever."""
    with serving(model, idle_s=0.3) as port, Tab(port) as tab:
        for kind in preparation:
            tab.send(kind, **({"prompt": "a disc", "seed": 0} if kind == "start" else {}))
        assert why in tab.until("ended")["message"]
        assert tab.closing()[0] == 1001
        wait_for(lambda: num_sessions(port) == 0)


def test_watched_tab_is_not_idle(model):
    """Catches a stream that ends while it is watched, and a paused viewer who counts as active."""
    with serving(model, idle_s=0.5) as port, Tab(port).start() as tab:
        for _ in range(4):
            tab.chunk()
            time.sleep(0.2)
        tab.send("pause")
        for seed in range(4):
            tab.send("seed", seed=seed)
            time.sleep(0.2)
        tab.send("resume")
        assert tab.chunk(ack=False).info["index"] == 4


def test_viewer_who_reads_nothing_is_ended():
    """Catches a server that waits for ever, or keeps all data, for a client that reads nothing."""
    large = make_model(
        student=tiny_network(dtype=torch.float32, in_channels=16, out_channels=16),
        latent_size=(32, 32),
    )
    with serving(large, idle_s=0.5, max_queue_chunks=1000) as port, socket.socket() as narrow:
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.connect(("127.0.0.1", port))
        with Tab(port, {"sock": narrow, "max_queue": 1, "close_timeout": 0.1}).start():
            assert num_sessions(port) == 1
            wait_for(lambda: num_sessions(port) == 0)


def test_prompt_holds_from_the_next_chunk(model):
    """Catches a prompt that comes late, or only says that it came."""
    with serving(model, max_queue_chunks=1) as port, Tab(port).start() as tab:
        chunks = [tab.chunk(), tab.chunk(ack=False)]
        tab.send("prompt", text="a cross", mode="keep")
        assert tab.until("prompt")["from_chunk"] == 2
        tab.send("ack", chunk=1)
        chunks += [tab.chunk(), tab.chunk()]
    assert [chunk.info["prompt"] for chunk in chunks] == ["a disc", "a disc", "a cross", "a cross"]
    assert [chunk.frames for chunk in chunks] == alone(
        model, "a disc", 0, 4, (2, "a cross", "keep")
    )
    assert [chunk.frames for chunk in chunks] != alone(
        model, "a disc", 0, 4, (2, "a cross", "recache")
    )


def test_wrong_prompt_changes_nothing(model):
    """Catches a refused prompt that ends the stream or leaves it without a prompt."""
    with serving(model) as port, Tab(port) as tab:
        tab.send("start", prompt="one two three four five six", seed=0)
        assert "6 words, 5 fit" in tab.until("error")["message"]
        tab.start("a disc", 0)
        first = tab.chunk(ack=False)
        tab.send("prompt", text="one two three four five six", mode="recache")
        error = tab.until("error")
        assert error["about"] == "prompt" and "6 words, 5 fit" in error["message"]
        tab.send("ack", chunk=first.info["chunk"])
        assert tab.until("chunk")["prompt"] == "a disc"


def test_pause_stops_and_resume_goes_on(model):
    """Catches chunks that are made or lost in a pause."""
    with serving(model, max_queue_chunks=1) as port, Tab(port).start() as tab:
        chunks = [tab.chunk(ack=False)]
        tab.send("pause")
        assert tab.until("state")["paused"]
        tab.send("ack", chunk=0)
        assert tab.num_waiting_chunks() == 0
        tab.send("resume")
        assert not tab.until("state")["paused"]
        chunks += [tab.chunk(), tab.chunk()]
    assert [chunk.frames for chunk in chunks] == alone(model, "a disc", 0, 3)


def test_reset_starts_again_with_the_new_seed_and_prompt(model):
    """Catches remains of the old stream in the new one, and its acknowledgements in the new one."""
    with serving(model, max_queue_chunks=1) as port, Tab(port).start() as tab:
        tab.chunk()
        tab.chunk(ack=False)
        tab.send("prompt", text="a cross", mode="keep")
        tab.send("seed", seed=7)
        tab.send("reset")
        assert tab.until("began") == {
            "type": "began",
            "student": "only",
            "prompt": "a cross",
            "seed": 7,
            "next_chunk": 2,
            "has_picture": False,
            "unknown": [],
            "first": "a cross",
            "changes": [],
            "num_coming": 0,
        }
        tab.send("ack", chunk=1)
        chunks = [tab.chunk(), tab.chunk()]
    assert [(chunk.info["chunk"], chunk.info["index"]) for chunk in chunks] == [(2, 0), (3, 1)]
    assert [chunk.frames for chunk in chunks] == alone(model, "a cross", 7, 2)


@dataclass(slots=True)
class Watched:
    """A codec that notes whose chunk is decoded."""

    codec: TinyCodec
    order: list[int] = field(default_factory=list)
    num_decoders: int = 0
    channels = TinyCodec.channels
    strides = TinyCodec.strides

    def start_decoding(self) -> WatchedDecoder:
        self.num_decoders += 1
        return WatchedDecoder(self.codec.start_decoding(), self.num_decoders, self.order)

    def start_encoding(self) -> Any:
        return self.codec.start_encoding()


@dataclass(slots=True)
class WatchedDecoder:
    decoder: TinyDecoder
    number: int
    order: list[int]

    def decode(self, latents: Tensor) -> Tensor:
        self.order.append(self.number)
        return self.decoder.decode(latents)

    def clone(self) -> WatchedDecoder:
        return WatchedDecoder(self.decoder.clone(), self.number, self.order)


def test_sessions_take_turns(model):
    """Catches a stream that keeps the device to itself while another one waits."""
    watched = Watched(TinyCodec.load(ASSETS / "codec.safetensors"))
    with (
        serving(make_model(codec=watched), max_queue_chunks=15) as port,
        Tab(port) as one,
        Tab(port) as other,
    ):
        one.start(), other.start()
        one.num_waiting_chunks(), other.num_waiting_chunks()
    shared = watched.order[
        watched.order.index(2) : len(watched.order) - watched.order[::-1].index(1)
    ]
    longest = max(len(list(run)) for _, run in groupby(shared))
    assert sorted(watched.order) == [1] * 30 + [2] * 30  # two latent frames a chunk
    # chunks in a row; strict turns but for the moment in which a tab's next job is on its way
    assert longest <= 3 * 2


class SlowText(TinyText):
    def encode(self, captions: list[str]) -> Tensor:
        time.sleep(1.0)
        return super().encode(captions)


def test_server_answers_while_it_computes(model):
    """Catches a computation on the event loop, which would stop all pages at once."""
    with serving(make_model(text=SlowText(12, 5))) as port, Tab(port) as tab:
        tab.send("start", prompt="a disc", seed=0)
        started = time.monotonic()
        assert num_sessions(port) == 1
        assert time.monotonic() - started < 0.8  # of the second that the text takes
        tab.until("began")
        assert time.monotonic() - started > 0.8


def test_page_is_whole_and_needs_no_other_site(model):
    """Catches a file that is not served or not installed, and a page that calls elsewhere."""
    with serving({"a name": model}, examples=["a disc"]) as port, Tab(port) as tab:
        hello = tab.until("hello")
        pages = {"/": get(port, "/")[1]}
        while found := {
            f"/{name}"
            for text in pages.values()
            for name in re.findall(r'"(?:\./)?(\w+\.(?:js|css))"', text)
        } - set(pages):
            for path in found:
                status, pages[path] = get(port, path)
                assert status == 200, path
        assert get(port, "/viewer.py")[0] == 404
    assert set(pages) == set(server.PAGES)
    assert {url for text in pages.values() for url in re.findall(r"https?://[\w.]+", text)} <= {
        "http://www.w3.org"
    }
    (student,) = hello["students"]
    assert hello["examples"] == ["a disc"]
    assert (student["name"], student["visible_frames"]) == ("a name", 6)


def test_figures_are_those_of_the_stream(model):
    """Catches a rate of computing time alone, a mean of rates, and stages above the whole."""
    infos: list[dict[str, Any]] = []
    with serving(model, max_queue_chunks=1) as port, Tab(port) as tab:
        started = time.monotonic()
        tab.start()
        for _ in range(12):
            infos.append(tab.chunk(ack=False).info)
            time.sleep(0.05)
            tab.send("ack", chunk=infos[-1]["chunk"])
        wall_s = time.monotonic() - started
    num_frames = [info["num_frames"] for info in infos]
    assert num_frames == [5] + [8] * 11
    assert infos[0]["fps"] is None
    assert sum(num_frames[1:]) / wall_s < infos[-1]["fps"] < sum(num_frames[1:]) / (11 * 0.05)
    assert all(0 < sum(info["stages_ms"].values()) <= info["latency_ms"] for info in infos[1:])
