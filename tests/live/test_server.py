"""The live page's server, over real sockets, with a tiny random model."""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from tabs import SETTINGS, Tab, get, num_sessions, serving, wait_for
from tiny_models import tiny_network
from torch import Tensor
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from selfforcing_dfd.live import server
from selfforcing_dfd.live.web.messages import MAX_SEED, encode_jpeg
from selfforcing_dfd.streaming.session import PromptMode, StreamModel, StreamSession
from selfforcing_dfd.tiny.codec import TinyCodec, TinyDecoder
from selfforcing_dfd.tiny.text import TinyText

ASSETS = Path(__file__).parents[2] / "assets" / "tiny"


def make_model(**sizes: Any) -> StreamModel:
    """The real network, codec and text encoder, small, with random weights. Chunks of two latent
    frames; five words fit.
    """
    codec = TinyCodec.load(ASSETS / "codec.safetensors")
    student = tiny_network(in_channels=16, out_channels=16).requires_grad_(False)
    return replace(StreamModel(student, codec, TinyText(12, 5), (1.0, 0.625), 2, (4, 6)), **sizes)


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return make_model()


def alone(
    model: StreamModel,
    prompt: str,
    seed: int,
    num_chunks: int,
    change: tuple[int, str, PromptMode] | None = None,
) -> list[list[bytes]]:
    """The pictures of a session without a server. change: before which chunk, prompt, and mode."""
    session = StreamSession(model, prompt, replace(SETTINGS, seed=seed))
    chunks = []
    for index in range(num_chunks):
        if change is not None and index == change[0]:
            session.set_prompt(*change[1:])
        chunks.append([encode_jpeg(frame) for frame in session.next_chunk().frames.numpy()])
    return chunks


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
    """Catches a queue that grows while nobody looks, and one acknowledgement that lets more than
    one chunk through.
    """
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
    """Catches a stream that ends under the eyes of its viewer, and a viewer in a pause who is
    active.
    """
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
    """Catches a server that waits for ever, or keeps all that it could not send, behind a
    connection that takes nothing.
    """
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


BAD = {
    "no JSON": ("pause", "not JSON"),
    "nested too deep": ("[" * 9000, "not JSON"),
    "no object": ("[1]", "want an object"),
    "no type": ("{}", "type None"),
    "unknown type": ('{"type": "rewind"}', "type 'rewind'"),
    "type is no string": ('{"type": ["ack"]}', "type ['ack']"),
    "field is missing": ('{"type": "prompt", "text": "a disc"}', "'text'; want 'text, mode'"),
    "field too many": ('{"type": "pause", "now": true}', "'now'; want 'nothing'"),
    "wrong mode": ('{"type": "prompt", "text": "a disc", "mode": "blend"}', "recache, flush, keep"),
    "text is a number": ('{"type": "prompt", "text": 3, "mode": "keep"}', "text is 3"),
    "text is too long": (
        json.dumps({"type": "prompt", "text": "x" * 2001, "mode": "keep"}),
        "at most 2,000 characters",
    ),
    "text is no text": ('{"type": "prompt", "text": "\\ud800", "mode": "keep"}', "surrogates"),
    "seed is a truth": ('{"type": "seed", "seed": true}', "seed is True"),
    "seed is negative": ('{"type": "seed", "seed": -1}', "seed is -1"),
    "seed is too large": (json.dumps({"type": "seed", "seed": MAX_SEED + 1}), f"0 to {MAX_SEED}"),
    "ack of a chunk to come": ('{"type": "ack", "chunk": 99}', "chunk is 99"),
    "second start": ('{"type": "start", "prompt": "a disc", "seed": 0}', "start after start"),
    "binary": (b"\x00\x01", "2 bytes of binary data"),
    "too large": (json.dumps({"type": "pause", "x": "y" * 17_000}), "at most 16,384"),
}


def test_bad_messages_are_refused_one_by_one(model):
    """Catches a message that is half obeyed, an error that does not say what is wrong, and a stream
    that such a one ends.
    """
    with serving(model, max_queue_chunks=1) as port, Tab(port).start() as tab:
        chunks = [tab.chunk(ack=False)]
        for name, (message, told) in BAD.items():
            tab.socket.send(message)
            error = tab.until("error")
            assert error["about"] == "message" and told in error["message"], (name, error)
        tab.send("ack", chunk=0)
        chunks.append(tab.chunk())
    assert [chunk.frames for chunk in chunks] == alone(model, "a disc", 0, 2)


