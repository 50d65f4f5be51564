"""The live page of `python inference/stream.py --serve`.

Every tab has a stream of its own, see `web.viewer`, or watches another one's, see `web.watcher`,
and one WebSocket, see `web.messages`. Who may connect is said in `access`.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from selfforcing_dfd.common import UserError
from selfforcing_dfd.live.access import Access, Guard, is_loopback
from selfforcing_dfd.live.web.connection import NO_STREAM, TRY_LATER, Connection, Ended, Outbox
from selfforcing_dfd.live.web.messages import short
from selfforcing_dfd.live.web.pictures import MAX_PICTURE_BYTES, PictureError, open_picture
from selfforcing_dfd.live.web.shared import Shared, Student, one_thread
from selfforcing_dfd.live.web.stream import LiveStream
from selfforcing_dfd.live.web.viewer import Viewer
from selfforcing_dfd.live.web.watcher import MAX_WATCHERS, Watcher

WEB = Path(__file__).parent / "web"
SCRIPTS = (
    *("page.css", "page.js", "address.js", "figures.js", "graph.js", "line.js", "look.js"),
    *("picture.js", "player.js", "saving.js"),
)
PAGES = {"/": "page.html", **{f"/{name}": name for name in SCRIPTS}}
MAX_SOCKET_BYTES = 256 * 1024  # beyond it the protocol itself ends the connection, unread
SHUTDOWN_S = 2
READ_BYTES = 16 * MAX_PICTURE_BYTES
MAX_SAVING = 2  # videos that are put together at once: each may be a copy of all that is kept
HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


@dataclass(slots=True)
class StreamServer:
    """The requests that are answered, and who is connected."""

    shared: Shared
    max_sessions: int
    viewers: set[Viewer] = field(default_factory=set)
    watchers: set[Watcher] = field(default_factory=set)
    finished: deque[LiveStream] = field(init=False)  # which can still be saved
    saving: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_SAVING))

    def __post_init__(self) -> None:
        self.finished = deque(maxlen=self.max_sessions)

    async def stream(self, websocket: WebSocket) -> None:
        """The connection of a stream's owner, from its handshake to its end."""
        await websocket.accept()
        viewer = Viewer(self.shared, websocket)
        if len(self.viewers) >= self.max_sessions:
            plural = "streams are" if len(self.viewers) > 1 else "stream is"
            why = (
                f"{len(self.viewers)} other {plural} running, and no more are allowed; "
                "close one and try again"
            )
            await viewer.connection.end(Ended(TRY_LATER, why))
            return
        self.viewers.add(viewer)
        try:
            await viewer.run()
        finally:
            self.viewers.discard(viewer)
            viewer.stream.close()
            self.finished.append(viewer.stream)

    async def watch(self, websocket: WebSocket) -> None:
        """The connection of somebody who watches, from its handshake to its end."""
        await websocket.accept()
        owner = self.owner_of(websocket.query_params.get("stream", ""))
        if owner is None:
            connection = Connection(websocket, Outbox(1), self.shared.idle_s)
            await connection.end(Ended(NO_STREAM, "the stream of this link is not running"))
            return
        watcher = Watcher(owner, websocket)
        if len(self.watchers) >= MAX_WATCHERS:
            why = f"{MAX_WATCHERS} others watch, and no more are allowed; try again later"
            await watcher.connection.end(Ended(TRY_LATER, why))
            return
        self.watchers.add(watcher)
        try:
            await watcher.run()
        finally:
            self.watchers.discard(watcher)

    def owner_of(self, stream: str) -> Viewer | None:
        """Whose stream has this name."""
        return next((each for each in self.viewers if each.stream.name == stream), None)

    async def picture(self, request: Request) -> JSONResponse:
        """A picture for a stream to begin with: the body of a POST."""
        viewer = self.owner_of(request.query_params.get("stream", ""))
        if viewer is None:
            return told("the stream of this page is not running; open the page again", 404)
        try:
            data = await whole(request.stream(), MAX_PICTURE_BYTES, READ_BYTES)
            image = await asyncio.to_thread(open_picture, data)
        except TooLarge as error:
            return told(str(error), 413)
        except PictureError as error:
            return told(str(error), 415)
        except ClientDisconnect:
            return told("the picture did not arrive", 400)
        if not viewer.use_picture(image):
            return told("too many messages wait; send it again", 429)
        return told("", 202)

    async def video(self, request: Request) -> Response:
        """An mp4 of what a stream has shown; it may have ended since."""
        name = request.query_params.get("stream", "")
        streams = [viewer.stream for viewer in self.viewers] + list(self.finished)
        found = [each for each in streams if each.name == name]
        first = request.query_params.get("first_chunk", "0")
        if not found:
            return told("this stream is not known: it ended too long ago, or with its server", 404)
        if not first.isascii() or not first.isdecimal():
            return told(f"first_chunk is {short(first)}; want a whole number from 0 on", 400)
        if self.saving.locked():
            return told("other videos are being saved; try again in a moment", 429)
        try:
            async with self.saving:
                data = await found[0].saved(int(first[:18]))
        except UserError as error:
            return told(str(error), 404)
        disposition = {"Content-Disposition": 'attachment; filename="stream.mp4"'}
        return Response(data, headers={**HEADERS, **disposition}, media_type="video/mp4")

    async def page(self, request: Request) -> FileResponse:
        return FileResponse(WEB / PAGES[request.url.path], headers=HEADERS)

    async def health(self, _: Request) -> JSONResponse:
        students = self.shared.students
        facts = {
            "status": "ok",
            "sessions": len(self.viewers),
            "watchers": len(self.watchers),
            "max_sessions": self.max_sessions,
            "fps": self.shared.fps,
            "students": self.shared.facts,
            "settings": {name: asdict(one.settings) for name, one in students.items()},
        }
        return JSONResponse(facts, headers=HEADERS)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.shared.worker.shutdown(cancel_futures=True)


