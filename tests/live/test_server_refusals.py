"""What the live page's server refuses: messages, other sites, host names, and wrong options."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace

import pytest
from starlette.websockets import WebSocketDisconnect
from tabs import SETTINGS, Tab, alone, get, make_model, num_sessions, serving
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from selfforcing_dfd.live import server
from selfforcing_dfd.live.web.connection import taken
from selfforcing_dfd.live.web.messages import MAX_SEED
from selfforcing_dfd.live.web.shared import Student
from selfforcing_dfd.streaming.session import StreamModel


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return make_model()


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
    "student is a number": ('{"type": "student", "name": 1}', "name is 1"),
    "ack of a chunk to come": ('{"type": "ack", "chunk": 99}', "chunk is 99"),
    "second start": ('{"type": "start", "prompt": "a disc", "seed": 0}', "start after start"),
    "binary": (b"\x00\x01", "2 bytes of binary data"),
    "too large": (json.dumps({"type": "pause", "x": "y" * 17_000}), "at most 16,384"),
}


def test_bad_messages_are_refused_one_by_one(model):
    """Catches a half-obeyed message, an unclear error, and a bad message that ends the stream."""
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
    """Catches a client that may send nonsense for ever, and one that is cut off for one mistake."""
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
    """Catches DNS rebinding: another site's name that points to this machine.

    With it, that site's page could use our server.
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
        server.create_app({"only": Student(model, SETTINGS)}, **{"fps": 16.0, **wrong})
    with pytest.raises(ValueError, match="sink_frames is 3"):
        server.create_app({"only": Student(model, replace(SETTINGS, sink_frames=3))}, fps=16.0)
    with pytest.raises(ValueError, match="there are no students"):
        server.create_app({}, fps=16.0)


def test_port_in_use_is_told(model):
    """Catches a traceback, a server that ends without a word, and a link that leads nowhere."""
    app = server.create_app({"only": Student(model, SETTINGS)}, fps=16.0)
    told: list[str] = []
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="choose another port"),
    ):
        server.serve(app, port=taken.getsockname()[1], ready=lambda: told.append("open me"))
    assert told == []


def test_a_connection_that_the_server_closed_takes_nothing():
    """Catches an ASGI server's RuntimeError in the log, and one of our own that is swallowed."""

    async def refuse(message: str) -> None:
        raise RuntimeError(message)

    with pytest.raises(WebSocketDisconnect):
        asyncio.run(taken(refuse("Unexpected 'websocket.send', after sending 'websocket.close'.")))
    with pytest.raises(RuntimeError, match="of our own"):
        asyncio.run(taken(refuse("of our own")))
