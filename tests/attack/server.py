"""The live page's server: requests that are none, messages that make no sense, sudden ends."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import socket
import struct
import time
from pathlib import Path

import uvicorn
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import ClientConnection, connect

from selfforcing_dfd.common import UserError
from selfforcing_dfd.live import server
from selfforcing_dfd.live.web.messages import FIELDS
from selfforcing_dfd.live.web.shared import Student
from tests.attack.harms import ABSURD
from tests.attack.trials import Kind, Tell, Wrong
from tests.live.tabs import SETTINGS, Tab, get, get_bytes, make_model, post

SEATS = 6
PATIENCE_S = 10.0
METHODS = ("GET", "POST", "HEAD", "PUT", "OPTIONS", "TRACE", "get", "", "\0", "G" * 5000)
PATHS = (
    *("/", "/healthz", "/stream", "/page.js", "/../../etc/passwd", "/%2e%2e/x", "//", "*", ""),
    *("/" + "a" * 9000, "/\r\nX: y", "/healthz?" + "q" * 3000, "http://evil/", "/größer"),
)
HEADERS = (
    *("Content-Length: -1", "Content-Length: 99999999", "Transfer-Encoding: chunked", "X", ": x"),
    *("Host: evil", "Host: a\r\nHost: b", "Origin: null", "X: " + "y" * 70_000, "\0: \0"),
    *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 99", "Expect: 100-x"),
    *("Sec-WebSocket-Key: x", "Range: bytes=5-1", "Range: bytes=0-0,1-1,2-2", "If-None-Match: *"),
)
UPGRADE = (
    "GET /stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Server(Kind):
    """Whatever one client does, the others are served as before."""

    name = "server"

    def prepare(self, folder: Path) -> None:
        self.errors = folder / "errors"
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=serve, args=(listener, self.errors), daemon=True)
        self.process.start()
        listener.close()
        with tab(self.port) as first:
            self.wanted = first.start().chunk().frames

    def close(self) -> None:
        self.process.terminate()
        self.process.join()

    def attack(self, chance: random.Random, place: Path, tell: Tell) -> None:
        harms = (raw_request, raw_frames, messages, messages, leave, upload, watch)
        refusal = chance.choice(harms)(self.port, chance, tell)
        self.check_alive()
        if chance.random() < 0.1:
            with tab(self.port) as other:
                if other.start().chunk().frames != self.wanted:
                    raise Wrong("another viewer gets other frames")
        if refusal:
            raise UserError(refusal)

    def check_alive(self) -> None:
        try:
            status, text = get(self.port, "/healthz")
        except OSError as error:
            raise Wrong(f"the server does not answer: {error}") from error
        if status != 200 or json.loads(text)["status"] != "ok":
            raise Wrong(f"the server is not well: {status} {text}")
        said = self.errors.read_text()
        if "Traceback" in said:
            self.errors.write_text("")
            raise Wrong(f"in the server's log: {said[-1500:]}")


def serve(listener: socket.socket, errors: Path) -> None:
    """The server, until it is ended; what it complains of goes to a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    app = server.create_app({"only": Student(make_model(), SETTINGS)}, fps=16.0, max_sessions=SEATS)
    uvicorn.Server(server.server_config(app)).run(sockets=[listener])


def tab(port: int) -> Tab:
    """A tab of a well-behaved browser, as soon as there is a seat for it."""
    end = time.monotonic() + PATIENCE_S
    while True:
        found = Tab(port)
        try:
            found.stream = found.until("hello")["stream"]
            return found
        except ConnectionClosed as error:
            if time.monotonic() > end:
                raise Wrong(f"no seat in {PATIENCE_S:g} s") from error
            time.sleep(0.05)


def answer(line: socket.socket, wait_s: float) -> str:
    """The first bytes of an answer; empty if the connection is closed, or nothing comes."""
    line.settimeout(wait_s)
    try:
        return line.recv(200).decode("latin-1")
    except OSError:
        return ""


def raw_request(port: int, chance: random.Random, tell: Tell) -> str:
    """Bytes that are hardly a request."""
    text = f"{chance.choice(METHODS)} {chance.choice(PATHS)} HTTP/{chance.choice(('1.1', '9', ''))}"
    headers = chance.sample(HEADERS, chance.randint(0, 4))
    if chance.random() < 0.7:
        headers.insert(0, f"Host: 127.0.0.1:{port}")
    data = "\r\n".join([text, *headers, "", chance.choice(("", "x" * 100))]).encode()
    if chance.random() < 0.3:
        place = chance.randrange(len(data))
        data = data[:place] + chance.randbytes(5) + data[place:]
    if chance.random() < 0.3:
        data = data[: chance.randrange(len(data))]
    tell(f"request {data[:80]!r}, {len(data)} bytes")
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as line:
        line.sendall(data)
        got = answer(line, 0.2)
    if got.startswith("HTTP/1.1 5"):
        raise Wrong(f"answered by {got[:60]}")
    return got[:60] if got.startswith("HTTP/1.1 4") else ""