def create_app(
    students: Mapping[str, Student],
    *,
    fps: float,
    max_sessions: int = 2,
    idle_s: float = 60,
    max_queue_chunks: int = 2,
    examples: Sequence[str] = (),
    token: str | None = None,
    worker: ThreadPoolExecutor | None = None,
) -> Starlette:
    """The page, its WebSockets `/stream` and `/watch`, `/picture`, `/video.mp4` and `/healthz`.

    students: by the names that the page shows; the first one is played at once. A connection beyond
    max_sessions is told so and closed with code 1013. One that is idle for idle_s seconds, or
    acknowledges nothing for as long while it is not paused, is told and closed. A viewer's stream
    is at most max_queue_chunks chunks ahead of what was shown. examples: prompts that the page
    offers; it begins with the first one. token: what every request has to bring; without one, only
    this machine's browsers are answered. worker: the one thread that computes, which the app shuts
    down at its end; None is a new one. Raises UserError for settings that do not fit a model.
    """
    if max_sessions < 1:
        raise UserError(f"max_sessions is {max_sessions}; want at least 1")
    shared = Shared(students, fps, idle_s, max_queue_chunks, examples, worker or one_thread())
    server = StreamServer(shared, max_sessions)
    routes = [
        *(Route(path, server.page) for path in PAGES),
        Route("/healthz", server.health),
        Route("/picture", server.picture, methods=["POST"]),
        Route("/video.mp4", server.video),
        WebSocketRoute("/stream", server.stream),
        WebSocketRoute("/watch", server.watch),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, access=Access(token))],
        lifespan=server.lifespan,
    )
    app.state.has_token = token is not None
    return app


class TooLarge(UserError):
    """A request that is longer than it may be."""


async def whole(parts: AsyncIterator[bytes], max_bytes: int, read_bytes: int) -> bytes:
    """All parts together, of which no more than max_bytes are held. Raises TooLarge for more.

    What is too large is read on and thrown away, up to read_bytes: a browser shows no answer that
    comes while it is still sending.
    """
    body = bytearray()
    num_bytes = 0
    async for part in parts:
        num_bytes += len(part)
        if num_bytes <= max_bytes:
            body += part
        if num_bytes >= read_bytes:
            break
    if num_bytes > max_bytes:
        raise TooLarge(f"the file has more than {max_bytes // 2**20} MiB; send a smaller one")
    return bytes(body)


def told(message: str, status: int) -> JSONResponse:
    """An answer in words."""
    return JSONResponse({"message": message}, status, HEADERS)


def serve(
    app: Starlette,
    host: str = "127.0.0.1",
    port: int = 8000,
    ready: Callable[[], object] = lambda: None,
) -> None:
    """Answer requests until Ctrl-C. Raises OSError if the port cannot be used.

    host: where to listen. ready: called as soon as browsers can connect. Raises UserError for
    hosts other than this machine's own without a token.
    """
    if not is_loopback(host) and not app.state.has_token:
        raise UserError(f"host is {host}, which others can reach; give create_app a token")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"cannot listen: {error}; choose another port, or a host of this machine"
        ) from error
    with listener, suppress(KeyboardInterrupt):  # uvicorn raises it once more after a clean end
        ready()
        uvicorn.Server(server_config(app)).run(sockets=[listener])


def server_config(app: Starlette) -> uvicorn.Config:
    """No compression: JPEG gains nothing, and a small message could unpack into a large one."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # a token stands in a link
        ws_max_size=MAX_SOCKET_BYTES,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