def test_too_many_bad_messages_end_the_connection(model):
    """Catches a client that may go on with nonsense for ever, and one that is thrown out for a
    slip.
    """
    with serving(model) as port, Tab(port) as tab:
        for _ in range(20):
            tab.send("resume")
            assert "resume before start" in tab.until("error")["message"]
        tab.send("resume")
        code, reason = tab.closing()
        assert code == 1008 and "more than 20 bad messages" in reason


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1:1", "null", "http://127.0.0.1.evil.example"]
)
def test_page_of_another_site_may_not_connect(model, origin):
    """Catches a stream that any web page which the user visits could start, steer and watch."""
    with serving(model) as port:
        with pytest.raises(InvalidStatus, match="403"), Tab(port, {"origin": origin}):
            pass
        assert num_sessions(port) == 0
        with Tab(port, {"origin": f"http://127.0.0.1:{port}"}).start() as own:
            assert own.chunk().info["index"] == 0


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "[::1", "", "localhost@evil.example"]
)
def test_other_names_for_this_machine_are_refused(model, host):
    """Catches DNS rebinding: another site's name that is made to point here, with which its page
    would be our own.
    """
    with serving(model) as port:
        for path in ("/", "/healthz", "/page.js"):
            assert get(port, path, Host=host)[0] in (400, 403)
        assert get(port, "/healthz", Host="localhost:9")[0] == 200


def test_other_name_may_not_open_a_stream(model):
    """Catches a check of the Host that pages pass and streams do not have."""
    with serving(model) as port, socket.create_connection(("127.0.0.1", port)) as line:
        with pytest.raises(InvalidStatus, match="403"):
            connect("ws://evil.example/stream", sock=line)
        assert num_sessions(port) == 0


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
    """Catches a stream that ends, or goes on without a prompt, because the text encoder refused
    one.
    """
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


def test_reset_begins_anew_with_the_new_seed_and_prompt(model):
    """Catches remains of the old stream in the new one, and acknowledgements that are taken for the
    other stream's.
    """
    with serving(model, max_queue_chunks=1) as port, Tab(port).start() as tab:
        tab.chunk()
        tab.chunk(ack=False)
        tab.send("prompt", text="a cross", mode="keep")
        tab.send("seed", seed=7)
        tab.send("reset")
        assert tab.until("began") == {
            "type": "began",
            "prompt": "a cross",
            "seed": 7,
            "next_chunk": 2,
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
        begun = time.monotonic()
        assert num_sessions(port) == 1
        assert time.monotonic() - begun < 0.8  # of the second that the text takes
        tab.until("began")
        assert time.monotonic() - begun > 0.8


def test_page_is_whole_and_needs_no_other_site(model):
    """Catches a file that is not served or not installed, and a page that calls elsewhere."""
    with serving(model, examples=["a disc"], name="a name") as port, Tab(port) as tab:
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
    assert set(pages) == {"/", "/page.css", "/page.js", "/player.js", "/graph.js"}
    assert {url for text in pages.values() for url in re.findall(r"https?://[\w.]+", text)} <= {
        "http://www.w3.org"
    }
    assert (hello["examples"], hello["model"], hello["visible_frames"]) == (["a disc"], "a name", 6)


def test_figures_are_those_of_the_stream(model):
    """Catches a rate from the time of computing alone, one that is a mean of rates, and stages that
    exceed the whole.
    """
    infos: list[dict[str, Any]] = []
    with serving(model, max_queue_chunks=1) as port, Tab(port) as tab:
        begun = time.monotonic()
        tab.start()
        for _ in range(12):
            infos.append(tab.chunk(ack=False).info)
            time.sleep(0.05)
            tab.send("ack", chunk=infos[-1]["chunk"])
        wall_s = time.monotonic() - begun
    num_frames = [info["num_frames"] for info in infos]
    assert num_frames == [5] + [8] * 11
    assert infos[0]["fps"] is None
    assert sum(num_frames[1:]) / wall_s < infos[-1]["fps"] < sum(num_frames[1:]) / (11 * 0.05)
    assert all(0 < sum(info["stages_ms"].values()) <= info["latency_ms"] for info in infos[1:])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"fps": 0.0}, "fps"),
        ({"max_sessions": 0}, "max_sessions"),
        ({"idle_s": 0}, "idle_s"),
        ({"max_queue_chunks": 0}, "max_queue"),
    ],
)
def test_wrong_options_are_refused_at_once(model, wrong, told):
    """Catches a server that starts and then fails for every viewer."""
    with pytest.raises(ValueError, match=told):
        server.create_app(model, SETTINGS, **{"fps": 16.0, **wrong})
    with pytest.raises(ValueError, match="sink_frames is 3"):
        server.create_app(model, replace(SETTINGS, sink_frames=3), fps=16.0)


def test_port_in_use_is_told(model):
    """Catches a traceback, or a server that ends without a word."""
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="choose another port"),
    ):
        server.serve(server.create_app(model, SETTINGS, fps=16.0), port=taken.getsockname()[1])