def raw_frames(port: int, chance: random.Random, tell: Tell) -> str:
    """A WebSocket of which the frames are nonsense."""
    frames = b""
    for _ in range(chance.randint(1, 5)):
        first = chance.randrange(256)
        size = chance.choice((0, 1, 5, 125, 126, 127, 254, 255))
        frames += bytes((first, size)) + chance.randbytes(chance.choice((0, 2, 8, 12, 300)))
    tell(f"frames {frames[:60]!r}")
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as line:
        line.sendall(UPGRADE.format(port=port).encode())
        answer(line, PATIENCE_S)
        line.sendall(frames)
        answer(line, 0.1)
        if chance.random() < 0.5:
            reset(line)
    return ""


def messages(port: int, chance: random.Random, tell: Tell) -> str:
    """Messages of the right form and of the wrong one, in any order."""
    sent = [message(chance) for _ in range(chance.randint(1, 30))]
    tell(f"{len(sent)} messages, {[each[:50] for each in sent[:3]]}")
    try:
        with connect(f"ws://127.0.0.1:{port}/stream", max_size=None, max_queue=None) as line:
            for each in sent:
                line.send(each)
            return first_error(line)
    except (ConnectionClosed, InvalidHandshake) as error:
        return f"closed: {error}"


def message(chance: random.Random) -> str | bytes:
    kind = chance.choice((*FIELDS, "rewind"))
    fields = {name: value(form, chance) for name, form in FIELDS.get(kind, {}).items()}
    whole = {"type": kind, **fields}
    how = chance.random()
    if how < 0.1:
        return chance.randbytes(chance.choice((0, 1, 100, 300_000)))
    if how < 0.2:
        return chance.choice(("", "[" * 9000, "null", "1e999", '"x"', "{", "x" * 300_000))
    if how < 0.3:
        whole[chance.choice((*whole, "more"))] = chance.choice((*ABSURD, None, [], {}, 10**30))
    return json.dumps(whole)


def value(form: str, chance: random.Random) -> object:
    """What a field may hold, or nearly."""
    if chance.random() < 0.1:
        return chance.choice((*ABSURD, -1, 2**53, 0.5, True, "\ud800"))
    good = {"text": ("a disc", "", "only"), "number": (0, 1, 2), "mode": ("recache", "flush")}
    return chance.choice(good.get(form, ("keep",)))


def first_error(line: ClientConnection) -> str:
    """What the server says against the messages so far; empty if it has nothing to say."""
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        try:
            data = line.recv(0.1)
        except TimeoutError:
            continue
        if isinstance(data, str) and json.loads(data)["type"] == "error":
            return data
    return ""


def upload(port: int, chance: random.Random, tell: Tell) -> str:
    """A picture that is damaged, or is none, for a stream that runs or does not."""
    buffer = io.BytesIO()
    size = chance.choice(((1, 1), (64, 48), (3000, 2), (1, 9000)))
    mode = chance.choice(("RGB", "L", "1", "P", "RGBA", "CMYK", "I;16"))
    kind = "TIFF" if mode == "CMYK" else chance.choice(("PNG", "GIF"))
    Image.new(mode, size).save(buffer, "PNG" if mode == "I;16" else kind)
    data = bytearray(buffer.getvalue())
    for _ in range(chance.choice((0, 1, 20))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    data = data[: chance.choice((0, 10, len(data), len(data)))]
    tell(f"picture {kind} {mode} {size}, {len(data)} bytes")
    with tab(port) as owner:
        stream = chance.choice((owner.stream, owner.stream, "x"))
        if chance.random() < 0.5:
            owner.start()
        status, words = post(port, f"/picture?stream={stream}", bytes(data))
        if status >= 500:
            raise Wrong(f"answered by {status} {words}")
        owner.send("seed" if owner.has_begun else "student", **chance.choice(({}, {"name": "x"})))
        owner.until("error")
    return words


def watch(port: int, chance: random.Random, tell: Tell) -> str:
    """Viewers who watch, steer, save, and leave in the midst of a chunk."""
    with tab(port) as owner:
        path = f"/watch?stream={chance.choice((owner.stream, owner.stream, 'x'))}"
        watchers = [Tab(port, path=path) for _ in range(chance.randint(1, 5))]
        tell(f"{len(watchers)} watch {path}")
        owner.start()
        for watcher in watchers:
            try:
                watcher.socket.send(message(chance))
                watcher.until("chunk")
            except ConnectionClosed:
                continue
            if chance.random() < 0.5:
                reset(watcher.socket.socket)
                watcher.socket.socket.close()
        owner.chunk()
        first = chance.choice(("0", "1", "-1", "9" * 400, "x", ""))
        status, words = get_bytes(port, f"/video.mp4?stream={owner.stream}&first_chunk={first}")
        for watcher in watchers:
            watcher.socket.close()
    if status >= 500:
        raise Wrong(f"answered by {status} {words[:100]!r}")
    return words[:60].decode(errors="replace") if status >= 400 else ""


def leave(port: int, chance: random.Random, tell: Tell) -> str:
    """A viewer whose connection is gone from one moment to the next, within a stream."""
    wait_s = 0.3 * chance.random()
    tell(f"gone after {wait_s:.3f} s")
    line = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    line.sendall(UPGRADE.format(port=port).encode())
    answer(line, PATIENCE_S)
    text = b'{"type": "start", "prompt": "a disc", "seed": 0}'
    mask = b"\0\0\0\0"
    line.sendall(bytes((0x81, 0x80 | len(text))) + mask + text)
    time.sleep(wait_s)
    reset(line)
    line.close()
    return ""


def reset(line: socket.socket) -> None:
    """The next close is a reset, without the protocol's farewell."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
