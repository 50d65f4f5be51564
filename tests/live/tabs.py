"""Tabs of a browser as the live page's server sees them, a server on a free port, and a model."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import uvicorn
from starlette.applications import Starlette
from tiny_models import tiny_network
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from selfforcing_dfd.live import server
from selfforcing_dfd.live.web.messages import HEADER, encode_jpeg
from selfforcing_dfd.live.web.shared import Student
from selfforcing_dfd.streaming.session import PromptMode, StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

SETTINGS = StreamSettings(sink_frames=2, window_frames=4)
QUIET_S = 0.4  # many times what a chunk takes: whoever would send one has done so
ASSETS = Path(__file__).parents[2] / "assets" / "tiny"
PATIENCE_S = 20.0


class Chunk(NamedTuple):
    info: dict[str, Any]
    frames: list[bytes]


@dataclass
class Tab:
    """What a browser's tab does, step by step."""

    port: int
    options: dict[str, Any] = field(default_factory=dict)
    num_frames: int = 0
    path: str = "/stream"
    stream: str = ""  # its name, where somebody has noted it
    has_begun: bool = False

    def __post_init__(self) -> None:
        options = {"open_timeout": PATIENCE_S, "max_size": None, "max_queue": None, **self.options}
        self.socket = connect(f"ws://127.0.0.1:{self.port}{self.path}", **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def start(self, prompt: str = "a disc", seed: int = 0) -> Self:
        self.has_begun = True
        self.send("start", prompt=prompt, seed=seed)
        assert self.until("began")["seed"] == seed
        return self

    def until(self, kind: str) -> dict[str, Any]:
        """The next message of a kind. Video frames before it are passed over."""
        while True:
            data = self.socket.recv(PATIENCE_S)
            if isinstance(data, bytes):
                self.num_frames += 1
            elif (message := json.loads(data))["type"] == kind:
                return message

    def chunk(self, ack: bool = True) -> Chunk:
        """The next chunk, with its headers checked: every video frame of it, once and in order."""
        info = self.until("chunk")
        frames = []
        for _ in range(info["num_frames"]):
            data = self.socket.recv(PATIENCE_S)
            assert isinstance(data, bytes)
            assert HEADER.unpack_from(data) == (info["chunk"], self.num_frames)
            frames.append(data[HEADER.size :])
            self.num_frames += 1
        if ack:
            self.send("ack", chunk=info["chunk"])
        return Chunk(info, frames)

    def num_waiting_chunks(self, quiet_s: float = QUIET_S) -> int:
        """Chunks that arrive without any being acknowledged, until nothing comes any more."""
        count = 0
        try:
            while True:
                data = self.socket.recv(quiet_s)
                self.num_frames += isinstance(data, bytes)
                count += isinstance(data, str) and json.loads(data)["type"] == "chunk"
        except TimeoutError:
            return count

    def closing(self) -> tuple[int, str]:
        """Code and reason with which the server closes the connection."""
        try:
            while True:
                self.socket.recv(PATIENCE_S)
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            return closed.rcvd.code, closed.rcvd.reason


@contextmanager
def serving(models: StreamModel | Mapping[str, StreamModel], **options: Any) -> Iterator[int]:
    """The app in uvicorn on a free port, which is handed out. models: one, or several by name."""
    by_name = {"only": models} if isinstance(models, StreamModel) else models
    students = {name: Student(model, SETTINGS) for name, model in by_name.items()}
    app = server.create_app(students, **{"fps": 16.0, "max_queue_chunks": 2, **options})
    with running(app) as port:
        yield port


@contextmanager
def running(app: Starlette) -> Iterator[int]:
    """An app in uvicorn on a free port."""
    runner = uvicorn.Server(server.server_config(app))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=runner.run, args=([listener],))
        thread.start()
        try:
            wait_for(lambda: runner.started)
            yield port
        finally:
            runner.should_exit = True
            thread.join(PATIENCE_S)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def post(port: int, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    """Status of an answer, and what it says in words."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=body, headers=headers, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return response.status, json.loads(response.read())["message"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def get_bytes(port: int, path: str) -> tuple[int, bytes]:
    try:
        return 200, download(port, path)
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def download(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_S) as response:
        return response.read()


def num_sessions(port: int) -> int:
    return json.loads(get(port, "/healthz")[1])["sessions"]


def make_model(**sizes: Any) -> StreamModel:
    """The real network, codec and text encoder, small, with random weights.

    Chunks of two latent frames; five words fit.
    """
    codec = TinyCodec.load(ASSETS / "codec.safetensors")
    student = tiny_network(in_channels=16, out_channels=16).requires_grad_(False)
    return replace(StreamModel(student, codec, TinyText(12, 5), (1.0, 0.625), 2, (4, 6)), **sizes)


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
